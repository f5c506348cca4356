import time

import pytest
import torch
from helpers.models import make_lora, make_small_llama
from peft import LoraConfig, get_peft_model

from axolotl_layersel.lora.config import name_exactly
from axolotl_layersel.lora.modules import find_lora_modules, get_config

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Tower(torch.nn.Module):
    """Two stacks of layers with modules of the same names, and a module that is named as one inside another."""

    def __init__(self):
        super().__init__()
        for name in ("text", "vision"):
            layers = [
                torch.nn.ModuleDict({"proj": torch.nn.Linear(4, 4), "out": torch.nn.Linear(4, 4)}) for _ in range(3)
            ]
            setattr(self, name, torch.nn.ModuleDict({"layers": torch.nn.ModuleList(layers)}))
        self.head = torch.nn.Linear(4, 4)
        self.inner = torch.nn.ModuleDict({"head": torch.nn.Linear(4, 4)})


@pytest.mark.parametrize(
    ("kept", "target", "layers"),
    [
        (["text.layers.1.proj", "vision.layers.1.proj"], ["proj"], [1]),
        (
            ["text.layers.0.proj", "text.layers.0.out", "vision.layers.0.proj", "vision.layers.0.out"],
            ["out", "proj"],
            [0],
        ),
        (["text.layers.1.proj", "text.layers.2.proj"], ["text.layers.1.proj", "text.layers.2.proj"], None),
        (["text.layers.0.proj", "vision.layers.1.out"], ["text.layers.0.proj", "vision.layers.1.out"], None),
        (["text.layers.1.proj", "inner.head"], ["inner.head", "text.layers.1.proj"], None),
        (["text.layers.1.proj", "head"], r"head|text\.layers\.1\.proj", None),
    ],
)
def test_the_configuration_names_the_modules_that_carry_lora_and_no_other(kept, target, layers):
    model = get_peft_model(Tower(), LoraConfig(target_modules=["proj", "out", "head"]))
    base = model.get_base_model()
    for name in set(find_lora_modules(base)) - set(kept):
        base.set_submodule(name, base.get_submodule(name).base_layer)
    config = model.peft_config["default"]
    name_exactly(config, base)
    assert (config.target_modules, config.layers_to_transform) == (target, layers)
    assert set(find_lora_modules(get_peft_model(Tower(), config).get_base_model())) == set(kept)


def test_naming_the_modules_takes_time_in_proportion_to_their_number():
    size = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    models = [make_lora(make_small_llama(layers, **size), ALL_LINEAR) for layers in (100, 400)]

    def measure(model) -> float:
        times = []
        for _ in range(3):
            started = time.process_time()  # others may share the processor
            name_exactly(get_config(model), model.get_base_model())
            times.append(time.process_time() - started)
        return min(times)

    few, many = map(measure, models)
    assert many / few < 8, "4 would be in proportion, 16 quadratic"
