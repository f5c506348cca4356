"""What the plugin sees of a YAML file before Axolotl has checked it."""

import dataclasses
import logging
import sys

import hypothesis
import pytest
import torch
from axolotl.integrations.base import PluginManager
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.config import AxolotlInputConfig
from helpers.refusals import VALUES
from hypothesis import example, given
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import BartConfig, BertConfig, LlamaConfig, T5Config, TrainingArguments

from axolotl_layersel import __version__
from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.gate_requirements import GPU_KERNELS, LORA_KERNELS, check_kernels
from axolotl_layersel.config.textual import PLUGIN
from axolotl_layersel.plugin import LayerSelectionPlugin
from axolotl_layersel.training.preflight import loads_encoder_decoder
from axolotl_layersel.training.process_agreement import ADAPTER_SETTINGS, AGREEING_KEYS, ARGUMENTS


@hypothesis.settings(max_examples=200, deadline=None)
@given(block=VALUES, key=st.sampled_from([None, "selection", "l1ra", "method"]), kernel=VALUES)
@example(block=[1], key="method", kernel=None)
def test_a_block_of_any_type_is_registered_or_refused_by_its_key(block, key, kernel):
    block = {"selection": {"method": block}} if key == "method" else block if key is None else {key: block}
    try:
        LayerSelectionPlugin().register(DictDefault({"layersel": block, "lora_o_kernel": kernel}))
    except LayerselError as error:
        assert str(error).startswith(("layersel.", "lora_o_kernel: "))


def test_what_ranks_must_agree_in_are_keys_of_axolotl():
    fields = {*AxolotlInputConfig.model_fields}
    fields |= {field.alias for field in AxolotlInputConfig.model_fields.values() if field.alias}
    assert {*AGREEING_KEYS, *ARGUMENTS, *ADAPTER_SETTINGS} - fields == set()
    assert {*ARGUMENTS.values()} - {field.name for field in dataclasses.fields(TrainingArguments)} == set()
    assert {*ADAPTER_SETTINGS.values()} - {field.name for field in dataclasses.fields(LoraConfig)} == set()


@pytest.mark.parametrize(
    ("make", "model_type", "loads"),
    [
        (T5Config, None, True),
        (T5Config, "T5ForConditionalGeneration", True),
        (BartConfig, None, False),
        (BartConfig, "AutoModelForCausalLM", False),
        (BartConfig, "BartForCausalLM", False),
        (BartConfig, "BartForConditionalGeneration", True),
        (LlamaConfig, None, False),
        (BertConfig, "BertForMaskedLM", False),
    ],
)
def test_a_model_with_an_encoder_and_a_decoder_is_known_before_it_loads(tmp_path, make, model_type, loads):
    make().save_pretrained(tmp_path)
    cfg = DictDefault({"base_model": str(tmp_path), "type_of_model": model_type})
    assert loads_encoder_decoder(cfg) is loads


def register(**values) -> DictDefault:
    """Return a YAML file's content after the plugin has seen it."""
    cfg = DictDefault({"adapter": "lora", "layersel": {"selection": {"method": "cka"}}, **values})
    LayerSelectionPlugin().register(cfg)
    return cfg


def test_without_a_gpu_axolotl_does_not_switch_its_kernels_on(caplog, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    caplog.set_level(logging.INFO, "axolotl.layersel")
    assert {register()[key] for key in LORA_KERNELS} == {False}
    assert "there is no GPU, so Axolotl's fused LoRA kernels stay off: lora_mlp_kernel, " in caplog.text
    for chosen in ({"lora_qkv_kernel": True}, {"lora_o_kernel": False}, {"adapter": None}, {"use_ray": True}):
        cfg = register(**chosen)
        assert {key: cfg[key] for key in LORA_KERNELS if cfg[key] is not None} == {
            key: value for key, value in chosen.items() if key in LORA_KERNELS
        }
    assert register(layersel=None)["lora_mlp_kernel"] is None


@pytest.mark.parametrize("key", LORA_KERNELS)
def test_a_kernel_that_needs_a_gpu_is_refused_without_one(key):
    check_kernels({key: False})
    if key not in GPU_KERNELS:
        return check_kernels({key: True})
    with pytest.raises(LayerselError, match=rf"^{key}: True needs a GPU, but this process sees none"):
        check_kernels({key: True})


def test_a_plugin_that_is_loaded_says_so(caplog):
    caplog.set_level(logging.INFO, "axolotl.layersel")
    register(layersel={"selection": {"method": "cka"}, "l1ra": {}})
    assert f"layersel: plugin {__version__} is loaded, and the file asks for selection by cka, l1ra" in caplog.text


@pytest.mark.parametrize("name", ["debug.log", "layersel"])
def test_a_folder_that_axolotl_cannot_log_into_is_refused_before_it_tries(tmp_path, name):
    (tmp_path / "debug.log").mkdir()
    (tmp_path / "layersel").write_text("")
    if name == "debug.log":
        (tmp_path / "layersel").unlink()
    with pytest.raises(LayerselError, match=rf"^output_dir: {tmp_path / name} is a "):
        register(output_dir=str(tmp_path))


def test_a_plugin_that_cannot_be_imported_ends_the_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "axolotl_layersel.plugin", None)
    monkeypatch.setattr(PluginManager.get_instance(), "plugins", {})
    with pytest.raises(RuntimeError, match=r"^plugins: axolotl_layersel.LayerSelectionPlugin cannot be loaded: "):
        PluginManager.get_instance().register(PLUGIN)
