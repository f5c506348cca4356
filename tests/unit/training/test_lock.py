"""One run at a time in a folder, with real processes."""

import json
import os
import resource
import time
from dataclasses import replace

import pytest
from helpers.locks import shorten_waits

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.training import lock
from axolotl_layersel.training.lock import FILE, Owner, RunLock


@pytest.fixture
def impatient(monkeypatch):
    shorten_waits(monkeypatch)


def test_another_process_that_has_got_the_same_number_is_not_the_run(tmp_path):
    owner = replace(Owner.current(), process=os.getppid(), process_start="1")
    assert replace(owner, process_start=lock.find_start(os.getppid())).is_alive()
    (tmp_path / FILE).write_text(json.dumps(vars(owner)))
    RunLock.take(tmp_path).release()


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


def test_a_lock_that_cannot_be_written_is_not_left_behind(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(LayerselError, match=rf"{FILE} cannot be written \(File too large\)"):
            RunLock.take(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_forked_child_leaves_the_lock_to_its_parent(tmp_path):
    held = RunLock.take(tmp_path)
    child = os.fork()
    if child == 0:
        held.release()
        os._exit(0)
    os.waitpid(child, 0)
    held.confirm()
    held.release()
