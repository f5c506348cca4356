"""The work of a model is counted as PyTorch counts it, whatever its weights look like.

``tests/unit/cli/doctor/test_measured.py`` compares whole steps.
"""

import bitsandbytes
import pytest
import torch
from helpers.experts import make_experts
from helpers.models import make_gpt2, make_lora, make_small_llama
from torch.utils.flop_counter import FlopCounterMode

from axolotl_layersel.lora.layers import find_layer_stack
from axolotl_layersel.lora.modules import find_lora_modules, list_parameters
from axolotl_layersel.lora.step_time import count_work

TOKENS, BATCH = 32, 2
MODELS = {
    "Llama": lambda: make_lora(make_small_llama(attn_implementation="eager")),
    "GPT-2": lambda: make_lora(make_gpt2(), ["c_attn", "c_proj"], fan_in_fan_out=True),
    "experts": lambda: make_experts("Mixtral"),
    "a mixture without LoRA on experts": lambda: make_experts("Qwen3Moe", target_parameters=None),
    "experts with biases": lambda: make_experts("GptOss"),
}


def count(model, **options):
    """Return the work of a model and its stack."""
    base, stack = model.get_base_model(), find_layer_stack(model)
    sizes = {
        name: sum(each.numel() for each in list_parameters(base, "default", name)) for name in find_lora_modules(base)
    }
    return count_work(base, stack, sizes, TOKENS, **options)


@pytest.mark.parametrize("name", MODELS)
def test_a_forward_pass_has_the_operations_that_pytorch_counts(name):
    model = MODELS[name]().eval()
    model.get_base_model().config._attn_implementation = "eager"
    model.get_base_model().config._experts_implementation = "eager"
    ids = torch.randint(3, 97, (BATCH, TOKENS))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids)
    work = count(model)
    told = sum(work.frozen) + sum(work.attention) + sum(work.lora) + work.head
    counted = counter.get_total_flops() / (TOKENS * BATCH)
    if "experts" in name and "without" not in name:
        # PEFT multiplies A and B of all experts to one weight; by tokens, they would be as few as is told.
        assert sum(work.frozen) + sum(work.attention) + work.head < counted
        assert 0 < sum(work.lora) < 2 * sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    else:
        assert told == pytest.approx(counted, rel=0.02)


def test_weights_that_are_packed_or_split_count_as_whole():
    model = make_lora(make_small_llama(2))
    whole = count(model)
    for name, module in list(model.named_modules()):
        if name.endswith((".base_layer", "o_proj", "gate_proj", "up_proj", "k_proj")):
            parent, _, child = name.rpartition(".")
            packed = bitsandbytes.nn.Linear4bit(module.in_features, module.out_features, bias=False)
            packed.weight.data = torch.zeros(packed.weight.numel() // 2, 1, dtype=torch.uint8)
            setattr(model.get_submodule(parent), child, packed)
    assert count(model) == whole
    split = make_lora(make_gpt2(), ["c_attn"], fan_in_fan_out=True)
    work = count(split)
    shapes = {id(parameter): parameter.shape for parameter in split.parameters()}
    modules = find_lora_modules(split.get_base_model())
    sizes = {name: 4 * (module.in_features + module.out_features) for name, module in modules.items()}
    for parameter in split.parameters():
        parameter.data = torch.empty(0)
    base, stack = split.get_base_model(), find_layer_stack(split)
    assert count_work(base, stack, sizes, TOKENS, lambda weight: shapes[id(weight)]) == work
