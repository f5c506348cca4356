"""Which engine a trainer runs on, and what engines do with tensors on other devices."""

import types

import pytest
import torch
from helpers.models import describe_engine

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.engines import find_engine
from axolotl_layersel.engines.base import move, move_tensor


@pytest.mark.parametrize(
    ("kind", "plugin", "name"),
    [
        ("NO", {}, "single"),
        ("MULTI_GPU", {}, "ddp"),
        ("MULTI_CPU", {}, "ddp"),
        ("DEEPSPEED", {"deepspeed_plugin": types.SimpleNamespace(zero_stage=0)}, "ddp"),
        ("DEEPSPEED", {"deepspeed_plugin": types.SimpleNamespace(zero_stage=3)}, "zero3"),
        ("FSDP", {"fsdp_plugin": types.SimpleNamespace(fsdp_version=2)}, "fsdp2"),
    ],
)
def test_engines_have_one_name_each(kind, plugin, name):
    assert find_engine(describe_engine(kind, plugin)).name == name


@pytest.mark.parametrize(
    ("kind", "plugin"), [("FSDP", {"fsdp_plugin": types.SimpleNamespace(fsdp_version=1)}), ("MEGATRON_LM", {})]
)
def test_other_engines_are_refused(kind, plugin):
    with pytest.raises(LayerselError, match=f"the engine {kind} is not supported. Use one process"):
        find_engine(describe_engine(kind, plugin))


def test_tensors_that_are_where_they_belong_are_not_copied():
    tensor = torch.nn.Parameter(torch.arange(4.0))
    data = tensor.data_ptr()
    with move([tensor], torch.device("cpu")):
        assert tensor.data_ptr() == data
    assert tensor.data_ptr() == data


def test_the_quantisation_state_follows_a_4_bit_weight():
    from bitsandbytes.nn import Params4bit

    weight = Params4bit(torch.randn(64, 64), requires_grad=False).to("cpu")
    assert weight.quant_state.absmax.device.type == "cpu"
    packed = weight.data.clone()
    move_tensor(weight, packed)
    assert weight.data_ptr() == packed.data_ptr()
    assert isinstance(weight, Params4bit)
    assert weight.quant_state.absmax.device == packed.device
