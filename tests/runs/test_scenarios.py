"""Settings that users combine with layer selection, in real runs of Axolotl; on one process unless it matters."""

import json
import re
import shutil

import pytest
import torch
from helpers.launched import KILLED, MadeOnce, difference, load_with_stock_peft, scores
from helpers.places import SCORING, sets_of_engines
from helpers.settings import PACKED_QLORA, checkpoint_layers, engine_settings, l1ra, selection
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from axolotl_layersel.training.lock import FILE

SHARDED_BY = "zero3"  # in `make test`


@pytest.fixture(scope="module")
def computed(train):
    """A run on one process that computes its plan, with a tracker."""
    return train(use_tensorboard=True)


def test_a_run_that_is_given_a_plan_ends_as_the_run_that_computed_it(train, computed):
    plan = computed.folder / "layersel" / "plan.json"
    given = train(**selection(plan=str(plan)))
    assert "nothing is scored" in given.log
    assert difference(given.adapter(), computed.adapter()) == 0
    assert given.losses() == computed.losses()
    assert given.plan == computed.plan


def test_the_trackers_see_one_run_with_the_plan_at_its_start(computed):
    (events,) = computed.folder.rglob("events.out.tfevents.*")
    log = EventAccumulator(str(events)).Reload()
    assert [event.step for event in log.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    (table,) = log.Tensors("layersel/plan/text_summary")
    rows = [line.strip("| ").split(" | ") for line in table.tensor_proto.string_val[0].decode().splitlines()[2:]]
    assert table.step == 0
    assert [float(row[1]) for row in rows] == pytest.approx(scores(computed.plan), rel=1e-3)
    assert [int(row[0]) for row in rows if row[-1] == "yes"] == computed.selected
    (picture,) = log.Images("layersel/picture")
    assert picture.encoded_image_string.startswith(b"\x89PNG")
    assert not [tag for tag in log.Tags()["scalars"] if "layersel" in tag]
    drawn = {path.name for path in (computed.folder / "layersel").iterdir()}
    assert drawn == {"plan.json", "scores.png", "scores.svg"}
    assert "layersel/score/" not in computed.log


def test_packed_and_unpacked_runs_score_the_same(computed, make_plan):
    packed = make_plan(sample_packing=True, pad_to_sequence_len=True, micro_batch_size=1, sequence_len=512)
    assert packed["calibration_rows"] == computed.plan["calibration_rows"]
    assert scores(packed) == pytest.approx(scores(computed.plan), abs=1e-6)
    assert packed["modules"] == computed.plan["modules"]


@pytest.fixture(scope="module")
def plans(make_plan) -> dict[str, dict]:
    """The plans of one process by each method, and by ``cka`` for branches of layers."""
    blocks = {**{method: selection(method) for method in SCORING}, "group": selection("cka", granularity="group")}
    return MadeOnce(lambda case: make_plan(**blocks[case]))


# An engine whose processes hold all weights, one whose processes hold parts, and one whose first process holds all.
# On fsdp2-sharded all processes hold them until the engine is built, as on DDP, and its own runs test cka.
SCORED_ON = ["ddp", "zero3", "fsdp2-full"]


@pytest.mark.parametrize("method", [method for method in SCORING if method != "cka"])  # its own runs test it
@pytest.mark.parametrize("engine", SCORED_ON)
def test_every_score_is_the_same_on_one_process_and_on_sharded_weights(make_plan, plans, method, engine):
    alone, together = plans[method], make_plan(engine, **selection(method))
    assert scores(together) == pytest.approx(scores(alone), rel=1e-5)
    assert together["modules"] == alone["modules"]
    assert len(set(scores(alone))) == 8


@pytest.mark.parametrize("engine", SCORED_ON)
def test_branches_score_the_same_on_one_process_and_on_sharded_weights(make_plan, plans, engine):
    alone, together = plans["group"], make_plan(engine, **selection("cka", granularity="group"))
    assert together["module_scores"] == pytest.approx(alone["module_scores"], rel=1e-5)
    assert together["modules"] == alone["modules"]
    assert len(set(alone["module_scores"].values())) == 16


@pytest.mark.nightly
def test_qlora_with_packing_accumulation_and_a_regex_trains_and_loads(train, base_model, tmp_path):
    run = train(
        **PACKED_QLORA,
        sequence_len=512,
        val_set_size=0.1,
        eval_sample_packing=False,
        eval_steps=2,
        load_best_model_at_end=True,
        max_steps=4,
        num_epochs=4,
        lora_target_modules=r"model\.layers\.[\d]+\.(self_attn\.(q|v)_proj|mlp\.up_proj)",
    )
    assert len(run.selected) == 4
    assert run.target() == (["q_proj", "up_proj", "v_proj"], run.selected, ["layers"])
    assert {name.rpartition(".")[2] for name in run.plan["modules"]} == {"q_proj", "v_proj", "up_proj"}
    best = json.loads((run.folder / "checkpoint-4" / "trainer_state.json").read_text())["best_model_checkpoint"]
    assert difference(run.adapter(), run.adapter(best.rpartition("/")[2])) == 0
    logits = load_with_stock_peft(base_model, [run.folder], tmp_path)[str(run.folder)]
    assert logits.isfinite().all()


@pytest.mark.parametrize("engines", sets_of_engines(SHARDED_BY))
def test_truncated_checkpointed_runs_train_alike_on_every_engine(train, engines):
    # Only the highest layers: the backward pass ends at layer 4. Reentrant, because ZeRO-3 fails with the other kind in
    # this stack, without any plugin.
    settings = {
        **selection("last"),
        **checkpoint_layers("reentrant"),
        "max_steps": 4,
        "save_steps": 4,
    }
    runs = {engine: train(engine, **settings) for engine in engines if engine != "fsdp2-full"}
    alone = runs["single"]
    assert alone.selected == [4, 5, 6, 7]
    for engine, run in runs.items():
        assert run.engine["engine"] == engine.split("-")[0]
        assert run.losses() == pytest.approx(alone.losses(), abs=2e-5), engine
        assert difference(run.adapter(), alone.adapter()) <= 1e-3, engine


@pytest.mark.nightly
def test_fsdp2s_own_checkpointing_is_the_one_of_transformers(train, tmp_path):
    """FSDP2's own checkpointing would change the names in the adapter."""
    engine = "fsdp2-sharded"
    config = engine_settings(engine, tmp_path)[0]["fsdp_config"]
    block = {**selection()["layersel"], **l1ra(update_ratio=0.25, last_update_ratio=0.8)["layersel"]}
    settings = {"layersel": block, "max_steps": 4}
    usual = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    expected = train(engine, **settings, **usual)
    run = train(engine, **settings, fsdp_config={**config, "activation_checkpointing": True})
    assert run.engine == expected.engine
    # The stack of layers and each layer, because layer 0 trains.
    assert (run.engine["engine"], run.engine["processes"], run.engine["checkpointed"]) == ("fsdp2", 2, 9)
    assert run.ranks() == expected.ranks()
    assert len({tuple(ranks.values()) for ranks in run.ranks().values()}) > 2, "ranks moved more than once"
    assert run.losses() == expected.losses()
    for place in (".", "checkpoint-4"):
        assert difference(run.adapter(place), expected.adapter(place)) == 0
    assert "fsdp_config.activation_checkpointing is done by gradient_checkpointing" in run.log


@pytest.mark.nightly
def test_layers_that_lose_their_lora_get_back_what_pissa_and_olora_took_from_them(train, base_model, tmp_path):
    kept, runs = selection("explicit", layers=[2, 5]), {}
    for engine, method in (
        ("single", "pissa"),
        ("single", "olora"),
        ("fsdp2-sharded", "pissa"),
        ("fsdp2-sharded", "olora"),
    ):
        run = runs[engine, method] = train(engine, **kept, peft_init_lora_weights=method)
        assert run.engine["engine"] == engine.split("-")[0]
        assert {int(name.split(".layers.")[1][0]) for name in run.adapter()} == {2, 5}
        assert run.config()["init_lora_weights"] == method
    stock = load_with_stock_peft(base_model, [run.folder for run in runs.values()], tmp_path)
    for case, run in runs.items():
        trained = load_file(run.folder / "logits.safetensors")["logits"]
        assert float((stock[str(run.folder)] - trained).abs().max()) <= 1e-5, case


@pytest.mark.nightly
def test_frozen_layers_stay_as_they_started_on_every_engine_also_after_a_resume(train):
    for engine in ("single", "zero3", "fsdp2-sharded"):
        settings = {**selection(unselected="freeze")}
        killed = train(engine, expect=KILLED, env={"LAYERSEL_TEST_SIGNAL": "KILL:3"}, **settings)
        resumed = train(engine, output=killed.folder, auto_resume_from_checkpoints=True, **settings)
        start = load_file(resumed.folder / "weights_at_0.safetensors")
        end = resumed.adapter()
        assert end.keys() == start.keys()
        assert len(end) == 2 * 3 * 8
        for name, value in end.items():
            if "lora_B" in name:
                trained = int(name.split(".layers.")[1].split(".")[0]) in resumed.selected
                assert torch.equal(value, start[name]) != trained, (engine, name)
        assert resumed.engine["optimized"] == sum(end[name].numel() for name in end) // 2


@pytest.mark.nightly
def test_weights_that_zero3_has_not_gathered_are_never_written(train, base_model, tmp_path):
    """They have size 0, and PEFT would write them."""
    env = {"LAYERSEL_TEST_SIGNAL": "UNGATHERED:3"}
    run = train("zero3", expect=1, env=env, **selection("explicit", layers=[2, 5]), save_total_limit=1)
    assert run.engine["engine"] == "zero3"
    message = "checkpoint-4/adapter_model.safetensors: base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"
    assert run.log.count(f"LayerselError: {run.folder}/{message} has 256 nonzero numbers on the processes, but 0") == 2
    assert not (run.folder / "checkpoint-4" / "adapter_model.safetensors").exists()
    checkpoint = run.folder / "checkpoint-2"
    assert (checkpoint / "trainer_state.json").exists()
    assert load_with_stock_peft(base_model, [checkpoint], tmp_path)[str(checkpoint)].isfinite().all()


def test_a_trained_adapter_is_continued_with_its_other_layers_kept(train, computed):
    trained = train(**selection("explicit", layers=list(range(8))))
    frozen = train(
        lora_model_dir=str(trained.folder),
        **selection("explicit", layers=[2, 5], unselected="freeze"),
    )
    before, after = trained.adapter(), frozen.adapter()
    assert before.keys() == after.keys()
    for name, value in after.items():
        assert torch.equal(value, before[name]) == (int(name.split(".layers.")[1][0]) not in (2, 5)), name
    removed = train(
        lora_model_dir=str(trained.folder),
        **selection("explicit", layers=[2, 5], unselected="remove"),
    )
    assert removed.adapter().keys() == {name for name in before if int(name.split(".layers.")[1][0]) in (2, 5)}
    start = load_file(removed.folder / "weights_at_0.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in start.items())


def test_an_incomplete_checkpoint_is_not_resumed_from(train, computed):
    killed = train(expect=KILLED, env={"LAYERSEL_TEST_SIGNAL": "KILL:5"})
    assert (killed.folder / FILE).exists()
    state = killed.folder / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text()[:200])
    resumed = train(output=killed.folder, auto_resume_from_checkpoints=True)
    assert [(run.folder / FILE).exists() for run in (killed, computed)] == [False, False]
    assert resumed.log.count("checkpoint-4 is incomplete and is not resumed from: trainer_state.json is truncated") == 1
    assert (resumed.folder / "weights_at_2.safetensors").exists()


def test_a_checkpoint_without_the_optimizers_state_is_refused_before_the_model_loads(train, computed, tmp_path):
    checkpoint = tmp_path / "checkpoint-4"
    shutil.copytree(computed.folder / "checkpoint-4", checkpoint)
    (checkpoint / "optimizer.pt").unlink()
    run = train(expect=1, resume_from_checkpoint=str(checkpoint))
    assert f"resume_from_checkpoint: {checkpoint} cannot be resumed from: optimizer.pt is missing" in run.log
    assert "Loading weights" not in run.log


def test_a_run_killed_in_its_first_checkpoint_starts_again(train):
    killed = train(expect=KILLED, env={"LAYERSEL_TEST_SIGNAL": "KILL:3"})
    (killed.folder / "checkpoint-2" / "trainer_state.json").unlink()
    again = train(output=killed.folder, auto_resume_from_checkpoints=True)
    assert "checkpoint-2 is incomplete" in again.log
    assert len(again.losses()) == 6


def test_a_checkpoint_with_the_plan_of_another_run_gives_way_to_the_one_before(train, computed, tmp_path):
    shutil.copytree(computed.folder, tmp_path / "run")
    place = tmp_path / "run" / "checkpoint-6"
    other = json.loads((place / "layersel" / "plan.json").read_text())
    (place / "layersel" / "plan.json").write_text(json.dumps({**other, "seconds": 123.0}))
    resumed = train(output=tmp_path / "run", auto_resume_from_checkpoints=True)
    said = (
        "is not of one step of one run and is not resumed from: layersel/plan.json is not the one that the checkpoint"
    )
    assert resumed.log.count(f"{place} {said}") == 1
    assert (resumed.folder / "weights_at_4.safetensors").exists()
    assert difference(resumed.adapter("checkpoint-6"), computed.adapter("checkpoint-6")) == 0


def test_another_lora_than_the_checkpoints_is_refused_before_the_model_loads(train, computed, tmp_path):
    shutil.copytree(computed.folder, tmp_path / "run")
    resumed = {"output": tmp_path / "run", "expect": 1, "auto_resume_from_checkpoints": True}
    for settings, said in (
        ({"lora_r": 8, "lora_alpha": 16}, "lora_r: 8 and lora_alpha: 16 contradict the checkpoint"),
        (
            {"lora_target_modules": ["q_proj", "v_proj"], "peft_use_rslora": True},
            "lora_target_modules: ['q_proj', 'v_proj'] and peft_use_rslora: True contradict the checkpoint",
        ),
    ):
        run = train(**resumed, **settings)
        messages = set(re.findall(r"LayerselError: (.*)", run.log))
        assert [message for message in messages if said in message], messages
        assert "Loading weights" not in run.log


def test_a_resumed_run_that_asks_for_another_selection_is_refused(train, computed):
    run = train(
        expect=1,
        output=computed.folder,
        resume_from_checkpoint=str(computed.folder / "checkpoint-2"),
        **selection(ratio=0.25),
    )
    assert "layersel.selection.ratio: 0.25 is not the 0.5 that it was made with" in run.log
    assert "Loading weights" not in run.log
