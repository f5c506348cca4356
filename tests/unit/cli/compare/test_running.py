"""The processes of cells: what ends them, and what a failed one is said to have failed by."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from helpers.compared import FILE, make_figures, make_settings

from axolotl_layersel.cli.compare import running
from axolotl_layersel.cli.compare.cells import Cell
from axolotl_layersel.cli.compare.figures import Failure
from axolotl_layersel.cli.compare.running import Board, Course, Stopped, describe_failure, launch, stopping_in_order
from axolotl_layersel.cli.compare.schedule import Cost
from axolotl_layersel.common.errors import LayerselError

OWN = 2e-4
FIRST = Cell("lora", OWN, 42, 50)

TRACEBACK = """\
[rank0]: Traceback (most recent call last):
[rank0]:   File "train.py", line 1, in <module>
[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB
Traceback (most recent call last):
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
subprocess.CalledProcessError: Command '[...]' returned non-zero exit status 1.
"""

KILLED = "The run was killed (SIGKILL), as the system does when memory is short."
ACCELERATE = """\
subprocess.CalledProcessError: Command '['python', 'train.py']' died with <Signals.SIGKILL: 9>.
Traceback (most recent call last):
subprocess.CalledProcessError: Command '['accelerate', 'launch']' returned non-zero exit status 1.
"""
TORCHRUN = """\
[rank1]: RuntimeError: Connection closed by peer
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
=======================================================
train.py FAILED
-------------------------------------------------------
Failures:
[1]:
  exitcode  : {other} (pid: 20632)
-------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-30_20:03:36
  exitcode  : {first} (pid: 20633)
=======================================================
"""


@pytest.mark.parametrize(
    ("text", "code", "sentence"),
    [
        ("ValueError: no\naxolotl-layersel: lora_r: 0 is no rank.\nend\n", 1, "lora_r: 0 is no rank."),
        (TRACEBACK, 1, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"),
        ("\x1b[31mRuntimeError: bad\x1b[0m\n", 1, "RuntimeError: bad"),
        ("step 3\n", -9, KILLED),
        (ACCELERATE, 1, KILLED),
        (TORCHRUN.format(first="-9", other="-15"), 1, KILLED),
        (TORCHRUN.format(first="1", other="-9"), 1, "RuntimeError: Connection closed by peer"),
        ("MemoryError\n", 1, "MemoryError: the process asked for more memory than there is."),
        ("step 3\n\n", 4, "The run ended with exit code 4: step 3"),
        ("", 4, "The run ended with exit code 4."),
        ("done\n", 0, "The run ended early, without an error."),
    ],
)
def test_the_sentence_of_a_failure_is_the_error_that_ended_it(text, code, sentence):
    assert describe_failure(text, code) == sentence


def test_the_output_of_a_run_goes_to_its_log(tmp_path):
    assert launch(["bash", "-c", "echo out; echo err >&2; exit 3"], tmp_path / "log.txt") == 3
    assert (tmp_path / "log.txt").read_text() == "out\nerr\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_run_with_its_children(number, tmp_path, request):
    before = signal.signal(number, signal.default_int_handler)  # it may be ignored where the tests run
    request.addfinalizer(lambda: signal.signal(number, before))
    log = tmp_path / "log.txt"
    timer = threading.Timer(0.5, os.kill, (os.getpid(), number))
    timer.start()
    with pytest.raises(Stopped), stopping_in_order():
        launch(["bash", "-c", "sleep 60 & echo $! ; wait"], log)
    timer.join()
    (child,) = log.read_text().split()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and is_alive(int(child)):
        time.sleep(0.05)
    assert not is_alive(int(child))
    assert signal.getsignal(number) is signal.default_int_handler, "the block restores it"


def test_a_second_signal_ends_a_run_that_takes_long_to_stop(tmp_path, request):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    log = tmp_path / "log.txt"
    timers = [threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)) for delay in (0.5, 1.0)]
    for timer in timers:
        timer.start()
    with pytest.raises(Stopped), stopping_in_order():
        launch(["bash", "-c", "trap '' TERM; echo $$; while :; do sleep 0.1; done"], log)
    for timer in timers:
        timer.join()
    process = int(log.read_text())
    request.addfinalizer(lambda: is_alive(process) and os.killpg(process, signal.SIGKILL))
    assert not is_alive(process)


def test_an_ignored_signal_stays_ignored(request):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with stopping_in_order():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def is_alive(process: int) -> bool:
    path = Path(f"/proc/{process}/stat")
    return path.exists() and path.read_text().rpartition(")")[2].split()[0] not in "ZX"


def make_course(tmp_path, **values) -> Course:
    settings = make_settings(folder=str(tmp_path / "compare"))
    return Course(FILE, settings, OWN, Board(), **values)


def make_failure(cell: Cell) -> Failure:
    named = {"arm": cell.arm, "rate": cell.rate, "seed": cell.seed, "steps": cell.steps}
    return Failure(**named, config_digest="", sentence="No room.", log="log.txt")


def test_a_comparison_ends_where_plain_lora_fails_first(tmp_path):
    course = make_course(tmp_path)
    with pytest.raises(LayerselError, match=r"plain LoRA at 0\.0002 fails, .* compare with: No room"):
        course.take(FIRST, make_failure(FIRST))
    course.take(FIRST, make_figures(FIRST, 1.0))
    other = Cell("random", OWN, 42, 50)
    course.take(other, make_failure(other))
    assert course.ended == {FIRST: 1.0, other: None}
    assert [cell.arm for cell in course.make_comparison().failures] == ["random"]


def test_the_first_figures_shorten_the_runs_to_that_of_the_file(tmp_path):
    course = make_course(tmp_path, asked={"steps": None})
    course.take(FIRST, make_figures(FIRST, 1.0, real_steps=30))
    assert course.settings.steps == 30
    assert course.results == {}, "the first run had 50 steps, and is not used"
    course.take(Cell("lora", OWN, 42, 15), make_figures(Cell("lora", OWN, 42, 15), 1.0, real_steps=20))
    assert course.settings.steps == 30, "settings are final after the first figures"


def test_more_steps_than_the_run_has_are_a_note_if_they_were_asked_for(tmp_path):
    course = make_course(tmp_path, asked={"steps": 100})
    course.take(FIRST, make_figures(FIRST, 1.0, real_steps=30))
    assert course.settings.steps == 100
    assert course.make_comparison().notes == [
        "The runs of 100 steps are longer than the run of the file, which has 30, so they see rows more often."
    ]


def test_the_course_has_a_note_once_although_a_time_limit_settles_it_twice(tmp_path):
    # As after a kill between the figures of the first run and those of the comparison.
    course = make_course(tmp_path, asked={"steps": 100}, limit=1e6)
    course.take(FIRST, make_figures(FIRST, 1.0, real_steps=30))
    assert not course.is_settled
    course.costs["lora"] = Cost(start=10, step=0.1)
    second = Cell("lora", 1e-4, 42, 50)
    course.take(second, make_figures(second, 1.0, real_steps=30))
    assert course.is_settled
    assert len(course.notes) == 1


def test_a_time_limit_is_kept_after_the_first_run(tmp_path):
    course = make_course(tmp_path, limit=300.0, costs={"lora": Cost(start=10, step=0.1)})
    course.take(FIRST, make_figures(FIRST, 1.0))
    assert (len(course.settings.seeds), len(course.settings.rates), course.settings.steps) == (2, 5, 100)
    assert course.notes == ["The time limit of 5 min left 2 seeds instead of 3, no rates between those of the grid."]


def test_runs_on_other_rows_are_not_compared(tmp_path):
    course = make_course(tmp_path)
    course.take(FIRST, make_figures(FIRST, 1.0, rows_digest="a"))
    other = Cell("random", OWN, 42, 50)
    with pytest.raises(LayerselError, match=r"dataset_prepared_path: the rows of .* differ from those"):
        course.take(other, make_figures(other, 1.0, rows_digest="b"))


def test_the_command_of_a_cell_is_that_of_the_user(tmp_path):
    launch = ["--launcher", "torchrun", "--", "--nproc_per_node=2"]
    command = running.list_command(tmp_path / "config.yml", launch)
    assert command[1:] == ["-m", "axolotl.cli.main", "train", str(tmp_path / "config.yml"), *launch]
