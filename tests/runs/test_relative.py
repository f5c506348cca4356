"""A run that chooses by ``relative``."""

import pytest
from helpers.settings import selection

SHARDED_BY = "zero3"  # in `make test`


@pytest.mark.parametrize("engine", ["single", "zero3"])
def test_a_run_chooses_by_it(train, engine):
    run = train(engine, **selection("relative", ratio=0.5))
    assert run.engine["engine"] == engine
    scores = {choice["layer"]: choice["score"] for choice in run.plan["layers"]}
    assert run.selected == sorted(sorted(scores, key=scores.get, reverse=True)[:4])
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in run.adapter()} == set(run.selected)
