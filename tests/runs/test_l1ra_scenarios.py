"""Settings that users combine with redistributing rank, in real runs of Axolotl."""

import json

import pytest
import torch
from helpers.launched import INTERRUPTED, KILLED, difference, load_merged, load_with_stock_peft
from helpers.settings import deepspeed_config, pressure, selection
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from axolotl_layersel.cli.main import app

SETTINGS = {**pressure(update_ratio=0.2), "max_steps": 10, "save_steps": 2, "save_total_limit": 10}
SCALINGS = {False: 8 / 4, True: 8 / 4**0.5}


def last(history: dict[int, dict[str, int]]) -> dict[str, int]:
    return history[max(history)]


@pytest.fixture(scope="module")
def runs(train):
    """A run on one process with a tracker, and the same with rsLoRA."""
    return {rslora: train(peft_use_rslora=rslora, use_tensorboard=True, **SETTINGS) for rslora in (False, True)}


def test_the_log_says_what_is_in_use_and_how_ranks_ended(runs):
    log = runs[False].log
    assert "l1ra moves rank among 24 modules after 4 of 10 steps, gate_lr 0.4, l1_lambda 0.75 (auto)" in log
    used, room = 14_336, 28_672
    assert f"{used:,} trainable LoRA parameters in use; {room:,} counts the room for rank 8 in every module" in log
    assert "layersel: ranks after l1ra, in all 96 before" in log


def test_the_trackers_see_every_update_and_no_loss_is_lost(runs):
    (events,) = runs[False].folder.rglob("events.out.tfevents.*")
    log = EventAccumulator(str(events)).Reload()
    assert [event.step for event in log.Scalars("train/loss")] == list(range(1, 11))
    history = runs[False].ranks()
    for name in ("total_rank", "pool", "trainable_parameters_in_use", "components_pruned", "components_added"):
        assert [event.step for event in log.Scalars(f"train/layersel/{name}")] == [2, 4, 6, 8]
    queries = [rank for module, rank in history[4].items() if module.endswith("q_proj")]
    assert log.Scalars("train/layersel/rank/q_proj")[1].value == pytest.approx(sum(queries) / len(queries))


@pytest.mark.nightly
def test_both_layouts_of_a_checkpoint_and_of_the_end_load_with_the_same_logits(runs, base_model, tmp_path):
    folders, trained = [], []
    for rslora, run in runs.items():
        for place in (".", "checkpoint-8"):
            for layout in ("ragged", "uniform"):
                target = tmp_path / f"{rslora}-{place.strip('.')}-{layout}"
                arguments = ["export", str(run.folder / place), "--layout", layout, "--output", str(target)]
                result = CliRunner().invoke(app, arguments)
                assert result.exit_code == 0 and "vLLM needs --max-lora-rank 8" in result.output
                folders.append(target)
                trained.append(load_file(run.folder / place / "logits.safetensors")["logits"])
                config = json.loads((target / "adapter_config.json").read_text())
                highest = max((run.ranks(place))[max(run.ranks(place))].values())
                assert config["lora_alpha"] == config["r"] == highest and not config["use_rslora"]
    stock = load_with_stock_peft(base_model, folders, tmp_path)
    for folder, logits in zip(folders, trained):
        assert float((stock[str(folder)] - logits).abs().max()) <= 1e-5, folder.name
    first, second = (load_file(run.folder / "logits.safetensors")["logits"] for run in runs.values())
    assert float((first - second).abs().max()) > 1e-2, "rsLoRA makes a difference"


@pytest.mark.nightly
def test_axolotl_merges_the_result(runs, make_config, zygote, base_model, tmp_path):
    run = runs[True]
    path, _, _ = make_config(output=run.folder, peft_use_rslora=True, **SETTINGS)
    codes = zygote.run("axolotl.cli.merge_lora:do_cli", {"config": str(path)}, 1, path.with_suffix(".log"), {})
    assert codes == [0], (path.parent / "config.log.0").read_text()[-3000:]
    merged = load_merged(run.folder, tmp_path)
    trained = load_file(run.folder / "logits.safetensors")["logits"]
    assert float((merged - trained).abs().max()) <= 1e-4, "merging adds B·A to the weight, which rounds once more"


@pytest.mark.nightly
def test_a_redistributed_adapter_is_continued_with_its_ranks_scaling_and_room(train, runs):
    for rslora, before in runs.items():
        run = train(lora_model_dir=str(before.folder), peft_use_rslora=rslora, **SETTINGS)
        history = run.ranks()
        assert history[0] == last(before.ranks())
        assert sum(history[8].values()) == sum(history[0].values())
        assert max(history[8].values()) <= 8
        start, end = load_file(run.folder / "weights_at_0.safetensors"), before.adapter()
        for name, value in end.items():
            rank = value.shape[0 if "lora_A" in name else 1]
            if "lora_A" in name:
                assert torch.equal(start[name][:rank], value) and start[name].shape[0] == 8
            else:
                torch.testing.assert_close(start[name][:, :rank] * SCALINGS[rslora], value, atol=1e-7, rtol=1e-6)


@pytest.mark.nightly
def test_selection_and_redistribution_go_together(train, base_model, tmp_path):
    blocks = {"layersel": {**selection("last", num_layers=3)["layersel"], **pressure(update_ratio=0.2)["layersel"]}}
    settings = {**SETTINGS, **blocks}
    killed = train("zero3", expect=KILLED, env={"LAYERSEL_TEST_SIGNAL": "KILL:5"}, **settings)
    run = train("zero3", output=killed.folder, auto_resume_from_checkpoints=True, **settings)
    alone = train(**settings)
    assert run.ranks() == alone.ranks()
    assert difference(run.adapter(), alone.adapter()) <= 1e-3
    assert {int(module.split(".")[2]) for module in last(run.ranks())} == {5, 6, 7}
    assert sum(run.ranks()[8].values()) == 9 * 4
    assert {int(name.split(".layers.")[1][0]) for name in run.adapter()} == {5, 6, 7}
    assert run.target() == (["down_proj", "q_proj", "v_proj"], [5, 6, 7], ["layers"])
    stock = load_with_stock_peft(base_model, [run.folder], tmp_path)[str(run.folder)]
    assert float((stock - load_file(run.folder / "logits.safetensors")["logits"]).abs().max()) <= 1e-5


def test_frozen_layers_keep_their_lora_and_take_no_part(train):
    blocks = {"layersel": {**selection("last", num_layers=3, unselected="freeze")["layersel"], **SETTINGS["layersel"]}}
    run = train(**{**SETTINGS, **blocks})
    assert {int(module.split(".")[2]) for module in last(run.ranks())} == {5, 6, 7}
    frozen = [value for name, value in run.adapter().items() if "layers.0." in name and "lora_A" in name]
    assert [value.shape[0] for value in frozen] == [4, 4, 4]


@pytest.mark.parametrize("engine", ["single", "zero3", "fsdp2-full"])
@pytest.mark.nightly
def test_an_interrupted_run_leaves_the_adapter_that_a_checkpoint_of_that_step_holds(train, runs, engine):
    run = train(engine, expect=INTERRUPTED, env={"LAYERSEL_TEST_SIGNAL": "INT:6"}, **SETTINGS)
    assert not (run.folder / "checkpoint-6").exists()
    assert run.pattern() == runs[False].ranks()[6]
    tolerance = 0 if engine == "single" else 1e-3
    assert difference(run.adapter(), runs[False].adapter("checkpoint-6")) <= tolerance


@pytest.mark.nightly
@pytest.mark.parametrize("stage", [2, 3])
def test_optimizer_states_on_the_cpu_change_nothing(train, runs, tmp_path, stage):
    config = deepspeed_config(stage)
    config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    config["zero_force_ds_cpu_optimizer"] = False
    path = tmp_path / "offload.json"
    path.write_text(json.dumps(config))
    run = train(f"zero{stage}", **{**SETTINGS, "deepspeed": str(path)})
    assert run.ranks() == runs[False].ranks()
    assert difference(run.adapter("checkpoint-10"), runs[False].adapter("checkpoint-10")) <= 1e-3
    assert json.loads((run.folder / "ranks.json").read_text())["survivors_changed_by"] == 0


@pytest.mark.nightly
@pytest.mark.parametrize("engine", ["fsdp2-full-offloaded", "fsdp2-sharded-offloaded"])
def test_shards_on_the_cpu_change_nothing(train, runs, engine):
    killed = train(engine, expect=KILLED, env={"LAYERSEL_TEST_SIGNAL": "KILL:5"}, **SETTINGS)
    run = train(engine, output=killed.folder, auto_resume_from_checkpoints=True, **SETTINGS)
    assert run.engine["engine"] == "fsdp2" and run.engine["offloaded"]
    assert run.ranks() == runs[False].ranks()
    assert difference(run.adapter("checkpoint-10"), runs[False].adapter("checkpoint-10")) <= 1e-3
    assert json.loads((run.folder / "ranks.json").read_text())["survivors_changed_by"] == 0


@pytest.mark.nightly
def test_small_parameters_that_zero3_keeps_whole_are_written_too(train, runs, tmp_path):
    config = deepspeed_config(3)
    # The default of 1e5 keeps most LoRA matrices of real models on every process.
    del config["zero_optimization"]["stage3_param_persistence_threshold"]
    path = tmp_path / "persistent.json"
    path.write_text(json.dumps(config))
    run = train("zero3", **{**SETTINGS, "deepspeed": str(path)})
    assert run.ranks() == runs[False].ranks()
    rows = load_file(run.folder / "rows.safetensors")
    assert any(name.endswith("/drawn") for name in rows)
    for name in rows:
        if name.endswith("/drawn"):
            step, module, _ = name.split("/")
            slots = json.loads((run.folder / "ranks.json").read_text())["gates"][f"added {step}"][module]
            assert torch.equal(rows[f"{step}/{module}/lora_A/seen"][slots], rows[name])


@pytest.mark.nightly
@pytest.mark.parametrize("stage", [2, 3])
def test_bf16_weights_and_their_fp32_masters_are_both_written(train, tmp_path, stage):
    """LoRA+ puts A and B into two groups of parameters. The scaling follows the rank, so all of B is written."""
    config = {**deepspeed_config(stage), "bf16": {"enabled": True}}
    path = tmp_path / "bf16.json"
    path.write_text(json.dumps(config))
    block = {"layersel": {**SETTINGS["layersel"], "scaling_exponent": 0.5}}
    run = train(f"zero{stage}", **{**SETTINGS, **block, "deepspeed": str(path), "bf16": True, "loraplus_lr_ratio": 4})
    rows, record = load_file(run.folder / "rows.safetensors"), json.loads((run.folder / "ranks.json").read_text())
    assert record["survivors_changed_by"] == 0
    drawn = [name for name in rows if name.endswith("/drawn")]
    assert drawn
    for name in drawn:
        step, module, _ = name.split("/")
        key, added = f"{step}/{module}", record["gates"][f"added {step}"][module]
        changed = record["gates"][f"changed {step}"][module]
        assert rows[f"{key}/lora_A/seen"].dtype == torch.bfloat16
        assert torch.equal(rows[f"{key}/lora_A/seen"][added], rows[name].bfloat16())
        assert torch.equal(rows[f"{key}/lora_A/master"][[changed.index(slot) for slot in added]], rows[name])


@pytest.mark.nightly
def test_fsdp2_saves_its_fp32_shards_after_an_evaluation_in_bf16(train):
    # Without resharding, whole weights in bf16 remain after an evaluation.
    evaluated = {"eval_steps": 5, "save_steps": 5, "val_set_size": 0.1}
    run = train("fsdp2-sharded", **{**SETTINGS, **evaluated, "bf16": True})
    assert run.engine["engine"] == "fsdp2"
    for checkpoint in ("checkpoint-5", "checkpoint-10"):
        state = load_file(run.folder / checkpoint / "layersel" / "state.safetensors")
        shards = load_file(run.folder / checkpoint / "shards.safetensors")
        assert len(shards) == 2 * 24
        for name, value in shards.items():
            assert value.dtype == torch.float32 and not torch.equal(value, value.bfloat16().float())
            assert state[f"adapter/{name}"].dtype == torch.float32
            assert torch.equal(state[f"adapter/{name}"], value), name
        assert {value.dtype for value in run.adapter(checkpoint).values()} == {torch.float32}


@pytest.mark.nightly
@pytest.mark.parametrize("engine", ["single", "zero2"])
def test_early_stopping_counts_what_came_before_a_resume_and_ends_with_the_best_ranks(train, engine):
    # The first evaluation is the best one, see test_runs; the fourth one after it ends the run.
    settings = {
        **SETTINGS,
        "eval_steps": 1,
        "save_steps": 1,
        "val_set_size": 0.1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,
        "early_stopping_patience": 4,
    }
    whole = train(engine, **settings)
    killed = train(engine, expect=KILLED, env={"LAYERSEL_TEST_SIGNAL": "KILL:4"}, **settings)
    resumed = train(engine, output=killed.folder, auto_resume_from_checkpoints=True, **settings)
    assert (resumed.folder / "weights_at_3.safetensors").exists(), "it did not resume at step 3"
    tolerance = 0 if engine == "single" else 1e-6
    for run in (whole, resumed):
        assert run.engine["engine"] == engine
        assert [(run.folder / f"checkpoint-{step}").exists() for step in (5, 6)] == [True, False]
        assert list(run.ranks()) == [0, 2, 4, 5]
        assert last(run.ranks()) == run.pattern() == run.ranks("checkpoint-1")[0]
        assert difference(run.adapter(), run.adapter("checkpoint-1")) <= 1e-7
        assert difference(run.adapter(), whole.adapter()) <= tolerance
    assert difference(resumed.adapter("checkpoint-5"), whole.adapter("checkpoint-5")) <= tolerance
    before = resumed.digest()
    again = train(engine, output=resumed.folder, auto_resume_from_checkpoints=True, **settings)
    assert "the run has ended at step 5 already; nothing is trained" in again.log
    assert again.digest() == before


@pytest.mark.nightly
def test_a_budget_of_parameters_is_never_exceeded(train):
    run = train(**{**SETTINGS, **pressure(update_ratio=0.2, budget_unit="parameters", max_rank=16)})
    widths = {"q_proj": 64 + 64, "v_proj": 64 + 32, "down_proj": 160 + 64}
    used = {
        step: sum(rank * widths[module.rpartition(".")[2]] for module, rank in ranks.items())
        for step, ranks in run.ranks().items()
    }
    assert all(count <= used[0] for count in used.values())
    assert len({tuple(ranks.values()) for ranks in run.ranks().values()}) > 2


def test_without_reassigning_the_adapter_shrinks(train):
    run = train(**{**SETTINGS, **pressure(update_ratio=0.2, reassign=False)})
    totals = [sum(ranks.values()) for ranks in run.ranks().values()]
    assert totals == sorted(totals, reverse=True) and totals[-1] < totals[0]


@pytest.mark.nightly
def test_qlora_with_packing_and_accumulation_moves_rank(train):
    settings = {
        **pressure(update_ratio=0.25),
        "adapter": "qlora",
        "load_in_4bit": True,
        "sample_packing": True,
        "pad_to_sequence_len": True,
        "sequence_len": 256,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "num_epochs": 8,
        "max_steps": 8,
        "lora_target_modules": None,
        "lora_target_linear": True,
    }
    run = train(**settings)
    assert len(last(run.ranks())) == 8 * 7
    assert len({tuple(ranks.values()) for ranks in run.ranks().values()}) > 1
    state = load_file(run.folder / "checkpoint-8" / "layersel" / "state.safetensors")
    saved = run.adapter("checkpoint-8")
    for index, module in enumerate(last(run.ranks())):
        part = slice(8 * index, 8 * index + 8)
        active, gates = state["gates/active"][part], state["gates/values"][part]
        down, up = (f"base_model.model.{module}.{side}.weight" for side in ("lora_A", "lora_B"))
        assert torch.equal(saved[down], state[f"adapter/{down}"][active])
        expected = (state[f"adapter/{up}"].float() * gates * 2)[:, active]
        torch.testing.assert_close(saved[up].float(), expected, atol=1e-7, rtol=1e-2)


def test_ranks_that_differ_between_processes_stop_the_run(train):
    run = train("ddp", expect=1, env={"LAYERSEL_TEST_SIGNAL": "DRIFT:3"}, **SETTINGS)
    message = "layersel.l1ra: after step 4, processes [1] computed different gates or rank updates than process 0: gate"
    assert message in run.log
    assert run.log.count("of model.layers.0.self_attn.q_proj is 0.") >= 2
    assert (run.folder / "checkpoint-2" / "adapter_model.safetensors").exists()


def test_gates_that_differ_in_the_last_bit_become_those_of_the_first_process(train, runs):
    run = train("ddp", env={"LAYERSEL_TEST_SIGNAL": "BIT:3"}, **SETTINGS)
    assert run.engine["engine"] == "ddp"
    ends = [load_file(run.folder / f"end_{rank}.safetensors") for rank in range(2)]
    assert ends[0] and difference(*ends) == 0
    assert run.ranks() == runs[False].ranks()
    assert difference(run.adapter(), runs[False].adapter()) <= 1e-3


@pytest.mark.nightly
def test_a_gate_that_is_no_number_stops_the_run_at_that_step_and_names_its_module(train, base_model, tmp_path):
    run = train(expect=1, env={"LAYERSEL_TEST_SIGNAL": "NAN:5"}, **SETTINGS)
    assert "layersel.l1ra: a gate of model.layers.0.self_attn.q_proj is NaN or infinite after step 5" in run.log
    checkpoint = run.folder / "checkpoint-4"
    assert load_with_stock_peft(base_model, [checkpoint], tmp_path)[str(checkpoint)].isfinite().all()


def test_a_checkpoint_resumes_only_with_the_settings_and_the_block_that_made_it(train, runs):
    checkpoint = str(runs[False].folder / "checkpoint-4")
    resumed = {"output": runs[False].folder, "resume_from_checkpoint": checkpoint, "expect": 1}
    run = train(**resumed, **{**SETTINGS, **pressure(update_ratio=0.25)})
    assert "layersel.l1ra.update_ratio: 0.25 contradicts the checkpoint" in run.log
    assert "Loading weights" not in run.log
    run = train(**resumed, **{**SETTINGS, **selection("last")})
    assert "is of a run with layersel.l1ra, without which its adapter does not fit" in run.log
    run = train(**resumed, **SETTINGS, lora_r=8, lora_alpha=16)
    assert "lora_r: 8 and lora_alpha: 16 contradict the checkpoint" in run.log
    assert "Loading weights" not in run.log


def test_a_module_whose_lora_something_else_computes_is_named(train):
    run = train(expect=1, env={"LAYERSEL_TEST_SIGNAL": "BYPASS:0"}, **SETTINGS)
    assert "layersel.l1ra: model.layers.0.self_attn.q_proj trains, but no gradient has reached its gates" in run.log
