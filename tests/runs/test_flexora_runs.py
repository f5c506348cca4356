"""Whole runs of Axolotl that search with gates first, on every engine."""

import json

import pytest
from helpers.launched import MadeOnce, Run, difference
from helpers.places import ENGINES
from helpers.settings import checkpoint_layers, selection
from safetensors.torch import load_file

from axolotl_layersel.selection.gate_history import GateHistory

# Gates take three steps, the last one on two micro-batches. Reentrant, because ZeRO-3 fails with the other kind.
SEARCH = {"steps": 6, "inner_steps": 2, "val_samples": 13, "val_batches": 2, "gate_lr": 0.05}
SETTINGS = {
    "max_steps": 4,
    "save_steps": 4,
    **checkpoint_layers("reentrant"),
}


@pytest.fixture(scope="module")
def searched(train) -> dict[str, Run]:
    return MadeOnce(lambda engine: train(engine, **selection("flexora", ratio=0.5, flexora=SEARCH), **SETTINGS))


def read_history(run: Run) -> GateHistory:
    return GateHistory.read(run.folder)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_search_chooses_and_the_run_follows(searched, engine):
    run = searched[engine]
    assert run.engine["engine"] == engine.split("-")[0]
    assert run.engine["processes"] == (1 if engine == "single" else 2)
    assert len(run.selected) == 4
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in run.adapter()} == set(run.selected)
    history = read_history(run)
    assert len(history.gates) == 6
    assert [loss is not None for loss in history.validation_losses] == [False, True] * 3
    gates = {choice["layer"]: choice["score"] for choice in run.plan["layers"]}
    assert gates == {int(name): value for name, value in history.final.items()}
    assert min(gates[layer] for layer in run.selected) > max(gates[i] for i in gates if i not in run.selected)
    assert len(run.losses()) == 4


@pytest.mark.parametrize("engine", ENGINES)
def test_gate_steps_touch_no_gradient_of_the_engine(searched, engine):
    run = searched[engine]
    for rank in range(run.engine["processes"]):
        steps = json.loads((run.folder / f"gate_steps_{rank}.json").read_text())
        assert [step["step"] for step in steps] == [2, 4, 6]
        assert all(step["gradients_are_as_before"] for step in steps)
        if engine.startswith("zero"):
            assert steps[-1]["gradients"] > 0, "DeepSpeed's buffers were not found"


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_of_the_searchs_engine_is_left_when_that_of_the_run_is_built(searched, engine):
    run = searched[engine]
    for rank in range(run.engine["processes"]):
        record = json.loads((run.folder / f"released_{rank}.json").read_text())
        kinds = {name.split()[0] for name in record["held"]}
        assert {"exp_avg", "exp_avg_sq"} <= kinds
        if engine.startswith("zero"):
            zero = "DeepSpeedZeroOptimizer_Stage3" if engine == "zero3" else "DeepSpeedZeroOptimizer"
            assert {"DeepSpeedEngine", zero, "master"} <= kinds
        assert record["alive"] == []


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_two_processes_choose_what_one_chooses(searched, engine):
    alone, together = searched["single"], searched[engine]
    assert together.plan["calibration_rows"] == alone.plan["calibration_rows"]
    assert together.selected == alone.selected
    one, two = read_history(alone), read_history(together)
    assert two.train_losses == pytest.approx(one.train_losses, abs=2e-5)
    assert two.final == pytest.approx(one.final, abs=1e-3)
    ordered = sorted(one.final.values())
    # No gate is so close to the boundary that rounding could change the choice.
    assert ordered[4] - ordered[3] > 4e-3


@pytest.mark.parametrize("engine", ["single", "zero3", "fsdp2-sharded"])
def test_the_run_after_a_search_is_that_of_its_plan(train, searched, engine):
    run = searched[engine]
    plan = str(run.folder / "layersel" / "plan.json")
    given = train(engine, **selection("flexora", plan=plan), **SETTINGS)
    assert "nothing is scored" in given.log
    assert given.losses() == run.losses()
    start, again = (load_file(each.folder / "weights_at_0.safetensors") for each in (run, given))
    assert difference(start, again) == 0
    assert difference(run.adapter(), given.adapter()) == 0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.nightly
def test_with_gates_held_at_zero_the_search_is_plain_lora(plain_runs, engine):
    run = plain_runs[engine]
    assert run.engine["engine"] == engine.split("-")[0]
    history = read_history(run)
    assert all(gate == 0 for gates in history.gates for gate in gates)
    assert len(run.losses()) == 6 and len(set(run.losses())) == 6
    assert history.train_losses == pytest.approx(run.losses(), abs=1e-6)
    assert all(loss > 0 for loss in history.validation_losses)
