"""The progress of a phase in a log: few lines, true times, and a warning where a phase outlasts training."""

import contextlib
import logging
import os
import re
import sys

import pytest

from axolotl_layersel.common.progress import LEAST, Pace, PhaseProgress, format_duration


class Clock:
    """A clock that is set by hand."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def lines(caplog):
    caplog.set_level("INFO", "axolotl.layersel")
    return lambda: [(record.levelno, record.getMessage()) for record in caplog.records]


def run(clock: Clock, parts: int, seconds: float, first: float | None = None, facts: str = "", **options) -> None:
    """Run a phase of equal parts, the first of which can take longer."""
    with PhaseProgress("scoring", parts, options.pop("shown", True), clock=clock, **options) as progress:
        for part in range(parts):
            clock.now += first if first is not None and part == 0 else seconds
            progress.advance(1, facts)


def test_a_log_has_the_expected_time_and_a_line_for_every_tenth(clock, lines):
    run(clock, 20, 30, first=90, facts="training loss 2.1")
    told = [text for level, text in lines() if level == logging.INFO]
    assert told[0] == "layersel: scoring takes about 11 min"
    tenths = [f"layersel: scoring: {10 * tenth} % done, about " for tenth in range(2, 10)]
    assert [text[: len(start)] for text, start in zip(told[1:], tenths, strict=True)] == tenths
    assert told[1].endswith("% done, about 8 min left, training loss 2.1")
    assert told[-1].endswith("% done, about 60 s left, training loss 2.1")


def test_lines_are_seconds_apart(clock, lines):
    run(clock, 1000, LEAST / 250)  # four times LEAST
    assert 2 <= len(lines()) <= 4


def test_a_short_phase_has_no_line(clock, lines):
    run(clock, 50, LEAST / 60)
    assert lines() == []


def test_a_phase_of_one_part_has_no_line(clock, lines):
    run(clock, 1, 1000)
    assert lines() == []


def test_other_processes_say_nothing(clock, lines):
    run(clock, 20, 30, shown=False)
    assert lines() == []


def test_the_first_part_does_not_tell_the_speed_of_the_others(clock):
    pace = Pace(10, clock)
    clock.now += 100
    pace.add(1)
    assert pace.find_left() is None
    clock.now += 2
    pace.add(2)
    assert (pace.find_seconds_per_work(), pace.find_left(), pace.find_whole()) == (1, 7, 109)
    clock.now += 50
    pace.skip()
    clock.now += 1
    pace.add(1)
    assert (pace.find_seconds_per_work(), pace.find_left(), pace.find_whole()) == (1, 6, 109)


@pytest.mark.parametrize(("training", "warned"), [(None, False), (601, False), (120, True)])
def test_a_phase_that_outlasts_training_is_warned_of_once(clock, lines, training, warned):
    run(clock, 20, 30, find_training=lambda: training, advice="Lower `num_samples`.")
    warnings = [text for level, text in lines() if level == logging.WARNING]
    sentence = (
        "layersel: scoring takes about 10 min, which is longer than training: at the speed measured here, that takes "
        "about 2 min. Lower `num_samples`."
    )
    assert warnings == [sentence] * warned


def test_training_is_measured_when_the_time_is_told(clock, lines):
    asked = []
    run(clock, 20, 30, find_training=lambda: asked.append(clock.now))
    assert asked == [160]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (59.6, "60 s"), (99, "99 s"), (100, "2 min"), (3600, "60 min"), (6000, "1.7 h"), (90000, "25.0 h")],
)
def test_a_duration_is_in_the_unit_that_fits(seconds, text):
    assert format_duration(seconds) == text


FACTS = "loss 7.1000, validation 7.2000"


def test_a_terminal_has_a_bar_and_the_warning_but_no_lines(clock, lines, monkeypatch):
    ours, theirs = os.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    with os.fdopen(theirs, "w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with PhaseProgress("the search", 4, True, lambda: 10.0, "Lower it.", clock) as progress:
            progress.bar.refresh()
            for facts in ("", FACTS):
                clock.now += 60
                progress.advance(1, facts)
                progress.bar.refresh()
    written = b""
    with contextlib.suppress(OSError):  # the end of a terminal that was closed
        while chunk := os.read(ours, 65536):
            written += chunk
    os.close(ours)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written.decode())
    assert "layersel: the search" in shown
    assert "25 %" in shown and "50 %" in shown
    assert FACTS in shown, "it is not cut"
    assert "nan" not in shown
    assert "layersel: WARNING: the search takes about 4 min, which is longer than training" in shown
    assert lines() == []
