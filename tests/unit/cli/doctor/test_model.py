"""The LoRA of a model without weights is that which Axolotl makes of the same YAML file."""

import pytest
from axolotl.loaders.adapter import _build_peft_lora_config
from axolotl.utils.dict import DictDefault
from helpers.examined import make_case
from helpers.models import make_gpt_neox, make_opt, make_phi3, make_small_llama
from helpers.settings import selection
from peft import get_peft_model

from axolotl_layersel.lora.modules import find_lora_modules

KEYS = {
    "linear": {"lora_target_linear": True, "lora_target_modules": None},
    "linear and others": {"lora_target_linear": True, "lora_target_modules": ["embed_tokens"]},
    "names": {"lora_target_modules": ["q_proj", "down_proj"]},
    "an expression": {"lora_target_modules": r".*\.[0-1]\..*q_proj"},
    "some layers": {"lora_target_modules": ["q_proj"], "peft_layers_to_transform": [0, 1]},
    "some left out": {"lora_target_linear": True, "lora_exclude_modules": ["up_proj"], "lora_target_modules": None},
    "ranks": {"lora_target_modules": ["q_proj", "v_proj"], "lora_rank_pattern": {"v_proj": 2}},
}


def compare(base, **keys) -> None:
    case = make_case(base, **selection("last"), **keys)
    config = _build_peft_lora_config(base, DictDefault({**case.data, "lora_dropout": 0.0}))
    real = find_lora_modules(get_peft_model(base, config).get_base_model())
    assert list(case.model.lora_modules) == list(real)
    sizes = {
        name: sum(each.numel() for key, each in module.named_parameters() if "lora_" in key)
        for name, module in real.items()
    }
    assert case.model.sizes == sizes


@pytest.mark.parametrize("keys", KEYS)
def test_modules_and_their_sizes_are_axolotls(keys):
    compare(make_small_llama(3), **KEYS[keys])


@pytest.mark.parametrize("make", [make_gpt_neox, make_opt, make_phi3], ids=lambda make: make.__name__)
def test_linear_modules_of_other_families_are_axolotls(make):
    compare(make(), **KEYS["linear"])
