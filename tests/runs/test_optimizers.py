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
# Each format of moments, on each engine that stores them differently. Other names of the same
# classes are in tests/unit/engines/test_moments.py.
RUNS = [
    *at_night(("adamw_bnb_8bit", "ddp")),
    ("adamw_bnb_8bit", "zero3"),
    *at_night(("paged_adamw_8bit", "single")),
    *at_night(("paged_adamw_32bit", "zero2")),
    *at_night(("adamw_torch_8bit", "ddp"), ("adamw_torch_8bit", "fsdp2-sharded"), ("ao_adamw_fp8", "fsdp2-sharded")),
]
RESUMED = [
    ("adamw_bnb_8bit", "zero3"),
    *at_night(("adamw_torch_8bit", "ddp"), ("ao_adamw_fp8", "fsdp2-sharded")),
]


@pytest.fixture(scope="module")
def runs(train) -> dict[tuple[str, str], Run]:
    """A run with each optimizer on each engine."""
    return MadeOnce(lambda pair: train(pair[1], optimizer=pair[0], env=ENVIRONMENT, **SETTINGS))


@pytest.mark.parametrize(("optimizer", "engine"), RUNS)
def test_rank_moves_and_the_moments_of_what_moves_alone_are_cleared(runs, optimizer, engine):
    run = runs[optimizer, engine]
    assert run.engine["engine"] == engine.split("-")[0]
    assert run.engine["processes"] == (1 if engine == "single" else 2)
    record = json.loads((run.folder / "ranks.json").read_text())
    assert (record["optimizer"]["class"], record["optimizer"]["kind"]) == CLASSES[optimizer]
    assert bool(record["optimizer"]["coded"]) == (optimizer != "paged_adamw_32bit")

    assert len({tuple(ranks.values()) for ranks in run.ranks().values()}) > 2, "ranks moved more than once"
    assert record["survivors_changed_by"] == 0
    moments = {name: rows for name, rows in load_file(run.folder / "rows.safetensors").items() if "exp_avg" in name}
    # Rows of A and columns of B, for each of two moments.
    changed = sum(len(slots) for key, moved in record["gates"].items() if "changed" in key for slots in moved.values())
    assert sum(len(rows) for rows in moments.values()) == 4 * changed > 100
    assert not any(rows.any() for rows in moments.values())


@pytest.mark.parametrize(("optimizer", "engine"), RUNS)
def test_it_trains_as_with_moments_of_32_bits(runs, optimizer, engine):
    whole = runs["adamw_torch", "single"].losses()
    # 8-bit codes round every moment by about 1 %.
    assert runs[optimizer, engine].losses() == pytest.approx(whole, abs=2e-3)
    assert max(whole) - min(whole) > 0.1


@pytest.mark.parametrize(("optimizer", "engine"), RESUMED)
def test_a_killed_run_that_is_resumed_ends_as_if_it_had_not_been_killed(train, runs, optimizer, engine):
    settings = {**SETTINGS, "optimizer": optimizer}
    killed = train(engine, expect=KILLED, env={**ENVIRONMENT, "LAYERSEL_TEST_SIGNAL": "KILL:5"}, **settings)
    resumed = train(engine, output=killed.folder, env=ENVIRONMENT, auto_resume_from_checkpoints=True, **settings)
    assert (resumed.folder / "weights_at_4.safetensors").exists(), "it did not resume at step 4"
    whole = runs[optimizer, engine]
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
