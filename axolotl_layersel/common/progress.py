"""The progress of a phase: a bar on a terminal, and lines with the time left in a log."""

import logging
import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from axolotl_layersel.common.terminal import make_console

LOG = logging.getLogger("axolotl.layersel")
# In seconds. A phase that is expected to take less has no lines in a log, and those of longer ones are so far apart.
LEAST = 5.0


class Pace:
    """The speed of a phase, from the times at which parts of its work end.

    Attributes:
        total: the work of the phase, in any unit.
        done: the work that has ended.
        spent: the seconds that it took.
        ended: when the last part ended.
    """

    def __init__(self, total: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.clock = total, clock
        self.done = self.spent = 0.0
        self.ended = clock()
        self.first: tuple[float, float] | None = None  # the work of the first part, and the seconds that it took

    def add(self, work: float) -> None:
        """Count ``work`` that has ended just now."""
        now = self.clock()
        self.done += work
        self.spent += now - self.ended
        self.ended = now
        self.first = self.first or (self.done, self.spent)

    def skip(self) -> None:
        """Leave out the time since the last part ended."""
        self.ended = self.clock()

    def find_seconds_per_work(self) -> float | None:
        """Return the seconds that one unit of work takes, None until two parts have ended.

        The first part does not count, because memory is allocated and kernels are compiled in it.
        """
        if self.first is None or self.done <= self.first[0]:
            return None
        work, seconds = self.first
        return (self.spent - seconds) / (self.done - work)

    def find_left(self) -> float | None:
        """Return the seconds that the rest will take, None until two parts have ended."""
        each = self.find_seconds_per_work()
        return None if each is None else each * (self.total - self.done)

    def find_whole(self) -> float | None:
        """Return the seconds that the phase will have taken in all, None until two parts have ended."""
        left = self.find_left()
        return None if left is None else self.spent + left


class PhaseProgress:
    """Shows how far a phase is.

    On a terminal this is a bar, which disappears at the end. In a log it is a line with the expected time after the
    first parts, and a line with the time left after each tenth of the work. All lines are ``LEAST`` seconds apart.

    Args:
        name: the phase in messages, such as ``scoring``.
        total: its work, in any unit.
        shown: whether this process shows anything.
        find_training: returns the seconds that the training after this phase will take, None if unknown. It is called
            once, when the time of the phase can be told. A phase that takes longer than training gets a warning.
        advice: the way to make the phase shorter, as a sentence for that warning.
        clock: the time in seconds.
    """

    def __init__(
        self,
        name: str,
        total: float,
        shown: bool,
        find_training: Callable[[], float | None] = lambda: None,
        advice: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.shown = name, shown
        self.find_training, self.advice = find_training, advice
        self.pace = Pace(total, clock)
        self.is_expected = False  # whether the expected time was told
        self.told = clock()  # when the last line was
        self.tenths = 0  # that were done then
        self.bar = Progress(
            TextColumn("layersel: {task.description}"),
            BarColumn(bar_width=None, table_column=Column(max_width=40)),  # gives way where the words need the room
            TextColumn("{task.percentage:.0f} %"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}"),
            console=make_console(),
            disable=not (shown and sys.stdout.isatty()),
            transient=True,
        )
        self.task = self.bar.add_task(name, total=total, facts="")

    def __enter__(self) -> "PhaseProgress":
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def advance(self, work: float, facts: str = "") -> None:
        """Show that ``work`` more has ended. ``facts``: further words at the end of the bar and of lines."""
        self.pace.add(work)
        if not self.shown:
            return
        self.bar.update(self.task, advance=work, facts=facts)
        whole, left = self.pace.find_whole(), self.pace.find_left()
        if whole is None or left is None:
            return
        if not self.is_expected and self.pace.ended - self.told >= min(LEAST, whole / 10):
            self.is_expected = True
            self.tell_expected(whole)
        tenths = int(10 * self.pace.done / self.pace.total + 1e-9)
        if self.tenths < tenths < 10 and self.pace.ended - self.told >= LEAST:
            end = f", {facts}" if facts else ""
            self.tell(f"{self.name}: {10 * tenths} % done, about {format_duration(left)} left{end}")

    def tell_expected(self, whole: float) -> None:
        """Tell how long the phase will take, with a warning if that is longer than training."""
        training = self.find_training()
        if whole < LEAST:
            return
        if training is not None and whole > training:
            self.tell(
                f"{self.name} takes about {format_duration(whole)}, which is longer than training: at the speed "
                f"measured here, that takes about {format_duration(training)}. {self.advice}",
                logging.WARNING,
            )
        else:
            self.tell(f"{self.name} takes about {format_duration(whole)}")

    def tell(self, text: str, level: int = logging.INFO) -> None:
        """Write a line: to the log, or above the bar, which the log would cut. A bar has the time left anyway."""
        self.told = self.pace.ended
        self.tenths = int(10 * self.pace.done / self.pace.total + 1e-9)
        if self.bar.disable:
            LOG.log(level, "layersel: %s", text)
        elif level > logging.INFO:
            self.bar.console.print(f"layersel: {logging.getLevelName(level)}: {text}", style="yellow", soft_wrap=True)


def format_duration(seconds: float) -> str:
    """Return a duration in words, in the unit that fits: ``40 s``, ``3 min`` or ``2.5 h``."""
    if seconds < 100:
        return f"{max(round(seconds), 1)} s"
    if seconds < 100 * 60:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"
