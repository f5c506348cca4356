"""Files that cannot be honoured: real Axolotl ends with an error code and one sentence that says what to do."""

import json

import pytest
from conftest import selection
from safetensors.torch import load_file, save_file

MODEL_LOADS = "Loading weights"


BEFORE_THE_MODEL = {
    "no block": ({"layersel": None}, "layersel: the plugin is listed but its block is missing or empty"),
    "misspelt block": (
        {"layersel": None, "layersell": {"selection": {"method": "cka"}}},
        "layersell: is not a setting, and the plugin finds no `layersel` block. Rename the key to `layersel`.",
    ),
    "empty block": ({"layersel": {}}, "layersel.selection"),
    "block of another type": ({"layersel": [1]}, "layersel: [1] is not a mapping"),
    "no adapter": ({"adapter": None}, "adapter: None has no LoRA layers to choose from"),
    "relora": ({"relora": True, "jagged_restart_steps": 2}, "relora: True merges and restarts the adapter"),
    "ratio of zero": (selection(ratio=0), "layersel.selection.ratio: 0.0 is outside (0, 1]"),
    "ratio above one": (selection(ratio=1.5), "layersel.selection.ratio: 1.5 is outside (0, 1]"),
    "two sizes": (
        selection(ratio=0.5, num_layers=3),
        "layersel.selection: ratio: 0.5 and num_layers: 3 both say how many layers are kept. Keep one of them.",
    ),
    "no layer": (selection(num_layers=0), "layersel.selection.num_layers: 0 keeps no layer"),
    "explicit without layers": (selection(method="explicit"), "layersel.selection.layers is missing"),
    "repeated layers": (
        selection(method="explicit", layers=[1, 2, 1]),
        "layersel.selection.layers: [1] are listed more than once",
    ),
    "negative layers": (selection(method="explicit", layers=[-1]), "layersel.selection.layers: [-1] are negative"),
    "layers without explicit": (selection(layers=[1]), "layersel.selection.layers: [1] has no effect with method cka"),
    "unknown method": (
        selection(method="ckaa"),
        "layersel.selection.method: 'ckaa' is not known: did you mean 'cka'?",
    ),
    "unknown key": (selection(rato=0.5), "layersel.selection.rato is not a setting: did you mean 'ratio'?"),
    "unknown part": ({"layersel": {"selectoin": {}}}, "layersel.selectoin is not a setting: did you mean 'selection'?"),
    "unknown token": (selection(token="first"), "layersel.selection.token: 'first' is not known"),
    "one sample": (selection(num_samples=1), "layersel.selection.num_samples: 1 is too few"),
    "token without cka": (
        selection(method="cosine", token="mean"),
        "layersel.selection.token: mean has no effect with method cosine. Remove the key.",
    ),
    "samples without scores": (
        selection(method="first", num_samples=7),
        "layersel.selection.num_samples: 7 has no effect with method first. Remove the key.",
    ),
    "FSDP's own checkpointing": (
        {"fsdp_version": 2, "fsdp_config": {"activation_checkpointing": True}},
        "fsdp_config.activation_checkpointing: true would make the saved adapter unreadable for PEFT",
    ),
    "missing plan": (selection(plan="nowhere/plan.json"), "layersel.selection.plan: nowhere/plan.json cannot be read"),
    "contradicting layers_to_transform": (
        {"peft_layers_to_transform": [0, 1], **selection(method="explicit", layers=[1, 3])},
        "peft_layers_to_transform: [0, 1] contradicts layersel.selection.layers: layers [3] would carry no LoRA",
    ),
    "too small layers_to_transform": (
        {"peft_layers_to_transform": [0, 1], **selection(num_layers=3)},
        "peft_layers_to_transform: [0, 1] contradicts layersel.selection.num_layers: 3",
    ),
    "context parallelism": ({"context_parallel_size": 2}, "context_parallel_size: 2 splits layers over devices"),
    "sequence parallelism": ({"sequence_parallel_degree": 2}, "sequence_parallel_degree: 2 splits layers"),
    "tensor parallelism": ({"tensor_parallel_size": 2}, "tensor_parallel_size: 2 splits layers over devices"),
    "first FSDP": (
        {"fsdp_version": 1, "fsdp_config": {"offload_params": False}},
        "fsdp_version: 1 is not supported by the plugin. Set `fsdp_version: 2`.",
    ),
    "expert parameters": ({"lora_target_parameters": ["experts.up"]}, "lora_target_parameters: ['experts.up']"),
    "streaming": ({"streaming": True}, "streaming: True cannot be sampled for layersel.selection.method: 'cka'"),
    "kernels with fisher": (
        {"lora_mlp_kernel": True, **selection(method="fisher")},
        "lora_mlp_kernel: True bypasses the modules whose gradients layersel.selection.method: fisher measures",
    ),
    "continued adapter": (
        {"lora_model_dir": "somewhere"},
        "layersel.selection.unselected: lora_model_dir continues a trained adapter",
    ),
    "continued adapter that is not loaded": (
        {"lora_model_dir": "somewhere", "rl": "dpo", **selection(unselected="freeze")},
        "lora_model_dir: somewhere is not loaded by Axolotl with rl: dpo",
    ),
    "checkpoint of another run": (
        {"resume_from_checkpoint": "elsewhere/checkpoint-4"},
        "resume_from_checkpoint: elsewhere/checkpoint-4 holds no layersel plan",
    ),
}
AFTER_THE_MODEL = {
    "layers out of range": (
        selection(method="explicit", layers=[1, 8]),
        "layersel.selection.layers: [8] are out of range: the model's layers are 0 to 7.",
    ),
    "no stack": ({"lora_target_modules": ["lm_head"]}, "lora_target_modules: no stack of layers that carries LoRA"),
    "few samples": (selection(num_samples=128), "layersel.selection.num_samples: 128 is more than the 64 rows"),
    "empty selection": (selection(ratio=0.1), "layersel.selection.ratio: 0.1 of 8 layers keeps none"),
}


@pytest.mark.parametrize("case", BEFORE_THE_MODEL)
def test_a_file_that_cannot_be_honoured_ends_before_the_model_loads(train, case):
    settings, message = BEFORE_THE_MODEL[case]
    run = train(expect=1, **settings)
    assert message in run.log
    assert MODEL_LOADS not in run.log


@pytest.mark.parametrize("case", AFTER_THE_MODEL)
def test_what_only_the_model_shows_ends_before_training(train, case):
    settings, message = AFTER_THE_MODEL[case]
    run = train(expect=1, **settings)
    assert message in run.log
    assert "Starting trainer" not in run.log
    assert not (run.folder / "layersel").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"schema_version": 1, "lay', "is not valid JSON, truncated or damaged"),
        (json.dumps({"schema_version": 2}), "has schema_version 2, this version of axolotl-layersel reads 1"),
    ],
)
def test_a_damaged_plan_ends_before_the_model_loads(train, tmp_path, content, message):
    (tmp_path / "plan.json").write_text(content)
    run = train(expect=1, **selection(plan=str(tmp_path / "plan.json")))
    assert message in run.log
    assert MODEL_LOADS not in run.log


def test_an_error_of_one_process_ends_all_of_them(train):
    run = train("ddp", expect=1, **selection(num_samples=128))
    assert run.log.count("layersel.selection.num_samples: 128 is more than the 64 rows of the training set") >= 2
    run = train("ddp", expect=1, **selection(plan="nowhere/plan.json"))
    assert run.log.count("LayerselError: layersel.selection.plan: nowhere/plan.json cannot be read") == 2
    assert MODEL_LOADS not in run.log


def test_a_nan_names_its_layer_and_row(train, base_model, tmp_path):
    broken = tmp_path / "base"
    broken.mkdir()
    for file in base_model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    run = train("ddp", expect=1, base_model=str(broken))
    assert "layersel.selection.method: NaN or infinity in layer 2 for training row" in run.log
