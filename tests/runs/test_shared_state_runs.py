"""Upper layers that share keys and values with lower ones, in training on every engine."""

import functools
from pathlib import Path

import pytest
from helpers.families import make_family
from helpers.processes import check_same_choices, launch_processes
from helpers.shared_states import CHOICES

SHARDED_BY = "zero3"  # in `make test`


@pytest.fixture(scope="module")
def launch(zygote, tmp_path_factory):
    """Return a function that chooses and trains, once for each engine, and returns the folder."""

    @functools.cache
    def run(family: str, engine: str) -> Path:
        folder = tmp_path_factory.mktemp(f"{family}-{engine}")
        return launch_processes(
            zygote, "helpers.shared_states:run_process", engine, folder, make_family(family), family=family
        )

    return run


@pytest.mark.parametrize(
    ("family", "engine"), [("Gemma3n", "ddp"), ("Gemma3n", "zero3"), ("Gemma4", "zero3"), ("Gemma4", "fsdp2")]
)
def test_every_engine_scores_and_trains_as_one_process_does(family, engine, launch):
    alone, shared = launch(family, "single"), launch(family, engine)
    check_same_choices(alone, shared, engine, CHOICES, make_family(family))
