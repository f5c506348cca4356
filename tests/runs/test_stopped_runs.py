"""Runs that choose layers and their ranks and move rank, stopped in every way and resumed, on every engine."""

import json

import pytest
import torch
from helpers.ending import CLOSING
from helpers.launched import (
    INTERRUPTED,
    KILLED,
    TERMINATED,
    MadeOnce,
    Run,
    difference,
    load_with_stock_peft,
    read_state,
)
from helpers.places import ENGINES, sets_of_engines
from helpers.settings import BEST_IS_FIRST, checkpoint_layers, l1ra, selection
from safetensors.torch import load_file

SHARDED_BY = "zero3"  # in `make test`

# Rank moves after steps 2, 4, 6 and 8 between modules with ranks by gradient, and the scaling of a module follows its
# rank; in test_l1ra_runs.py it stays. Worker processes load data, and checkpointing recomputes layers in the backward
# pass.
SETTINGS = {
    "layersel": {
        **selection("gradient", budget=0.5, max_rank=8)["layersel"],
        **l1ra(update_ratio=0.2, last_update_ratio=0.8, move_ratio=0.2)["layersel"],
        "scaling_exponent": 0.5,
    },
    "max_steps": 10,
    "num_epochs": 2,
    **BEST_IS_FIRST,
    "save_total_limit": 10,
    "dataloader_num_workers": 1,
    **checkpoint_layers("reentrant"),
}
UPDATES = [2, 4, 6, 8]
RESUMING = {"auto_resume_from_checkpoints": True, **SETTINGS}


@pytest.fixture(scope="module")
def whole_runs(train) -> dict[str, Run]:
    return MadeOnce(lambda engine: train(engine, **SETTINGS))


@pytest.fixture(scope="module")
def resumed_runs(train) -> dict[str, Run]:
    """A run on each engine that was killed at step 5, after two updates of rank, and resumed."""

    def make(engine: str) -> Run:
        killed = train(engine, expect=KILLED, env={"LAYERSEL_TEST_SIGNAL": "KILL:5"}, **SETTINGS)
        assert (killed.folder / "checkpoint-4").exists() and not (killed.folder / "checkpoint-6").exists()
        return train(engine, output=killed.folder, **RESUMING)

    return MadeOnce(make)


def check_same_end(whole: Run, other: Run, engine: str) -> None:
    """Check that a stopped and resumed run has the same files as an uninterrupted one."""
    tolerance = 0 if engine == "single" else 1e-6
    assert other.plan["ranks"] == whole.plan["ranks"]
    assert other.ranks() == whole.ranks()
    assert difference(read_state(whole, "checkpoint-10"), read_state(other, "checkpoint-10")) <= tolerance
    assert difference(whole.adapter("checkpoint-10"), other.adapter("checkpoint-10")) <= tolerance
    assert difference(whole.adapter(), other.adapter()) <= tolerance


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_gives_and_moves_rank_as_one_process_does(whole_runs, engine):
    alone, run = whole_runs["single"], whole_runs[engine]
    assert run.engine["engine"] == engine.split("-")[0]
    assert run.plan["ranks"] == alone.plan["ranks"] == run.ranks()[0]
    history = run.ranks()
    assert history == alone.ranks()
    assert list(history) == [0, *UPDATES, 10]
    assert len({tuple(ranks.values()) for ranks in history.values()}) > 2, "ranks moved more than once"
    assert history[10] == history[2], "the best checkpoint is the first one"
    assert run.losses() == pytest.approx(alone.losses(), abs=2e-5)
    assert difference(run.adapter("checkpoint-10"), alone.adapter("checkpoint-10")) < 1e-3


@pytest.mark.parametrize("engine", ENGINES)
def test_an_update_changes_b_and_its_moments_as_the_scaling_changes(whole_runs, engine):
    run = whole_runs[engine]
    assert run.plan["scaling_exponent"] == 0.5
    record = json.loads((run.folder / "ranks.json").read_text())
    assert all(record["rescaled"][str(step)] > 2 for step in UPDATES), "modules with another scaling than before"
    assert record["survivors_changed_by"] == 0


@pytest.mark.nightly
def test_stock_peft_computes_what_the_model_in_training_computes(whole_runs, base_model, tmp_path):
    places = (".", "checkpoint-6", "checkpoint-10")
    folders = [whole_runs[engine].folder / place for engine in ENGINES for place in places]
    stock = load_with_stock_peft(base_model, folders, tmp_path)
    for folder in folders:
        trained = load_file(folder / "logits.safetensors")["logits"]
        assert float((stock[str(folder)] - trained).abs().max()) <= 1e-5, folder


@pytest.mark.parametrize("engine", ENGINES)
def test_the_parameters_never_grow_and_no_gate_leaves_one(whole_runs, engine):
    run = whole_runs[engine]
    history, state = run.ranks(), read_state(run, "checkpoint-10")
    costs = {}
    for name in history[0]:
        matrices = [state[f"adapter/base_model.model.{name}.lora_{side}.weight"] for side in "AB"]
        costs[name] = sum(matrix.numel() for matrix in matrices) // matrices[0].shape[0]
    begun = sum(history[0][name] * cost for name, cost in costs.items())
    assert all(sum(ranks[name] * costs[name] for name in costs) <= begun for ranks in history.values())
    assert torch.equal(state["gates/values"], state["gates/active"])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_killed_run_that_is_resumed_ends_as_if_it_had_not_been_killed(whole_runs, resumed_runs, engine):
    resumed = resumed_runs[engine]
    assert (resumed.folder / "weights_at_4.safetensors").exists(), "it did not resume at step 4"
    check_same_end(whole_runs[engine], resumed, engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_run_keeps_its_plan_and_selects_nothing_again(resumed_runs, engine):
    resumed = resumed_runs[engine]
    assert "nothing is scored" in resumed.log
    assert "checkpoint-4/layersel/plan.json is applied" in resumed.log
    saved = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in resumed.adapter("checkpoint-2")}
    assert set(resumed.plan["modules"]) == saved


@pytest.mark.parametrize("engine", ["single", "zero3", "fsdp2-sharded"])
def test_a_run_that_has_ended_leaves_its_files_as_they_are_when_it_is_started_again(train, resumed_runs, engine):
    ended = resumed_runs[engine]
    before = ended.digest()
    again = train(engine, output=ended.folder, **RESUMING)
    assert again.engine["engine"] == engine.split("-")[0]
    assert "the run has ended at step 10 already; nothing is trained" in again.log
    assert again.digest() == before


# At step 5 only SIGTERM asks for a checkpoint; at step 6 an evaluation is due, which the resumed run makes.
TERMINATIONS = {
    "single": ("TERM:6", 6),
    "ddp": ("TERMALL:5", 5),
    "zero2": ("TERM:6", 6),
    "zero3": ("SAVETERM:4", 4),
    "fsdp2-full": ("TERM:5", 5),
    "fsdp2-sharded": ("TERM:6", 6),
}


@pytest.mark.parametrize("engine", TERMINATIONS)
@pytest.mark.nightly
def test_a_run_that_is_terminated_and_started_again_ends_as_if_it_had_not_been(train, whole_runs, engine):
    signal, step = TERMINATIONS[engine]
    whole = whole_runs[engine]
    ended = train(engine, expect=TERMINATED, env={"LAYERSEL_TEST_SIGNAL": signal}, **SETTINGS)
    assert f"SIGTERM: ended after step {step}; `auto_resume_from_checkpoints: true` goes on from" in ended.log
    assert "Traceback" not in ended.log and CLOSING not in ended.log
    assert not (ended.folder / f"checkpoint-{step + 1}").exists()
    assert not (ended.folder / "adapter_model.safetensors").exists()
    resumed = train(engine, output=ended.folder, **RESUMING)
    assert (resumed.folder / f"weights_at_{step}.safetensors").exists(), f"it did not resume at step {step}"
    check_same_end(whole, resumed, engine)
    assert resumed.log.count(CLOSING) == 1
    tolerance = 0 if engine == "single" else 1e-6
    assert resumed.log_history() == [
        {key: pytest.approx(value, abs=tolerance) for key, value in entry.items()} for entry in whole.log_history()
    ]


@pytest.mark.parametrize("engines", sets_of_engines(SHARDED_BY))
@pytest.mark.nightly
def test_an_interrupted_run_leaves_an_adapter_that_loads(train, whole_runs, engines, base_model, tmp_path):
    env = {"LAYERSEL_TEST_SIGNAL": "INT:3"}
    runs = {engine: train(engine, expect=INTERRUPTED, env=env, **SETTINGS) for engine in engines}
    stock = load_with_stock_peft(base_model, [run.folder for run in runs.values()], tmp_path)
    for engine, run in runs.items():
        adapter = run.adapter()
        assert adapter.keys() == whole_runs[engine].adapter().keys(), engine
        assert CLOSING not in run.log and whole_runs[engine].log.count(CLOSING) == 1, engine
        assert all(value.numel() > 0 for value in adapter.values()), engine
        assert difference(adapter, whole_runs[engine].adapter("checkpoint-2")) > 1e-5, engine
        assert stock[str(run.folder)].isfinite().all()
        assert "interrupted; the adapter as trained so far is in" in run.log
