"""The runs of cells: each is ``axolotl train`` in processes of its own, whose output goes to a log in its folder."""

import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn

from axolotl_layersel.cli.compare import schedule
from axolotl_layersel.cli.compare.cells import (
    CONFIG,
    MODEL,
    Cell,
    check_config,
    find_digest,
    find_folder,
    make_config,
    read_result,
    write_config,
)
from axolotl_layersel.cli.compare.figures import (
    COMPARISON,
    FAILURE,
    FIGURES,
    Comparison,
    Failure,
    Figures,
    Settings,
    write_record,
)
from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.progress import format_duration
from axolotl_layersel.common.terminal import SENTENCE, clean, make_console
from axolotl_layersel.training.ending import COLLECTOR, LAUNCHER_FAILURE

LOG = "log.txt"
PATIENCE = 30.0  # seconds that a stopped run has to end by itself
POLL = 0.1  # seconds between two looks at a run
ERROR = re.compile(r"(?:[A-Za-z_][\w.]*\.)?[A-Za-z_]\w*(?:Error|Exception|Interrupt|Exit)\b.*")
OF_LAUNCHERS = (LAUNCHER_FAILURE, "CalledProcessError")
# What accelerate 1.13.0 and torchrun of torch 2.13.0 say of a process that was killed. torchrun may kill others later,
# so that the first failure counts.
BY_LAUNCHERS = re.compile(r"died with <Signals\.SIGKILL: 9>|Root Cause \(first observed failure\):[^=]*exitcode *: -9 ")
COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
PREFIX = re.compile(r"^\[?(?:rank)?\d+\]?:\s?")  # of launchers before the lines of a process
PR_SET_PDEATHSIG = 1  # from Linux' sys/prctl.h
FOLLOW = "AXOLOTL_LAYERSEL_COMPARE"  # the variable by which a run knows that it is a cell of a comparison


class Stopped(BaseException):
    """The user has stopped the comparison, by Ctrl-C or SIGTERM."""


@contextlib.contextmanager
def stopping_in_order() -> Iterator[None]:
    """Raise Stopped for SIGINT and SIGTERM within the block, so that the running cell ends first.

    A signal that is ignored, as SIGINT is in a command that a script starts in the background, stays so.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped

    heeded = [each for each in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(each) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- One cell ---------------------------------------------------------------------------------------------------------


def run_cell(cell: Cell, data: Mapping[str, Any], settings: Settings) -> Figures | Failure:
    """Train a cell from its beginning, and return its figures, or why it failed. Both are also files in its folder.

    Raises:
        Stopped: if the user stops it; it then leaves neither.
        LayerselError: if its folder holds a cell with other settings, or nothing can be written there.
    """
    folder, config = find_folder(cell, settings), make_config(data, cell, settings)
    check_config(config, folder / CONFIG, Path(settings.folder))
    for leftover in (FIGURES, FAILURE):
        (folder / leftover).unlink(missing_ok=True)
    shutil.rmtree(folder / MODEL, ignore_errors=True)  # of a run that was stopped
    write_config(config, cell, folder / CONFIG)
    code = launch(list_command(folder / CONFIG, settings.launch), folder / LOG)
    found = read_result(cell, config, settings)
    if code == 0 and found is not None:
        return found
    (folder / FIGURES).unlink(missing_ok=True)  # another process of the run has failed
    failure = Failure(
        arm=cell.arm,
        rate=cell.rate,
        seed=cell.seed,
        steps=cell.steps,
        config_digest=find_digest(config),
        sentence=describe_failure((folder / LOG).read_text("utf-8", "replace"), code),
        log=str(folder / LOG),
    )
    write_record(failure, folder / FAILURE)
    return failure


def list_command(config: Path, launch: list[str]) -> list[str]:
    """Return the command that trains a YAML file. ``launch``: the arguments after the file."""
    return [sys.executable, "-m", "axolotl.cli.main", "train", str(config), *launch]


def launch(command: list[str], log: Path) -> int:
    """Run a command with its output in a file, and return its exit code. If this process stops, so does the command."""
    paths = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    env = {**os.environ, "PATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    env[FOLLOW] = "1"
    env.pop(COLLECTOR, None)  # the sentences of a cell belong into its own log
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,  # Ctrl-C reaches this process only, which stops the run in order
            preexec_fn=lambda: follow_parent(signal.SIGTERM),
        )
        try:
            while process.poll() is None:
                time.sleep(POLL)
        except BaseException:
            end(process)
            raise
    return process.returncode


def follow_parent(number: int) -> None:
    """Let the kernel send this process a signal when its parent ends, so that a killed command leaves no run behind.

    A second start would find that run in its folder. Only Linux has this.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def end(process: subprocess.Popen) -> None:
    """Stop a run with all of its processes, by force if it does not end or the user does not wait for it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
    finally:  # also after a second Ctrl-C: the next start would find the run in its folder
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def describe_failure(text: str, code: int) -> str:
    """Return in one line why a run failed.

    Args:
        text: the output of the run.
        code: its exit code, which is negative for a signal.
    """
    lines = [PREFIX.sub("", COLOURS.sub("", line)).strip() for line in text.splitlines()]
    ours = [line.removeprefix(SENTENCE) for line in lines if line.startswith(SENTENCE)]
    if ours:
        return clean(ours[-1])
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL) or BY_LAUNCHERS.search(COLOURS.sub("", text)):
        return "The run was killed (SIGKILL), as the system does when memory is short."
    errors = [line for line in lines if ERROR.fullmatch(line) and not any(name in line for name in OF_LAUNCHERS)]
    if errors:
        bare = errors[-1] == MemoryError.__name__  # Python gives no reason
        return "MemoryError: the process asked for more memory than there is." if bare else clean(errors[-1])
    if code == 0:
        return "The run ended early, without an error."
    last = next((line for line in reversed(lines) if line), "")
    return clean(f"The run ended with exit code {code}: {last}" if last else f"The run ended with exit code {code}.")


# --- All cells --------------------------------------------------------------------------------------------------------


class Board:
    """What the user sees while cells run: a bar with the time left on a terminal, and a line for each cell.

    Args:
        to_errors: whether everything goes to standard error, because standard output is JSON.
    """

    def __init__(self, to_errors: bool = False) -> None:
        self.file = sys.stderr if to_errors else sys.stdout
        self.console = make_console(self.file)
        self.bar = Progress(
            TextColumn("compare: {task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed:.0f} of {task.total:.0f} runs{task.fields[left]}"),
            console=self.console,
            disable=not self.file.isatty(),
            transient=True,
        )
        self.task = self.bar.add_task("", total=1, left="")

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        self.console.print(clean(text), soft_wrap=True)
        self.file.flush()

    def show(self, cell: Cell, done: int, planned: int, left: float | None) -> None:
        """Show the cell that runs now, and the seconds left if they are known."""
        words = "" if left is None else f", about {format_duration(left)} left"
        self.bar.update(self.task, description=cell.describe(), completed=done, total=planned, left=words)


@dataclass
class Course:
    """A comparison that is under way.

    Its settings become final with its first figures: a run that is shorter than the cells shortens them, and a time
    limit leaves out what does not fit.

    Attributes:
        data: the content of the user's YAML file.
        settings: the settings of the comparison.
        own: the learning rate of the user's file.
        board: what the user sees.
        asked: the options of the command; see ``Comparison``.
        limit: the seconds for all cells that are still to run; None without a limit.
        retry: whether cells that have failed run again.
        is_settled: whether the settings are final.
        results: of the cells that have ended.
        costs: the time of a cell of each arm, from those that ran in this process.
        notes: sentences for the report.
    """

    data: Mapping[str, Any]
    settings: Settings
    own: float
    board: Board
    asked: dict[str, Any] = field(default_factory=dict)
    limit: float | None = None
    retry: bool = False
    is_settled: bool = False
    results: dict[Cell, Figures | Failure] = field(default_factory=dict)
    costs: dict[str, schedule.Cost] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def ended(self) -> dict[Cell, float | None]:
        """The validation loss of each cell that has ended, None for one that failed."""
        return {
            cell: found.validation_loss if isinstance(found, Figures) else None for cell, found in self.results.items()
        }

    def find_next(self) -> Cell | None:
        """Return the next cell that has not ended, after reading those that have."""
        while (cell := schedule.plan_next(self.settings, self.own, self.ended)) is not None:
            found = read_result(cell, make_config(self.data, cell, self.settings), self.settings)
            if found is None or (self.retry and isinstance(found, Failure)):
                return cell
            self.take(cell, found)
        return None

    def take(self, cell: Cell, found: Figures | Failure) -> None:
        """Add the result of a cell.

        Raises:
            LayerselError: if its rows differ from those of the other cells, or if nothing can be compared with LoRA.
        """
        others = (other for other in self.results.values() if isinstance(other, Figures))
        reference = next(others, None)
        if isinstance(found, Figures) and reference is not None and found.rows_digest != reference.rows_digest:
            raise LayerselError(
                f"dataset_prepared_path: the rows of {find_folder(cell, self.settings)} differ from those of the other "
                f"runs, so the data have changed since. Delete {self.settings.folder}, and start again."
            )
        if isinstance(found, Failure) and not self.results:
            raise LayerselError(
                f"compare: plain LoRA at {cell.rate:g} fails, so there is nothing to compare with: {found.sentence} "
                f"Its output is in {found.log}. --retry tries it again."
            )
        self.results[cell] = found
        if isinstance(found, Figures) and not self.is_settled:
            self.settle(found)

    def run(self) -> None:
        """Run all cells that have not ended."""
        with self.board.bar:
            while (cell := self.find_next()) is not None:
                self.board.show(cell, len(self.results), self.count(), self.find_left())
                begun = time.monotonic()
                found = run_cell(cell, self.data, self.settings)
                wall = time.monotonic() - begun
                if isinstance(found, Figures):
                    last = schedule.measure_cost(cell.steps, wall, found.seconds_training)
                    before = self.costs.get(cell.arm)
                    self.costs[cell.arm] = last if before is None else schedule.average(before, last)
                self.take(cell, found)
                self.tell(cell, found, wall)
                self.save()

    def settle(self, found: Figures) -> None:
        """Make the settings final, by the first figures.

        Raises:
            LayerselError: if the time limit is too short for any comparison.
        """
        before = self.settings
        if found.real_steps < before.steps:
            if self.asked.get("steps") is None:
                self.settings = before.model_copy(update={"steps": found.real_steps})
                self.board.say(f"compare: the run of the file has {found.real_steps} steps, so the runs have as many.")
            else:
                note = (
                    f"The runs of {before.steps} steps are longer than the run of the file, which has "
                    f"{found.real_steps}, so they see rows more often."
                )
                self.notes = list(dict.fromkeys([*self.notes, note]))  # a time limit settles them a second time
        if self.limit is not None and self.costs:
            shorter = schedule.fit(self.settings, self.own, self.costs, self.limit)
            change = schedule.describe_change(self.settings, shorter)
            if change is not None:
                self.notes.append(f"The time limit of {format_duration(self.limit)} left {change}.")
                self.board.say(f"compare: {change}, to fit the time limit of {format_duration(self.limit)}.")
            self.settings = shorter
        if self.settings.steps != before.steps:
            for other in self.results:
                if other.steps == before.steps:  # its folder is needed for a cell of the final length
                    shutil.rmtree(find_folder(other, before), ignore_errors=True)
            self.results.clear()
        # After a kill, the figures may be there before the time of any cell is known.
        self.is_settled = self.limit is None or bool(self.costs)

    def save(self) -> None:
        """Write the comparison as far as it is, for a second start and for the report."""
        write_record(self.make_comparison(), Path(self.settings.folder) / COMPARISON)

    def tell(self, cell: Cell, found: Figures | Failure, wall: float) -> None:
        """Print the line of a cell that has just ended."""
        if isinstance(found, Figures):
            result = f"validation loss {found.validation_loss:.4f}"
        else:
            result = f"failed: {found.sentence}"
        left = self.find_left()
        rest = f", about {format_duration(left)} left" if left else ""
        place = f"{len(self.results)} of {self.count()}"
        self.board.say(f"compare: {place}: {cell.describe()}: {result} ({format_duration(wall)}{rest})")

    def count(self) -> int:
        """Return the number of cells of the whole comparison."""
        return schedule.count_planned(self.settings, self.own, self.ended)

    def find_left(self) -> float | None:
        """Return the seconds that the other cells will take; None until the first has ended."""
        if not self.costs:
            return None
        return schedule.estimate(self.settings, self.own, self.ended, self.costs)

    def make_comparison(self) -> Comparison:
        """Return the comparison with the cells that have ended."""
        planned = schedule.list_planned(self.settings, self.own, self.ended)
        return Comparison(
            settings=self.settings,
            cells=[self.results[cell] for cell in planned if cell in self.results],
            best_rates=schedule.find_best_rates(self.settings, self.own, self.ended),
            notes=[*self.notes, *schedule.describe_edges(self.settings, self.own, self.ended)],
            planned=self.count(),
            asked=self.asked,
        )
