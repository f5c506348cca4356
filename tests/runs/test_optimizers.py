"""Whole runs of Axolotl that redistribute rank with 8-bit and paged optimizers, on every engine that they work on.

bitsandbytes 0.50.2 runs them on the CPU, where it pages nothing; ``benchmarks/gpu.py`` ran the paged ones on a GPU.
"""

import json

import pytest
from helpers.launched import KILLED, MadeOnce, Run, difference
from helpers.places import at_night
from helpers.settings import l1ra
from safetensors.torch import load_file

# With room for rank 64 the matrices have 2048 to 10240 elements, and moments of 4096 or more are quantised. Updates
# are after steps 2, 4 and 6.
SETTINGS = {
    **l1ra(update_ratio=0.25, last_update_ratio=0.8, move_ratio=0.2, max_rank=64),
    "max_steps": 8,
    "lora_r": 32,
    "lora_alpha": 64,
}
# Without compiling torchao's step, which takes a minute on the CPU and computes the same.
ENVIRONMENT = {"TORCHDYNAMO_DISABLE": "1"}
CLASSES = {
    "adamw_bnb_8bit": ("bitsandbytes.optim.adamw.AdamW", "bits 8"),
    "paged_adamw_8bit": ("bitsandbytes.optim.adamw.AdamW", "bits 8, paged"),
    "paged_adamw_32bit": ("bitsandbytes.optim.adamw.AdamW", "bits 32, paged"),
    "adamw_torch_8bit": ("torchao.optim.adam.AdamW8bit", ""),
    "ao_adamw_fp8": ("torchao.optim.adam.AdamWFp8", ""),
}
# Each format of moments, on each engine that stores them differently, with `scaling_exponent`: with 0.5 an update
# changes all moments of B. Other names of the same classes are in tests/unit/engines/test_moments.py.
RUNS = [
    *at_night(("adamw_bnb_8bit", "ddp", 0.5), ("adamw_bnb_8bit", "zero2", 0.5)),
    ("adamw_bnb_8bit", "zero3", 0.0),
    *at_night(("paged_adamw_8bit", "single", 0.0)),
    *at_night(("paged_adamw_32bit", "zero2", 0.5)),
    *at_night(("adamw_torch_8bit", "ddp", 0.5), ("adamw_torch_8bit", "fsdp2-sharded", 0.0)),
    *at_night(("ao_adamw_fp8", "fsdp2-sharded", 0.5)),
]
RESUMED = [
    ("adamw_bnb_8bit", "zero3", 0.0),
    *at_night(("adamw_torch_8bit", "ddp", 0.5), ("ao_adamw_fp8", "fsdp2-sharded", 0.5)),
]


def make_settings(optimizer: str, exponent: float) -> dict:
    block = {**SETTINGS["layersel"], "scaling_exponent": exponent}
    return {**SETTINGS, "layersel": block, "optimizer": optimizer}


@pytest.fixture(scope="module")
def runs(train) -> dict[tuple[str, str, float], Run]:
    """A run with each optimizer on each engine with an exponent."""
    return MadeOnce(lambda case: train(case[1], env=ENVIRONMENT, **make_settings(case[0], case[2])))


@pytest.mark.parametrize(("optimizer", "engine", "exponent"), RUNS)
def test_rank_moves_and_only_the_moments_of_moved_components_are_cleared(runs, optimizer, engine, exponent):
    run = runs[optimizer, engine, exponent]
    assert run.engine["engine"] == engine.split("-")[0]
    assert run.engine["processes"] == (1 if engine == "single" else 2)
    record = json.loads((run.folder / "ranks.json").read_text())
    assert (record["optimizer"]["class"], record["optimizer"]["kind"]) == CLASSES[optimizer]
    assert bool(record["optimizer"]["coded"]) == (optimizer != "paged_adamw_32bit")

    assert len({tuple(ranks.values()) for ranks in run.ranks().values()}) > 2, "ranks moved more than once"
    assert all(bool(count) == bool(exponent) for count in record["rescaled"].values())
    if exponent == 0 or optimizer == "paged_adamw_32bit":
        tolerance = 0.0
    elif engine == "zero2":  # its blocks of codes hold several weights, so each code changes to the nearest one
        tolerance = 1e-4
    else:  # the scale of a block is rounded
        tolerance = 1e-9
    assert record["survivors_changed_by"] <= tolerance
    moments = {name: rows for name, rows in load_file(run.folder / "rows.safetensors").items() if "exp_avg" in name}
    # Rows of A and columns of B, for each of two moments.
    changed = sum(len(slots) for key, moved in record["gates"].items() if "changed" in key for slots in moved.values())
    assert sum(len(rows) for rows in moments.values()) == 4 * changed > 100
    assert not any(rows.any() for rows in moments.values())


@pytest.mark.parametrize(("optimizer", "engine", "exponent"), RUNS)
def test_it_trains_as_with_moments_of_32_bits(runs, optimizer, engine, exponent):
    whole = runs["adamw_torch", "single", exponent].losses()
    # 8-bit codes round every moment by about 1 %.
    assert runs[optimizer, engine, exponent].losses() == pytest.approx(whole, abs=2e-3)
    assert max(whole) - min(whole) > 0.1


@pytest.mark.parametrize(("optimizer", "engine", "exponent"), RESUMED)
def test_a_killed_run_that_is_resumed_ends_as_if_it_had_not_been_killed(train, runs, optimizer, engine, exponent):
    settings = make_settings(optimizer, exponent)
    killed = train(engine, expect=KILLED, env={**ENVIRONMENT, "LAYERSEL_TEST_SIGNAL": "KILL:5"}, **settings)
    resumed = train(engine, output=killed.folder, env=ENVIRONMENT, auto_resume_from_checkpoints=True, **settings)
    assert (resumed.folder / "weights_at_4.safetensors").exists(), "it did not resume at step 4"
    whole = runs[optimizer, engine, exponent]
    tolerance = 0 if engine == "single" else 1e-6
    assert resumed.ranks() == whole.ranks()
    assert difference(whole.adapter(), resumed.adapter()) <= tolerance
    states = [load_file(run.folder / "checkpoint-8" / "layersel" / "state.safetensors") for run in (whole, resumed)]
    assert difference(*({name: value.float() for name, value in state.items()} for state in states)) <= tolerance


@pytest.mark.nightly
@pytest.mark.parametrize("optimizer", ["adamw_torch_8bit", "ao_adamw_fp8"])
def test_torchaos_checkpoints_that_no_run_could_resume_from_are_not_begun(train, optimizer):
    run = train("fsdp2-full", expect=1, optimizer=optimizer, **SETTINGS)
    assert f"fsdp_config.state_dict_type: FULL_STATE_DICT with optimizer: '{optimizer}' writes checkpoints" in run.log
    assert "Loading weights" not in run.log
