"""Axolotl's fused LoRA kernels: those for attention, which run on a CPU too."""

import pytest
from helpers.kernels import ON, TARGETS
from helpers.launched import KILLED, difference
from helpers.settings import pressure, selection


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("engine", "block"),
    [
        ("single", selection("fisher")),
        ("zero3", selection("flexora", ratio=0.5, flexora={"steps": 3, "val_samples": 12})),
    ],
    ids=["fisher", "flexora"],
)
def test_a_run_that_chooses_trains_with_the_kernels_as_one_that_is_given_its_plan(train, engine, block):
    settings = {**ON, "lora_target_modules": TARGETS, "max_steps": 3, "save_steps": 3}
    chosen = train(engine, **settings, **block)
    assert chosen.engine["engine"] == engine
    assert chosen.engine["fused_modules"] == 8, "in training every layer's attention is a kernel's"
    method = block["layersel"]["selection"]["method"]
    plan = str(chosen.folder / "layersel" / "plan.json")
    given = train(engine, **settings, **selection(method, plan=plan))
    assert given.engine["fused_modules"] == 8
    assert given.losses() == chosen.losses()
    assert difference(given.adapter(), chosen.adapter()) == 0
    assert all(choice["score"] for choice in chosen.plan["layers"])


# Updates of rank after steps 2, 4, 6 and 8, which the scaling follows.
MOVING = {
    "lora_target_modules": TARGETS,
    "max_steps": 10,
    "num_epochs": 2,
    "save_steps": 4,
    "layersel": {**pressure(update_ratio=0.2)["layersel"], "scaling_exponent": 0.5},
}


@pytest.mark.nightly
@pytest.mark.parametrize("engine", ["single", "zero3", "fsdp2-sharded"])
def test_rank_moves_beside_kernels_as_without_them(train, engine):
    run = train(engine, **ON, **MOVING)
    assert run.engine["engine"] == engine.partition("-")[0]
    assert run.engine["fused_modules"] == 8
    plain = train(engine, **MOVING)
    assert plain.engine["fused_modules"] == 0
    assert run.ranks() == plain.ranks() and len({*map(str, run.ranks().values())}) > 1
    # Both compute in fp32 in a different order, and Adam divides small gradients by their own size.
    assert difference(run.adapter(), plain.adapter()) < 1e-3


@pytest.mark.nightly
def test_a_run_with_kernels_that_was_killed_ends_as_if_it_had_not_been(train):
    whole = train("single", **ON, **MOVING)
    killed = train("single", expect=KILLED, env={"LAYERSEL_TEST_SIGNAL": "KILL:5"}, **ON, **MOVING)
    resumed = train("single", output=killed.folder, auto_resume_from_checkpoints=True, **ON, **MOVING)
    assert resumed.ranks() == whole.ranks()
    assert difference(resumed.adapter(), whole.adapter()) == 0


def test_a_search_finds_the_same_gates_with_kernels_as_without_them(train):
    search = selection("flexora", ratio=0.5, flexora={"steps": 4, "val_samples": 12})
    runs = [train("single", lora_target_modules=TARGETS, max_steps=2, **kernels, **search) for kernels in (ON, {})]
    assert [run.engine["fused_modules"] for run in runs] == [8, 0]
    scores = [[choice["score"] for choice in run.plan["layers"]] for run in runs]
    assert len({*scores[0]}) == 8
    # The first steps of Adam are as large for a rounding error as for any gradient, so gates may differ by more.
    assert max(abs(one - other) for one, other in zip(*scores)) < 1e-4
