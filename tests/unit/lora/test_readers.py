"""Who reads an adapter: the rules for other programs, on adapters that PEFT and this package have written."""

import dataclasses
import json

import pytest
from helpers.models import make_gpt2, make_llava, make_lora, make_mixtral, make_small_llama
from typer.testing import CliRunner

from axolotl_layersel.cli.main import For, Layout, app
from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.lora.export import export_adapter
from axolotl_layersel.lora.layouts import LAYOUTS
from axolotl_layersel.lora.names import DOWN, PREFIX
from axolotl_layersel.lora.readers import (
    READERS,
    AdapterFile,
    find_readers,
    find_vllm_rank,
    list_partial_types,
    read_adapter_file,
)

LAYERS = [f"model.layers.{number}" for number in range(6)]


def save(folder, targets=("q_proj", "v_proj", "down_proj"), model=None, **settings):
    make_lora(model or make_small_llama(), targets, **{"task_type": "CAUSAL_LM", **settings}).save_pretrained(folder)
    return read_adapter_file(folder)


def test_one_rank_everywhere_is_read_by_all_and_needs_no_export(tmp_path):
    file = save(tmp_path)
    assert set(file.ranks.values()) == {4} and len(file.ranks) == 18 and file.highest == 4
    assert sum(file.sizes.values()) == 6 * 4 * (32 + 32 + 32 + 16 + 48 + 32)
    readers = find_readers(file, LAYERS)
    assert readers.right == ["PEFT", "vLLM", "llama.cpp"] and readers.has_vllm
    assert not readers.misscaling and not readers.dropping and readers.export_for is None


def test_modules_are_in_the_order_of_their_layers(tmp_path):
    make_lora(make_small_llama(layers=12), ["q_proj", "down_proj"]).save_pretrained(tmp_path)
    layers = [int(name.split(".")[2]) for name in read_adapter_file(tmp_path).ranks]
    assert layers == [layer for layer in range(12) for _ in range(2)]


def test_several_ranks_are_misscaled_where_one_alpha_is_read_and_the_export_is_not(tmp_path):
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 6}}
    readers = find_readers(save(tmp_path / "a", **patterns), LAYERS)
    assert readers.right == ["PEFT", "vLLM 0.32 or later"] and readers.has_vllm
    assert readers.misscaling == ["llama.cpp", "TensorRT-LLM"] and readers.export_for == "llama.cpp"
    export_adapter(tmp_path / "a", "uniform", tmp_path / "b")
    assert find_readers(read_adapter_file(tmp_path / "b"), LAYERS).right == ["PEFT", "vLLM", "llama.cpp"]
    assert find_readers(save(tmp_path / "c", alpha_pattern={"q_proj": 2}), LAYERS).misscaling
    one_scaling = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 4}}
    assert find_readers(save(tmp_path / "d", **one_scaling), LAYERS).right == ["PEFT", "vLLM"]
    one_alpha = find_readers(save(tmp_path / "e", rank_pattern={"q_proj": 2}), LAYERS)
    assert one_alpha.right == ["PEFT", "vLLM 0.32 or later", "llama.cpp"] and not one_alpha.misscaling


def test_types_that_a_layer_lacks_are_left_out_by_those_that_want_whole_types(tmp_path):
    readers = find_readers(save(tmp_path / "a", layers_to_transform=[1, 2]), LAYERS)
    assert readers.dropping == ["TGI", "LoRAX"] and readers.drops_all and len(readers.dropped) == 3
    readers = find_readers(save(tmp_path / "b", r"model\.layers\.(0\.self_attn\.q_proj|\d\.mlp\.up_proj)"), LAYERS)
    assert readers.dropped == ["q_proj"] and not readers.drops_all
    assert find_readers(save(tmp_path / "c"), ()).dropping == [], "without a plan the layers are unknown"
    assert list_partial_types(["model.layers.10.q_proj"], ["model.layers.1", "model.layers.10"]) == ["q_proj"]


def test_no_export_is_offered_that_would_be_refused():
    config = {"r": 4, "lora_alpha": 4, "task_type": "CAUSAL_LM", "target_modules": ["qkv_proj"]}
    ends = {".lora_A.weight": (4, 32), ".lora_B.weight": (96, 4)}
    name = "base_model.model.model.layers.0.self_attn.qkv_proj"
    file = AdapterFile(config, {f"{name}{end}": shape for end, shape in ends.items()}, len(LAYERS))
    readers = find_readers(file, LAYERS)
    assert readers.dropped == ["qkv_proj"] and READERS["tgi"].find_limit(file)
    assert readers.export_for is None


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"task_type": "SEQ_CLS"},
        {"targets": ["embed_tokens", "q_proj"]},
        {"targets": ["lm_head", "q_proj"]},
        {"targets": ["c_attn"], "model": make_gpt2},
    ],
    ids=["DoRA", "modules_to_save", "classifier", "embeddings", "lm_head", "GPT-2"],
)
def test_only_peft_is_claimed_for_what_was_not_tried_elsewhere(tmp_path, settings):
    settings = {**settings, "model": settings["model"]()} if "model" in settings else settings
    assert find_readers(save(tmp_path, **settings), LAYERS).right == ["PEFT"]


def test_vllm_is_not_claimed_for_what_it_refuses(tmp_path):
    file = save(tmp_path)

    def find(**config):
        return find_readers(dataclasses.replace(file, config={**file.config, **config}), LAYERS).right

    for initial in ("pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq"):
        assert find(init_lora_weights=initial) == ["PEFT"], "only PEFT changes the base weights in the same way"
    assert find(init_lora_weights=True) == ["PEFT", "vLLM", "llama.cpp"]
    assert find(use_rslora=True) == ["PEFT"]
    down = f"{PREFIX}{next(iter(file.ranks))}{DOWN}"
    high = dataclasses.replace(file, shapes={**file.shapes, down: (513, 32)})
    assert high.highest == 513 and "vLLM" not in find_readers(high, LAYERS).right and find_vllm_rank(512) == 512


@pytest.mark.parametrize("damaged", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path, damaged):
    save(tmp_path)
    (tmp_path / damaged).write_bytes(b"{")
    with pytest.raises(LayerselError, match=damaged):
        read_adapter_file(tmp_path)


def test_the_command_knows_every_reader_and_every_layout():
    assert [entry.value for entry in For] == list(READERS)
    assert [entry.value for entry in Layout] == list(LAYOUTS)


def export(folder, reader, *more) -> str:
    """Return the one sentence with which an export is refused."""
    arguments = ["export", str(folder), "--for", reader, "--output", str(folder.parent / "out"), *more]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), repr(result.exception)
    (line,) = result.output.splitlines()
    assert not (folder.parent / "out").exists()
    return line


@pytest.mark.parametrize(
    ("settings", "has"),
    [
        ({"use_dora": True}, "DoRA's magnitudes"),
        ({"modules_to_save": ["lm_head"]}, "weights that were trained whole (lm_head.weight)"),
        ({"bias": "lora_only"}, "trained biases (bias: lora_only)"),
        ({"targets": ["embed_tokens", "q_proj"]}, "LoRA on embeddings (model.embed_tokens)"),
        ({"init_lora_weights": "pissa"}, "base weights that init_lora_weights: pissa changed"),
        (
            {"targets": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"], "model": make_mixtral},
            "LoRA on experts (mlp.experts.down_proj)",
        ),
    ],
    ids=["DoRA", "modules_to_save", "bias", "embeddings", "PiSSA", "experts"],
)
def test_what_no_layout_serves_is_one_sentence_for_every_reader(tmp_path, settings, has):
    settings = {**settings, "model": settings["model"]()} if "model" in settings else settings
    save(tmp_path / "some", **settings)
    for name, reader in READERS.items():
        line = export(tmp_path / "some", name)
        limit = " reads it without an export." if name == "peft" else f", which {reader.title} does not read. Merge "
        assert has in line and limit in line


@pytest.mark.parametrize(
    ("targets", "make", "name"),
    [
        (["q_proj"], make_llava, "model.language_model.layers.0.self_attn.q_proj"),
        (["fc1"], make_llava, "model.vision_tower.encoder.layers.0.mlp.fc1"),
        (["c_attn"], make_gpt2, "transformer.h.0.attn.c_attn"),
        (["lm_head", "q_proj"], make_small_llama, "lm_head"),
    ],
)
def test_names_with_which_a_reader_was_not_tried_are_refused_by_name(tmp_path, targets, make, name):
    save(tmp_path / "some", targets, make())
    assert f"has LoRA on {name}, with which llama.cpp was not tried. Merge" in export(tmp_path / "some", "llama.cpp")


def test_types_of_modules_are_told_apart_where_a_reader_lists_them(tmp_path):
    file = save(tmp_path / "some")
    renamed = {name.replace("q_proj", "qkv"): shape for name, shape in file.shapes.items()}
    other = dataclasses.replace(file, shapes=renamed)
    limits = {name for name, reader in READERS.items() if reader.find_limit(other)}
    assert limits == {"sglang", "tensorrt-llm", "tgi", "lorax"}


def test_a_rank_above_those_of_vllm_is_refused(tmp_path):
    save(tmp_path / "some", r=513)
    assert "has rank 513 (the highest is 512), which vLLM 0.32 or later does not read." in export(
        tmp_path / "some", "vllm"
    )


def test_either_a_reader_or_a_layout_is_asked_for(tmp_path):
    save(tmp_path / "some")
    sentence = "--for and --layout exclude each other, and one of them is needed. --for chooses the layout."
    assert export(tmp_path / "some", "vllm", "--layout", "full") == f"axolotl-layersel: {sentence}"
    result = CliRunner().invoke(app, ["export", str(tmp_path / "some")])
    assert result.exit_code == 1 and sentence in result.output


@pytest.mark.parametrize(
    ("reader", "folder", "start"),
    [
        ("vllm", "vllm-some", "vllm serve BASE_MODEL --enable-lora --max-lora-rank 8 --lora-modules some={}"),
        ("vllm<0.32", "vllm-before-0.32-some", "vllm serve BASE_MODEL --enable-lora --max-lora-rank 8 --lora-modules"),
        ("peft", "peft-some", 'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("BASE_MODEL"), "{}")'),
        ("tensorrt-llm", "tensorrt-llm-some", 'LLM("BASE_MODEL", lora_config=LoraConfig(lora_dir=["{}"], max_lora_'),
        ("mlx", "mlx-some", "mlx_lm.generate --model BASE_MODEL --adapter-path {} --prompt PROMPT"),
    ],
)
def test_an_export_says_how_to_start_its_reader(tmp_path, reader, folder, start):
    save(tmp_path / "some", rank_pattern={"q_proj": 2})
    result = CliRunner().invoke(app, ["export", str(tmp_path / "some"), "--for", reader])
    assert result.exit_code == 0, result.output
    assert f"Start it: {start.format(tmp_path / folder)}" in result.output
    record = json.loads((tmp_path / folder / "layersel_export.json").read_text())
    assert (record["source"], record["for"]) == ("../some", reader)


def test_an_export_for_kernels_says_on_how_many_gpus_it_is_right(tmp_path):
    save(tmp_path / "some", layers_to_transform=[1], r=33)
    make_small_llama().config.save_pretrained(tmp_path / "base")
    arguments = ["export", str(tmp_path / "some"), "--for", "tgi", "--base-model", str(tmp_path / "base")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "in the layout full, highest rank 48" in result.output and "right on up to 6 GPUs" in result.output


def test_an_export_for_another_reader_leaves_no_file_of_the_earlier_one(tmp_path):
    save(tmp_path / "some")
    output = tmp_path / "out"
    held = {}
    for reader in ("vllm", "mlx", "vllm"):
        arguments = ["export", str(tmp_path / "some"), "--for", reader, "--output", str(output)]
        assert CliRunner().invoke(app, arguments).exit_code == 0
        held[reader] = {path.name for path in output.iterdir()}
    record = {"adapter_config.json", "layersel_export.json"}
    assert held == {"vllm": {"adapter_model.safetensors", *record}, "mlx": {"adapters.safetensors", *record}}
