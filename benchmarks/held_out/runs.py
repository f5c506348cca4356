"""The CSV file of runs, to which several processes may append."""

import csv
import fcntl
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.held_out.arms import HALF_RANK

# What a run was trained and tested on. Runs with the same values are compared.
REGIME = ["base", "task", "rows", "epochs", "steps", "batch_size", "longest", "held_out", "test_rows"]
# With these, what tells a run from the others.
KEY = [*REGIME, "arm", "rank", "seed", "rate"]
FIGURES = [
    "validation",
    "test",
    "accuracy",
    "test_best",
    "step_best",
    "training",
    "forgetting",
    "parameters",
    "seconds_choosing",
    "seconds_training",
]
COLUMNS = [*KEY, *FIGURES, "general", "curve", "package", "chosen"]
TEXTS = {"base", "task", "arm", "general", "curve", "package", "chosen"}
WHOLE = {"rows", "epochs", "steps", "batch_size", "longest", "held_out", "test_rows", "rank", "seed", "step_best"}
WHOLE |= {"parameters"}


def read_value(name: str, text: str) -> str | int | float | None:
    """Return the value of a column; None for a number that is not there."""
    if name in TEXTS:
        return text
    if not text:
        return None
    return int(text) if name in WHOLE else float(text)


def read_runs(path: Path) -> list[dict[str, Any]]:
    """Return the lines of the CSV file; an empty list if the file does not exist.

    A last line without an end is left out: its writer was killed. Files of earlier benchmarks have fewer columns.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        text = file.read()
    lines = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
    return [{key: read_value(key, value) for key, value in line.items()} for line in lines]


def format_lines(lines: Iterable[Iterable[Any]]) -> bytes:
    """Return lines of CSV."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(lines)
    return text.getvalue().encode()


def check_appendable(path: Path) -> None:
    """Raise ValueError if the CSV file has other columns than the runs of this benchmark."""
    if path.exists():
        with path.open("rb") as file:
            header = file.readline()
        if header.endswith(b"\n") and header != format_lines([COLUMNS]):
            raise ValueError(f"{path}: the file has other columns than this benchmark writes. Name a new file.")


def append_run(path: Path, run: Mapping[str, Any]) -> None:
    """Append a run to the CSV file, which begins with a header; a line that a killed process left is removed."""
    with path.open("a+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
        header = [] if whole else [COLUMNS]
        # One write, so that a reader sees all of the line or none of it.
        file.write(format_lines([*header, [run[name] for name in COLUMNS]]))


def append_lines(path: Path, columns: Sequence[str], lines: Iterable[Mapping[str, Any]]) -> None:
    """Append lines to the CSV file of another benchmark, which begins with a header."""
    header = [] if path.exists() else [columns]
    with path.open("ab") as file:
        file.write(format_lines([*header, *([line[name] for name in columns] for line in lines)]))


def is_done(key: Mapping[str, Any], runs: Iterable[Mapping[str, Any]]) -> bool:
    """Return whether a run with the values ``key`` of ``KEY`` is among ``runs``."""
    return any(all(run[name] == key[name] for name in KEY) for run in runs)


def find_regime(run: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what a run was trained and tested on; None for a column that its file does not have."""
    return tuple(run.get(name) for name in REGIME)


def add_half_ranks(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the runs, and those of LoRA once more as LoRA at half of twice their rank."""
    return runs + [{**run, "arm": HALF_RANK, "rank": 2 * run["rank"]} for run in runs if run["arm"] == "lora"]
