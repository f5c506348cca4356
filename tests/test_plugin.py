"""What the plugin sees of a YAML file before Axolotl has checked it."""

import dataclasses

import hypothesis
import pytest
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.config import AxolotlInputConfig
from hypothesis import example, given
from hypothesis import strategies as st
from peft import LoraConfig
from test_args import VALUES
from transformers import BartConfig, BertConfig, LlamaConfig, T5Config, TrainingArguments

from axolotl_layersel.agreement import ADAPTER_SETTINGS, AGREEING_KEYS, ARGUMENTS
from axolotl_layersel.errors import LayerselError
from axolotl_layersel.plugin import LayerSelectionPlugin
from axolotl_layersel.preflight import loads_encoder_decoder


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
