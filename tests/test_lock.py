"""One run at a time in a folder, with real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from conftest import ENVIRONMENT

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.training import lock
from axolotl_layersel.training.lock import FILE, Owner, RunLock

HOLD = """
import sys
from axolotl_layersel import lock
lock.BEAT = 0.05
held = lock.RunLock.take(sys.argv[1])
print("held", flush=True)
sys.stdin.readline()
{end}
"""


@pytest.fixture
def hold(tmp_path):
    """Return a function that starts a process which holds the lock of a folder until it is written to."""
    processes = []

    def start(end: str = "") -> subprocess.Popen:
        command = [sys.executable, "-c", HOLD.format(end=end), str(tmp_path)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, text=True, env={**os.environ, **ENVIRONMENT}, **pipes)
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(lock, "SILENCE", 0.5)
    monkeypatch.setattr(lock, "POLL", 0.02)
    monkeypatch.setattr(lock, "BEAT", 0.05)


def say_it_is_elsewhere(folder) -> None:
    """Change the lock in place to what a process on another machine would have written."""
    owner = replace(Owner.read(folder / FILE), host="node7", machine="another")
    (folder / FILE).write_text(json.dumps(vars(owner)))


@pytest.mark.launches
def test_two_runs_at_once_in_one_folder_are_refused_by_the_name_of_the_first(hold, tmp_path):
    process = hold()
    with pytest.raises(LayerselError) as error:
        RunLock.take(tmp_path)
    message = str(error.value)
    assert f"output_dir: {tmp_path} is being written by another run (process {process.pid} on " in message
    assert f"delete {tmp_path / FILE}" in message


@pytest.mark.launches
@pytest.mark.parametrize("end", ["", "raise ValueError", "raise SystemExit(130)", "held.release()"])
def test_a_run_that_ends_leaves_nothing_behind(hold, tmp_path, end):
    process = hold(end)
    process.communicate("\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.launches
def test_a_run_that_was_killed_on_this_machine_is_known_to_be_gone_at_once(hold, tmp_path):
    process = hold()
    process.send_signal(signal.SIGKILL)
    # Not waited for, so that its number is still taken, by what is left of it.
    while lock.find_start(process.pid) is not None:
        time.sleep(0.01)
    started = time.monotonic()
    RunLock.take(tmp_path).release()
    assert time.monotonic() - started < 5


def test_another_process_that_has_got_the_same_number_is_not_the_run(tmp_path):
    owner = replace(Owner.current(), process=os.getppid(), process_start="1")
    assert replace(owner, process_start=lock.find_start(os.getppid())).is_alive()
    (tmp_path / FILE).write_text(json.dumps(vars(owner)))
    RunLock.take(tmp_path).release()


@pytest.mark.launches
def test_a_run_on_another_machine_that_gives_signs_of_life_is_refused(hold, tmp_path, impatient):
    hold()
    say_it_is_elsewhere(tmp_path)
    with pytest.raises(LayerselError, match=r"\(process \d+ on node7 since "):
        RunLock.take(tmp_path)


@pytest.mark.launches
def test_a_run_on_another_machine_that_gives_none_is_gone(hold, tmp_path, impatient):
    process = hold()
    say_it_is_elsewhere(tmp_path)
    process.kill()
    process.wait()
    started = time.monotonic()
    held = RunLock.take(tmp_path)
    assert time.monotonic() - started >= lock.SILENCE
    assert Owner.read(tmp_path / FILE).process == os.getpid()
    held.release()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", json.dumps({**vars(Owner.current()), "process": -1})])
def test_a_lock_that_names_nobody_is_given_time_too(tmp_path, impatient, content):
    (tmp_path / FILE).write_text(content)
    started = time.monotonic()
    RunLock.take(tmp_path).release()
    assert time.monotonic() - started >= lock.SILENCE


def test_a_second_run_of_the_same_process_takes_the_place_of_the_first(tmp_path):
    first = RunLock.take(tmp_path)
    second = RunLock.take(tmp_path)
    second.confirm()
    with pytest.raises(LayerselError, match="another run has taken"):
        first.confirm()
    first.release()
    assert (tmp_path / FILE).exists(), "the first run must not remove what is the second one's"
    second.release()
    second.release()
    assert not (tmp_path / FILE).exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LayerselError, match=f"{tmp_path / 'file'} is a file, where a folder is needed"):
        RunLock.take(tmp_path / "file")
    with pytest.raises(LayerselError, match=f"{tmp_path / 'file'} is a file, where a folder is needed"):
        RunLock.take(tmp_path / "file" / "below")


def test_a_forked_child_leaves_the_lock_to_its_parent(tmp_path):
    held = RunLock.take(tmp_path)
    child = os.fork()
    if child == 0:
        held.release()
        os._exit(0)
    os.waitpid(child, 0)
    held.confirm()
    held.release()
