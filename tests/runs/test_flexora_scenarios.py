"""Settings that users combine with a search for layers, in real runs of Axolotl."""

import json

import pytest
from helpers.launched import KILLED, difference, load_with_stock_peft
from helpers.settings import PACKED_QLORA, checkpoint_layers, deepspeed_config, preferences, pressure, selection
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from axolotl_layersel.selection.gate_history import GateHistory

PLAN_ONLY = "axolotl_layersel.cli.worker:main"
SEARCH = {"steps": 4, "inner_steps": 2, "val_samples": 13, "gate_lr": 0.05}


def search(**values) -> dict:
    """Return a ``layersel`` block that searches for half of the layers in four steps."""
    granularity = values.pop("granularity", "layer")
    return selection("flexora", ratio=0.5, granularity=granularity, flexora={**SEARCH, **values})


def test_a_search_that_is_killed_leaves_no_plan_and_the_run_starts_it_again(train, tmp_path):
    settings = {**search(), "use_tensorboard": True, "auto_resume_from_checkpoints": True}
    killed = train(output=tmp_path / "run", expect=KILLED, env={"LAYERSEL_TEST_SIGNAL": "SEARCHKILL:3"}, **settings)
    assert not list(killed.folder.rglob("plan.json")) and not list(killed.folder.rglob("gates.csv"))
    again = train(output=tmp_path / "run", **settings)
    assert len(again.selected) == 4 and len(again.losses()) == 6
    assert len(GateHistory.read(again.folder).gates) == 4
    (events,) = again.folder.rglob("events.out.tfevents.*")
    log = EventAccumulator(str(events)).Reload()
    assert [event.step for event in log.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6], "trackers see no search"
    pictures = {path.stem for path in (again.folder / "layersel").glob("*.png")}
    assert pictures == {"gates", "scores"}
    resumed = train(output=tmp_path / "run", **settings, max_steps=8)
    assert "nothing is scored" in resumed.log and resumed.selected == again.selected
    logs = [EventAccumulator(str(path)).Reload() for path in again.folder.rglob("events.out.tfevents.*")]
    assert len(logs) == 2
    assert sum("layersel/plan/text_summary" in log.Tags()["tensors"] for log in logs) == 1, "sent once"


@pytest.mark.nightly
@pytest.mark.parametrize("engine", ["single", "zero3", "fsdp2-sharded", "fsdp2-sharded-offloaded"])
def test_a_search_and_moving_rank_go_together(train, engine, base_model, tmp_path):
    block = {"layersel": {**search()["layersel"], **pressure(update_ratio=0.2)["layersel"]}}
    run = train(engine, **block, max_steps=10, num_epochs=2, save_steps=10)
    assert run.engine["engine"] == engine.split("-")[0]
    ranks = run.ranks()
    assert {int(name.split(".")[2]) for name in ranks[0]} == set(run.selected)
    assert all(sum(ranks[step].values()) == 4 * len(ranks[0]) for step in (0, 2, 4, 6, 8))
    assert len(set(ranks[8].values())) > 1
    stock = load_with_stock_peft(base_model, [run.folder], tmp_path)[str(run.folder)]
    trained = load_file(run.folder / "logits.safetensors")["logits"]
    assert float((stock - trained).abs().max()) <= 1e-5


@pytest.mark.nightly
def test_shards_of_nothing_are_told_apart(train):
    """With LoRA of rank 1 on two processes the second one has empty shards of A."""
    settings = {"lora_r": 1, "lora_alpha": 2, "max_steps": 4, "save_steps": 4}
    alone, together = (train(engine, **search(), **settings) for engine in ("single", "fsdp2-sharded"))
    assert together.selected == alone.selected
    for rank in (0, 1):
        held = json.loads((together.folder / f"optimizer_{rank}.json").read_text())
        assert held["parameters"] == held["different"] == len(together.adapter())
    assert together.losses() == pytest.approx(alone.losses(), abs=2e-5)
    assert difference(together.adapter(), alone.adapter()) <= 5e-5


@pytest.mark.nightly
@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_unrolled_gradients_are_those_of_one_process(train, engine):
    settings = {**search(hypergradient="unrolled"), "max_steps": 2, "save_steps": 2, "learning_rate": 0.02}
    checkpointing = checkpoint_layers("reentrant")
    alone, together = train(**settings), train(engine, **settings, **checkpointing)
    assert together.engine["engine"] == engine
    one, two = (GateHistory.read(run.folder) for run in (alone, together))
    assert two.validation_losses == pytest.approx(one.validation_losses, abs=2e-5)
    assert two.final == pytest.approx(one.final, abs=1e-3)
    assert together.selected == alone.selected


@pytest.mark.nightly
def test_a_packed_4_bit_run_searches_too_and_keeps_what_has_a_gate_above_zero(train):
    run = train(
        **selection("flexora", flexora={**SEARCH, "val_batches": 2}),
        **PACKED_QLORA,
        sequence_len=256,
        gradient_checkpointing=True,
        max_steps=2,
        save_steps=2,
        num_epochs=4,
    )
    history = GateHistory.read(run.folder)
    assert len(history.gates) == 4 and history.validation_losses[3] > 0
    assert len(set(history.final.values())) == 8
    assert run.plan["settings"]["keep"] == "positive"
    assert run.selected == [int(layer) for layer, gate in history.final.items() if gate > 0]
    assert 0 < len(run.selected) < 8


@pytest.mark.nightly
def test_preference_training_searches_too(train, tmp_path):
    run = train(
        **search(val_samples=6, val_batches=2),
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        **preferences(tmp_path),
        max_steps=2,
        save_steps=2,
    )
    assert len(run.selected) == 4 and len(run.plan["calibration_rows"]) == 6
    history = GateHistory.read(run.folder)
    assert history.train_losses[0] == pytest.approx(0.6931, abs=1e-3), "at the start chosen and rejected are even"
    assert len(set(history.final.values())) == 8


@pytest.mark.nightly
@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp2-full"])
def test_choices_with_several_seeds_are_compared(zygote, make_config, engine):
    path, world, output = make_config(engine, **search(granularity="module"))
    log = path.with_suffix(".plan.log")
    codes = zygote.run(PLAN_ONLY, {"config": str(path), "repeat": 2}, world, log, {})
    text = (path.parent / f"{log.name}.0").read_text()
    assert codes == [0] * world, text[-4000:]
    plan = json.loads((output / "layersel" / "plan.json").read_text())
    assert plan["engine"] == engine.split("-")[0]
    assert set(plan["stability"]["selected"]) == {"7", "8"}
    assert 0 <= plan["stability"]["overlap"] <= 1
    assert len(plan["modules"]) == 12 and len(plan["module_scores"]) == 24
    assert "2 seeds agree with a mean overlap (Jaccard) of" in text


@pytest.mark.nightly
def test_a_schedule_of_deepspeeds_own_and_bf16_weights_come_back(train, tmp_path):
    config = deepspeed_config(2)
    keys = ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps")
    config["scheduler"] = {"type": "WarmupDecayLR", "params": dict.fromkeys(keys, "auto")}
    (tmp_path / "deepspeed.json").write_text(json.dumps(config))
    settings = {"deepspeed": str(tmp_path / "deepspeed.json"), "bf16": True, "warmup_steps": 2}
    searched = train("zero2", **search(), **settings)
    plan = str(searched.folder / "layersel" / "plan.json")
    given = train("zero2", **selection("flexora", plan=plan), **settings)
    assert given.engine["engine"] == "zero2"
    assert given.losses() == searched.losses()
    assert difference(given.adapter(), searched.adapter()) == 0
