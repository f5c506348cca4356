"""Whole runs of Axolotl that a signal stops while layers are chosen."""

import pytest
from helpers.ending import CLOSING
from helpers.launched import Run
from helpers.settings import selection

SHARDED_BY = "zero3"  # in `make test`

SEARCH = {"steps": 6, "inner_steps": 2, "val_samples": 13, "gate_lr": 0.05}
CODES = {"INT": 130, "TERM": 143}


def check_nothing_is_left(run: Run, name: str) -> None:
    (line,) = {line.partition("layersel: ")[2] for line in run.log.splitlines() if "interrupted" in line}
    assert line.startswith(f"SIG{name}: interrupted; no layers are chosen yet, and no plan is written")
    assert "Traceback" not in run.log and CLOSING not in run.log
    assert not (run.folder / "layersel").exists() and not list(run.folder.glob("checkpoint-*"))


# On FSDP2 with full state dicts only the first process scores, and the other waits for it.
@pytest.mark.parametrize(
    ("engine", "method", "name"),
    [
        ("single", "cka", "TERM"),
        ("ddp", "cka", "INT"),
        ("zero3", "fisher", "TERM"),
        ("fsdp2-full", "cosine", "INT"),
    ],
)
def test_a_signal_ends_scoring_with_its_code_and_leaves_nothing(train, engine, method, name):
    env = {"LAYERSEL_TEST_SIGNAL": f"SCORE{name}:1"}
    run = train(engine, expect=CODES[name], env=env, **selection(method))
    assert run.engine["engine"] == engine.split("-")[0]
    check_nothing_is_left(run, name)


@pytest.mark.parametrize(
    ("engine", "name"), [("single", "INT"), ("ddp", "TERM"), ("zero2", "INT"), ("zero3", "TERM"), ("fsdp2-full", "INT")]
)
@pytest.mark.nightly
def test_a_signal_ends_a_search_with_its_code_and_leaves_nothing(train, engine, name):
    env = {"LAYERSEL_TEST_SIGNAL": f"SEARCH{name}:3"}
    run = train(engine, expect=CODES[name], env=env, **selection("flexora", flexora=SEARCH))
    assert run.engine["engine"] == engine.split("-")[0]
    check_nothing_is_left(run, name)
