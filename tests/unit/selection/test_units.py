"""Layers, branches and modules as units."""

import pytest
from helpers.models import (
    make_gpt2,
    make_gpt_neox,
    make_lora,
    make_mixtral,
    make_opt,
    make_phi3,
    make_small_bert,
    make_small_llama,
)

from axolotl_layersel.lora.layers import find_layer_stack
from axolotl_layersel.selection.units import UNITS, find_units

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


BRANCHES = {
    "llama": (make_small_llama, LINEARS, {"self_attn": 4, "mlp": 3}),
    "llama, k alone": (make_small_llama, ["k_proj", "down_proj"], {"self_attn": 1, "mlp": 1}),
    "bert": (make_small_bert, ["query", "value", "dense"], {"attention": 3, "intermediate": 2}),
    "bert, last part alone": (
        make_small_bert,
        r".*layer\.\d+\.(attention\.self\.query|output\.dense)",
        {"attention": 1, "output": 1},
    ),
    "gpt-2": (make_gpt2, ["c_attn", "c_proj", "c_fc"], {"attn": 2, "mlp": 2}),
    "gpt-neox": (
        make_gpt_neox,
        ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
        {"attention": 2, "mlp": 2},
    ),
    "opt": (make_opt, ["q_proj", "out_proj", "fc1", "fc2"], {"self_attn": 2, "fc1": 2}),
    "mixtral": (make_mixtral, ["q_proj", "o_proj"], {"self_attn": 2}),
    "phi-3, whose last module runs first": (
        make_phi3,
        ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
        {"self_attn": 2, "mlp": 2},
    ),
}


@pytest.mark.parametrize("kind", BRANCHES)
def test_a_layer_is_split_where_its_width_comes_back(kind):
    make, targets, expected = BRANCHES[kind]
    stack = find_layer_stack(make_lora(make(), targets))
    units = find_units(stack, "group", [1])
    prefix = f"{stack.paths[1]}."
    assert {unit.name.removeprefix(prefix): len(unit.modules) for unit in units} == expected
    assert all(unit.layer == 1 for unit in units)


@pytest.mark.parametrize("granularity", UNITS)
def test_units_hold_every_module_once_under_names_of_their_own(granularity):
    stack = find_layer_stack(make_lora(make_small_llama(), LINEARS))
    units = find_units(stack, granularity, [0, 2, 5])
    assert [name for unit in units for name in unit.modules] == stack.list_modules([0, 2, 5])
    assert len({unit.name for unit in units}) == len(units)


def test_a_kind_of_unit_that_is_not_known_raises():
    stack = find_layer_stack(make_lora(make_small_llama()))
    with pytest.raises(KeyError, match="block"):
        find_units(stack, "block", [0])
