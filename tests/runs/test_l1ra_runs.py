"""Whole runs of Axolotl that redistribute rank, on every engine."""

import json

import pytest
import torch
from helpers.launched import KILLED, MadeOnce, Run, difference, load_with_stock_peft, read_state
from helpers.places import ENGINES, sets_of_engines
from helpers.settings import ACCUMULATED, BEST_IS_FIRST, checkpoint_layers, pressure
from safetensors.torch import load_file

# Updates after steps 2, 4, 6 and 8.
SETTINGS = {
    **pressure(update_ratio=0.2),
    "max_steps": 10,
    "num_epochs": 2,
    **BEST_IS_FIRST,
    # With these rows rank moves at most updates.
    "val_set_size": 0.1,
    "save_total_limit": 10,
    **checkpoint_layers("reentrant"),
}
UPDATES = [2, 4, 6, 8]
MODULES = 8 * 3


@pytest.fixture(scope="module")
def whole_runs(train) -> dict[str, Run]:
    return MadeOnce(lambda engine: train(engine, **SETTINGS))


def read_updates(run: Run) -> dict:
    return json.loads((run.folder / "ranks.json").read_text())


@pytest.mark.parametrize("engine", ENGINES)
def test_rank_moves_and_its_sum_stays(whole_runs, engine):
    run = whole_runs[engine]
    assert run.engine["engine"] == engine.split("-")[0]
    assert run.engine["processes"] == (1 if engine == "single" else 2)
    history = run.ranks()
    assert list(history) == [0, *UPDATES, 10]
    assert set(history[0].values()) == {4}
    for step in UPDATES:
        state = read_state(run, f"checkpoint-{step}")
        assert len(history[step]) == MODULES
        assert sum(history[step].values()) == int(state["gates/active"].sum()) == 4 * MODULES
    assert len({tuple(history[step].values()) for step in UPDATES}) > 2, "ranks moved more than once"
    assert max(history[8].values()) <= 8 and min(history[8].values()) >= 1


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_two_processes_move_rank_as_one_does(whole_runs, engine):
    alone, together = whole_runs["single"], whole_runs[engine]
    assert together.ranks() == alone.ranks()
    assert together.losses() == pytest.approx(alone.losses(), abs=2e-5)
    one, two = (read_state(run, "checkpoint-10") for run in (alone, together))
    assert torch.equal(one["gates/active"], two["gates/active"])
    gates = read_updates(alone)["gates"]
    nearest = min(gate for step in UPDATES for kept in gates[str(step)].values() for gate in kept if gate > 0)
    # A clamped gate is exactly 0, and no other is so close to the threshold that rounding could prune it.
    assert nearest > 1e-3
    assert torch.allclose(one["gates/values"], two["gates/values"], atol=nearest / 10)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_next_forward_computes_with_the_rows_that_an_update_wrote(whole_runs, engine):
    run = whole_runs[engine]
    rows, record = load_file(run.folder / "rows.safetensors"), read_updates(run)
    written = 0
    for step in UPDATES:
        for module, slots in record["gates"][f"changed {step}"].items():
            key, added = f"{step}/{module}", record["gates"][f"added {step}"].get(module, [])
            expected = torch.zeros(len(slots), rows[f"{key}/lora_A/weight"].shape[1])
            if added:
                expected[[slots.index(slot) for slot in added]] = rows[f"{key}/drawn"]
                assert rows[f"{key}/drawn"].abs().max() > 0.01
            assert torch.equal(rows[f"{key}/lora_A/weight"], expected)
            assert torch.equal(rows[f"{key}/lora_A/seen"][slots], expected)
            if engine.startswith("zero"):
                assert torch.equal(rows[f"{key}/lora_A/master"], expected)
                assert not rows[f"{key}/lora_B/master"].any()
            assert not rows[f"{key}/lora_B/weight"].any()
            assert not rows[f"{key}/lora_B/seen"][:, slots].any()
            written += len(slots)
            for side in ("lora_A", "lora_B"):
                assert not rows[f"{key}/{side}/exp_avg"].any() and not rows[f"{key}/{side}/exp_avg_sq"].any()
    assert written > 10
    assert record["survivors_changed_by"] == 0
    # Agreement is checked once, on objects preceded by their sizes; no written file is sent.
    assert set(record["collectives"].values()) == {0 if engine == "single" else 2}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.nightly
def test_with_gates_held_at_one_the_losses_are_those_of_plain_lora(train, plain_runs, engine):
    held = train(engine, **ACCUMULATED, **pressure(gate_lr=0.0, l1_lambda=0, update_ratio=0.25))
    plain = plain_runs[engine]
    assert held.losses() == pytest.approx(plain.losses(), abs=1e-6)
    assert len(set(plain.losses())) == 6
    assert {name: tuple(value.shape) for name, value in held.adapter().items()} == {
        name: tuple(value.shape) for name, value in plain.adapter().items()
    }


@pytest.mark.parametrize("engine", ["zero3", "fsdp2-sharded"])
@pytest.mark.nightly
def test_a_killed_run_resumes_with_its_gates_and_their_pressure(train, whole_runs, engine):
    """test_stopped_runs.py kills runs with other rules and on other engines."""
    killed = train(engine, expect=KILLED, env={"LAYERSEL_TEST_SIGNAL": "KILL:5"}, **SETTINGS)
    resumed = train(engine, output=killed.folder, auto_resume_from_checkpoints=True, **SETTINGS)
    assert (resumed.folder / "weights_at_4.safetensors").exists(), "it did not resume at step 4"
    whole = whole_runs[engine]
    assert resumed.ranks() == whole.ranks()
    assert difference(read_state(whole, "checkpoint-10"), read_state(resumed, "checkpoint-10")) <= 1e-6
    assert difference(whole.adapter(), resumed.adapter()) <= 1e-6


@pytest.mark.nightly
def test_checkpoints_that_axolotl_writes_past_the_trainer_are_complete_too(train, whole_runs):
    """On FSDP2 Axolotl does so if any weight is quantised, such as the unused one here."""
    settings = {**SETTINGS, "load_best_model_at_end": False}
    killed = train("fsdp2-sharded", expect=KILLED, env={"LAYERSEL_TEST_SIGNAL": "KILL:5,QUANTISED:0"}, **settings)
    env = {"LAYERSEL_TEST_SIGNAL": "QUANTISED:0"}
    run = train("fsdp2-sharded", output=killed.folder, env=env, auto_resume_from_checkpoints=True, **settings)
    assert run.engine["engine"] == "fsdp2"
    assert "Saved FSDP2-gathered LoRA adapter" not in run.log
    whole = whole_runs["fsdp2-sharded"]
    for step in UPDATES:
        checkpoint = f"checkpoint-{step}"
        assert run.pattern(place=checkpoint) == whole.ranks()[step]
        assert difference(run.adapter(checkpoint), whole.adapter(checkpoint)) <= 1e-6
        assert difference(read_state(run, checkpoint), read_state(whole, checkpoint)) <= 1e-6


@pytest.mark.parametrize("engine", ENGINES)
def test_the_best_model_comes_back_with_its_gates_and_ranks(whole_runs, engine):
    run = whole_runs[engine]
    history = run.ranks()
    assert history[10] == history[2] != history[8]
    assert difference(run.adapter(), run.adapter("checkpoint-2")) <= 1e-7
    assert run.pattern() == run.pattern(place="checkpoint-2") == history[2]


@pytest.mark.parametrize("engines", sets_of_engines("fsdp2-sharded"))
def test_stock_peft_computes_what_the_model_in_training_computes(whole_runs, engines, base_model, tmp_path):
    folders = {
        (engine, place): whole_runs[engine].folder / place
        for engine in engines
        for place in (".", "checkpoint-6", "checkpoint-10")
    }
    stock = load_with_stock_peft(base_model, list(folders.values()), tmp_path)
    for where, folder in folders.items():
        trained = load_file(folder / "logits.safetensors")["logits"]
        assert float((stock[str(folder)] - trained).abs().max()) <= 1e-5, where


@pytest.mark.parametrize("engine", ENGINES)
def test_every_adapter_holds_the_ranks_in_use_alone(whole_runs, engine):
    run = whole_runs[engine]
    for place in (".", *(f"checkpoint-{step}" for step in (*UPDATES, 10))):
        config, ranks = run.config(place), run.ranks(place)
        ranks = ranks[max(ranks)]
        assert run.pattern(place=place) == run.pattern("alpha_pattern", place) == ranks
        assert config["r"] == config["lora_alpha"] == max(ranks.values())
        assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"], "in the same order in every run"
        for name, value in run.adapter(place).items():
            module = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
            assert value.shape[0 if "lora_A" in name else 1] == ranks[module]
