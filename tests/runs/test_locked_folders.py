"""One run at a time in a folder, with real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from helpers.locks import shorten_waits
from helpers.places import ENVIRONMENT

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.training import lock
from axolotl_layersel.training.lock import FILE, Owner, RunLock

HOLD = """
import sys
from axolotl_layersel.training import lock
lock.BEAT = 0.05
held = lock.RunLock.take(sys.argv[1])
print("held", flush=True)
sys.stdin.readline()
{end}
"""


@pytest.fixture
def impatient(monkeypatch):
    shorten_waits(monkeypatch)


@pytest.fixture
def hold(tmp_path):
    """Return a function that starts a process that holds the lock of a folder until it reads a line."""
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


def say_it_is_elsewhere(folder) -> None:
    """Change the lock to the content that a process on another machine would write."""
    owner = replace(Owner.read(folder / FILE), host="node7", machine="another")
    (folder / FILE).write_text(json.dumps(vars(owner)))


def test_two_runs_at_once_in_one_folder_are_refused_by_the_name_of_the_first(hold, tmp_path):
    process = hold()
    with pytest.raises(LayerselError) as error:
        RunLock.take(tmp_path)
    message = str(error.value)
    assert f"output_dir: {tmp_path} is being written by another run (process {process.pid} on " in message
    assert f"delete {tmp_path / FILE}" in message


@pytest.mark.parametrize("end", ["", "raise ValueError", "raise SystemExit(130)", "held.release()"])
def test_a_run_that_ends_leaves_nothing_behind(hold, tmp_path, end):
    process = hold(end)
    process.communicate("\n")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_was_killed_on_this_machine_is_known_to_be_gone_at_once(hold, tmp_path):
    process = hold()
    process.send_signal(signal.SIGKILL)
    # Not waited for, so that the zombie still has its process number.
    while lock.find_start(process.pid) is not None:
        time.sleep(0.01)
    started = time.monotonic()
    RunLock.take(tmp_path).release()
    assert time.monotonic() - started < 5


def test_a_run_on_another_machine_that_gives_signs_of_life_is_refused(hold, tmp_path, impatient):
    hold()
    say_it_is_elsewhere(tmp_path)
    with pytest.raises(LayerselError, match=r"\(process \d+ on node7 since "):
        RunLock.take(tmp_path)


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
