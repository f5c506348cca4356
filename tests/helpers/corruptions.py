"""Ways in which a file is damaged."""

import contextlib
import csv
import io
from collections.abc import Callable
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

JUNK = [None, True, -1, 0, 7, 1e30, 0.5, "", "x", "\x1b[31m", "\ud800", [], [1], {}, {"a": 1}, 10**400]


def list_places(content: object):
    """Yield every container in JSON with each of its keys."""
    for key in list(content) if isinstance(content, dict) else range(len(content)):
        yield content, key
        if isinstance(content[key], dict | list):
            yield from list_places(content[key])


def edit_csv(data: st.DataObject, path: Path) -> bytes:
    """Return the file with a changed or missing cell, or with a row repeated, missing or swapped with another."""
    rows = list(csv.reader(io.StringIO(path.read_text())))
    row = data.draw(st.integers(0, len(rows) - 1))
    column = data.draw(st.integers(0, len(rows[row]) - 1))
    way = data.draw(st.sampled_from(["cell", "cell", "shorter", "longer", "twice", "gone", "swap"]))
    if way == "cell":
        junk = ["", "-1", "0", "3", "nan", "inf", "1e9", "9" * 30, "x", "\x1b[2J", "1_0", " 4", "a" * 200_000]
        rows[row][column] = data.draw(st.sampled_from(junk))
    elif way == "shorter":
        del rows[row][column]
    elif way == "longer":
        rows[row].append("1")
    elif way == "twice":
        rows.insert(row, rows[row])
    elif way == "gone":
        del rows[row]
    else:
        other = data.draw(st.integers(0, len(rows) - 1))
        rows[row], rows[other] = rows[other], rows[row]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


@contextlib.contextmanager
def kept(path: Path):
    """Put the file ``path`` back at the end of the block."""
    content = path.read_bytes()
    try:
        yield
    finally:
        if path.is_dir():
            path.rmdir()
        path.write_bytes(content)


def fuzz(examples: int):
    """Return a decorator that runs a test on ``examples`` examples, the same ones each time."""

    def decorate(test: Callable) -> Callable:
        checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
        limits = settings(
            max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=checks
        )
        return limits(given(data=st.data())(test))

    return decorate


def is_one_line(message: str) -> bool:
    return bool(message.strip()) and message.isprintable()


NAME = "base_model.model.layer.proj.lora_B.weight"


def zero_one(tensors: dict, name: str = NAME) -> dict:
    return {**tensors, name: torch.zeros_like(tensors[name])}


def leave_one_out(tensors: dict, name: str = NAME) -> dict:
    return {other: tensor for other, tensor in tensors.items() if other != name}


def spoil_one(tensors: dict, name: str = NAME) -> dict:
    return {**tensors, name: tensors[name] * float("nan")}


def round_one(tensors: dict, name: str = NAME) -> dict:
    return {**tensors, name: tensors[name].bfloat16()}
