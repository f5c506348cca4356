"""Who reads an adapter: the rules for other programs, on adapters that PEFT and this package have written."""

import dataclasses

import pytest
from helpers.models import make_gpt2, make_lora, make_small_llama

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.lora.export import export_adapter
from axolotl_layersel.lora.readers import (
    DOWN,
    PREFIX,
    find_readers,
    find_vllm_rank,
    list_partial_types,
    loads_uniform_in_sglang,
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
    assert not readers.misscaling and not readers.dropping and not readers.export_helps


def test_several_ranks_are_misscaled_where_one_alpha_is_read_and_the_export_is_not(tmp_path):
    readers = find_readers(save(tmp_path / "a", rank_pattern={"q_proj": 2}), LAYERS)
    assert readers.right == ["PEFT", "vLLM 0.32 or later"] and readers.has_vllm
    assert readers.misscaling == ["llama.cpp", "TensorRT-LLM"] and readers.export_helps
    export_adapter(tmp_path / "a", "uniform", tmp_path / "b")
    assert find_readers(read_adapter_file(tmp_path / "b"), LAYERS).right == ["PEFT", "vLLM", "llama.cpp"]
    assert find_readers(save(tmp_path / "c", alpha_pattern={"q_proj": 2}), LAYERS).misscaling


def test_types_that_a_layer_lacks_are_left_out_by_those_that_want_whole_types(tmp_path):
    readers = find_readers(save(tmp_path / "a", layers_to_transform=[1, 2]), LAYERS)
    assert readers.dropping == ["TGI", "LoRAX"] and readers.drops_all and len(readers.dropped) == 3
    readers = find_readers(save(tmp_path / "b", r"model\.layers\.(0\.self_attn\.q_proj|\d\.mlp\.up_proj)"), LAYERS)
    assert readers.dropped == ["q_proj"] and not readers.drops_all
    assert find_readers(save(tmp_path / "c"), ()).dropping == [], "without a plan the layers are unknown"
    assert list_partial_types(["model.layers.10.q_proj"], ["model.layers.1", "model.layers.10"]) == ["q_proj"]


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
    ids=str,
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


def test_sglang_needs_q_where_the_layout_uniform_has_k_v_or_up():
    whole = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"]
    assert loads_uniform_in_sglang(whole)
    assert not loads_uniform_in_sglang([*whole, "model.layers.1.self_attn.k_proj"])
    assert not loads_uniform_in_sglang([*whole, "model.layers.1.mlp.up_proj"])


@pytest.mark.parametrize("damaged", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path, damaged):
    save(tmp_path)
    (tmp_path / damaged).write_bytes(b"{")
    with pytest.raises(LayerselError, match=damaged):
        read_adapter_file(tmp_path)
