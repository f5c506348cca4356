"""Paths of the tests, names of engines and methods, and the environment of processes that tests start."""

import os
import sys
from pathlib import Path

import pytest

from axolotl_layersel.config.methods import METHODS

TESTS = Path(__file__).parents[1]


ROOT = TESTS.parent


# Seconds after which a program that a test started counts as hanging. A run takes 10 s, and 100 s on a busy machine;
# gloo would wait for 1,800 s.
HANGS = 900


# zero1 has the class of zero2, and one run in test_runs.py tests it.
ENGINES = ["single", "ddp", "zero2", "zero3", "fsdp2-full", "fsdp2-sharded"]


# A test that is launched on each engine is launched on the first of these that it knows by `make test`, and on the
# others every night. The second is FSDP2's name in tests of a plain Trainer.
SHARDING_ENGINES = ["fsdp2-sharded", "fsdp2", "zero3"]


def sets_of_engines(sharding: str) -> list:
    """Return the parameters of a test that launches several engines: one process and one that shards; at night all."""
    return [
        pytest.param(["single", sharding], id=f"single and {sharding}"),
        pytest.param(ENGINES, id="all engines", marks=pytest.mark.nightly),
    ]


def at_night(*values: object) -> list:
    """Return parameters with which a test runs every night only, in `make test-all`."""
    return [pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.nightly) for v in values]


# The methods that score layers on rows.
SCORING = [name for name, method in METHODS.items() if method.draws_rows]


ENVIRONMENT = {
    # The rows of a data set are made in the process itself: others would be started for it, and import all anew.
    "AXOLOTL_DATASET_NUM_PROC": "0",
    "AXOLOTL_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": f"{TESTS}{os.pathsep}{ROOT}",
    "TOKENIZERS_PARALLELISM": "false",
}


# For a process that must never import this package; torch would import it through its entry point.
WITHOUT_PACKAGE = {**ENVIRONMENT, "PYTHONPATH": "", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


COLLECTED = pytest.StashKey[set[str]]()
