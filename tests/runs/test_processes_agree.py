"""Processes that were not started alike: all end with a sentence that names process and key, and none hangs."""

import json

import pytest
from helpers.settings import l1ra, selection
from safetensors.torch import load_file, save_file

MODEL_LOADS = "Loading weights"

UP = "base_model.model.model.layers.2.self_attn.q_proj.lora_B.weight"


STARTED = {
    "ddp": (
        selection(ratio=0.5),
        selection(ratio=0.25),
        "layersel.selection.ratio: 0.25 on process 1, 0.5 on process 0.",
    ),
    "zero1": (
        selection("random"),
        selection("cka"),
        "layersel.selection.method: 'cka' on process 1, 'random' on process 0.",
    ),
    "zero2": (
        l1ra(update_ratio=0.2),
        l1ra(update_ratio=0.25),
        "layersel.l1ra.update_ratio: 0.25 on process 1, 0.2 on process 0.",
    ),
    "zero3": (selection("last"), l1ra(), "layersel.selection: None on process 1, {'method': 'last', 'ratio': None"),
    "fsdp2-full": ({"seed": 7}, {"seed": 8}, "seed: 8 on process 1, 7 on process 0."),
    "fsdp2-sharded": ({"learning_rate": 0.005}, {"learning_rate": 0.01}, "learning_rate: 0.01 on process 1, 0.005 on"),
}


@pytest.mark.parametrize("engine", STARTED)
def test_processes_with_other_settings_end_before_the_model_loads(train, engine):
    settings, elsewhere, message = STARTED[engine]
    run = train(engine, expect=1, elsewhere=elsewhere, **settings)
    assert run.log.count(f"LayerselError: {message}") == 2, run.log[-3000:]
    assert MODEL_LOADS not in run.log


def test_a_process_with_another_engine_ends_all(train):
    run = train("zero2", expect=1, elsewhere={"deepspeed": None})
    assert run.log.count("LayerselError: deepspeed: None on process 1, {'zero_optimization'") == 2, run.log[-3000:]


def test_a_process_with_other_rows_ends_all(train, data, tmp_path):
    lines = data.read_text().splitlines()
    path = tmp_path / "train.jsonl"
    path.write_text("".join(f"{line}\n" for line in [*lines[1:], lines[0]]))
    other = {"datasets": [{"path": str(path), "type": "alpaca", "ds_type": "json"}]}
    run = train("ddp", expect=1, elsewhere=other)
    assert run.log.count("LayerselError: datasets.hash of some rows: '") == 2, run.log[-3000:]
    assert "Starting trainer" not in run.log


@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp2-sharded"])
def test_a_process_with_another_adapter_ends_all(train, plain_runs, engine, tmp_path):
    trained = plain_runs["single"].folder
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / file).write_bytes((trained / file).read_bytes())
    weights = load_file(tmp_path / "adapter_model.safetensors")
    weights[UP][0, 0] += 0.1
    save_file(weights, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {"lora_model_dir": str(trained), **selection("last", unselected="freeze")}
    run = train(engine, expect=1, elsewhere={"lora_model_dir": str(tmp_path)}, **settings)
    assert run.engine["engine"] == engine.partition("-")[0]
    assert run.log.count(f"LayerselError: initial LoRA weights.{UP}: '") == 2, run.log[-3000:]


def test_trainers_that_were_prepared_differently_are_refused_by_rank_and_key(zygote, tmp_path):
    arguments = [{"rank": rank, "folder": str(tmp_path)} for rank in range(2)]
    codes = zygote.run("helpers.agreement:run_process", arguments, 2, tmp_path / "log", {})
    assert codes == [0, 0], (tmp_path / "log.0").read_text()[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["nothing"] is None
    assert first["an argument"].startswith(
        "learning_rate: 0.5 on process 1, 0.01 on process 0. Start all processes from the same"
    )
    assert first["rows"].startswith("datasets.hash of some rows: '")
    assert first["the number of rows"].startswith("datasets.number of rows: 23 on process 1, 24 on process 0. Give all")
    assert first["a weight"].startswith(f"initial LoRA weights.{UP}: '")
    assert first["a base weight"].startswith(f"base weights.{UP.replace('.lora_B', '')}: '")
    assert first["a base weight"].endswith("Scores would mix two models: give all nodes the same base model.")
    assert first["fewer layers"] == (
        "shape of weights.base_model.model.model.layers.5.self_attn.q_proj.weight: None on process 1, '[32, 32]' on "
        "process 0. Give all nodes the same base model and the same adapter."
    )
    assert first["more layers"].startswith("shape of weights.base_model.model.model.layers.6.self_attn.q_proj.weight: ")
    assert (
        first["a package"]
        == "version of peft: '9.9' on process 1, '0.20.0' on process 0. Install the same versions on all nodes."
    )
