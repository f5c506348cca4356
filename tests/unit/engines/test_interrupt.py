"""Signals in one process; what runs do with them is in test_interrupted_runs.py."""

import os
import signal
import subprocess
import threading
import time

import pytest
import torch

from axolotl_layersel.engines.signals import (
    SPACING,
    WATCH,
    Interrupted,
    SharedSignal,
    SignalWatch,
    ending_on_signal,
    outlive_signals,
)

CPU = torch.device("cpu")


@pytest.fixture
def theirs():
    """Handlers of somebody else's, which must not run and must be there again at the end."""

    def handle(signum, frame):
        raise AssertionError("the handler that was there before ran")

    before = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    yield handle
    now = {signum: signal.signal(signum, handler) for signum, handler in before.items()}
    assert set(now.values()) == {handle}


def test_signals_are_remembered_and_the_handlers_given_back(theirs):
    watch = SignalWatch()
    watch.install()
    assert watch.received == 0
    os.kill(os.getpid(), signal.SIGINT)
    assert watch.received == signal.SIGINT
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    assert watch.received == signal.SIGTERM, "it leaves more behind, and whoever sent it will kill"
    watch.install()
    assert watch.received == 0, "a new training must not end by an old signal"
    watch.restore()


def test_the_third_ctrl_c_ends_at_once(theirs):
    watch = SignalWatch()
    watch.install()
    with pytest.raises(KeyboardInterrupt):
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is theirs


def test_a_scheduler_may_repeat_its_signal(theirs):
    watch = SignalWatch()
    watch.install()
    for _ in range(5):
        os.kill(os.getpid(), signal.SIGTERM)
    assert watch.received == signal.SIGTERM
    watch.restore()


def test_a_forked_process_dies_of_the_signal_as_if_there_were_no_watch(theirs):
    watch = SignalWatch()
    watch.install()
    pid = os.fork()
    if pid == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
    assert watch.received == 0
    watch.restore()


class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        time.sleep(0.01)
        return os.getpid()


def test_processes_that_load_data_outlive_signals_that_are_not_their_parents(theirs):
    watch = SignalWatch()
    watch.install()
    loader = torch.utils.data.DataLoader(Slow(), num_workers=2, worker_init_fn=outlive_signals)
    batches = iter(loader)
    workers = {int(next(batches)) for _ in range(4)}
    assert len(workers) == 2 and os.getpid() not in workers
    for worker in workers:
        for name in ("INT", "TERM"):
            subprocess.run(["kill", f"-{name}", str(worker)], check=True)
    assert {int(batch) for batch in batches} <= workers, "and none raised that a worker was killed"
    batches = iter(loader)
    workers = {int(next(batches)) for _ in range(4)}
    processes = list(batches._workers)
    for process in processes:
        process.terminate()
        process.join(timeout=20)
    assert [process.exitcode for process in processes] == [0, 0]
    watch.restore()


def test_a_trainer_in_another_thread_leaves_signals_alone():
    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=lambda: SignalWatch().install())
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before


def test_between_optimizer_steps_a_signal_is_looked_at_now_and_then_and_at_steps_at_once(theirs):
    WATCH.install()
    shared = SharedSignal(CPU)
    assert [shared.look() for _ in range(SPACING)] == [0] * SPACING
    os.kill(os.getpid(), signal.SIGINT)
    seen = [shared.look() for _ in range(2 * SPACING)]
    assert seen.index(signal.SIGINT) == 2 * SPACING - 1, "asked after 8 more, and looked at 8 later"
    assert shared.settle() == signal.SIGINT
    WATCH.restore()
    assert SharedSignal(CPU).settle() == 0


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_phase_with_its_code_and_one_line(theirs, caplog, signum, code):
    undone = []
    with pytest.raises(SystemExit) as stopped, ending_on_signal(CPU, "nothing is left"):
        try:
            os.kill(os.getpid(), signum)
        finally:
            undone.append(True)
    assert stopped.value.code == code and undone
    assert [record.message for record in caplog.records] == [f"layersel: {signum.name}: nothing is left"]
    assert not issubclass(Interrupted, Exception), "nobody who catches exceptions may catch it"
