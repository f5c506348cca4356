import json

import pytest
import torch
from helpers.models import make_lora, make_small_llama, make_trainer
from peft import PeftModel
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.initialisation import RESTORED, SEEDED
from axolotl_layersel.lora.layers import find_layer_stack
from axolotl_layersel.lora.modules import find_lora_modules
from axolotl_layersel.lora.removal import remove_unselected
from axolotl_layersel.lora.run import Run
from axolotl_layersel.lora.writer import AdapterWriter

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    "targets", [["q_proj", "down_proj"], r".*\.(q_proj|down_proj)", "all-linear"], ids=["list", "regex", "all-linear"]
)
def test_stock_peft_rebuilds_exactly_the_layers_that_are_left(tmp_path, targets):
    model = make_lora(make_small_llama(), targets)
    trainer = make_trainer(model, tmp_path)
    stack = find_layer_stack(model)
    remove_unselected(Run.of(trainer), stack, stack.lora_modules[1] + stack.lora_modules[4])
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.1)
    AdapterWriter(Run.of(trainer)).save(tmp_path / "adapter")

    rebuilt = PeftModel.from_pretrained(make_small_llama(), tmp_path / "adapter").eval()
    assert set(find_lora_modules(rebuilt.get_base_model())) == set(find_lora_modules(model.get_base_model()))
    tokens = torch.arange(3, 33)[None]
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(tokens).logits, model.eval()(tokens).logits, atol=1e-6, rtol=1e-6)
    assert not model.get_base_model().model.layers[0].self_attn.q_proj.__class__.__module__.startswith("peft")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == (
        ["down_proj", "q_proj"] if targets != "all-linear" else sorted(ALL_LINEAR)
    )
    assert config["layers_to_transform"] == [1, 4] and config["layers_pattern"] == ["layers"]


def make_small_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=4, n_head=4))


CONV1D = {"targets": ["c_attn", "c_proj"], "fan_in_fan_out": True}


@pytest.mark.parametrize(
    ("make", "settings", "method"),
    [
        *((make_small_llama, {}, method) for method in (*SEEDED, *RESTORED)),
        (make_small_llama, {"use_rslora": True}, "pissa"),
        (make_small_gpt2, CONV1D, "pissa"),
    ],
)
def test_layers_that_lose_their_lora_have_the_base_weights_that_they_had(tmp_path, make, settings, method):
    before = make().state_dict()
    model = make_lora(make(), init_lora_weights=method, **settings)
    trainer = make_trainer(model, tmp_path)
    stack = find_layer_stack(model)
    remove_unselected(Run.of(trainer), stack, stack.lora_modules[1] + stack.lora_modules[3])
    after = model.get_base_model().state_dict()
    removed = {f"{name}.weight" for layer in (0, 2) for name in stack.lora_modules[layer]}
    assert removed <= before.keys() & after.keys()
    for name in removed:
        torch.testing.assert_close(after[name], before[name], atol=1e-7, rtol=1e-6)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) * 0.1
    AdapterWriter(Run.of(trainer)).save(tmp_path / "adapter")
    rebuilt = PeftModel.from_pretrained(make(), tmp_path / "adapter").eval()
    tokens = torch.arange(3, 33)[None]
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(tokens).logits, model.eval()(tokens).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (
            make_small_gpt2,
            {**CONV1D, "init_lora_weights": "olora"},
            "'olora' initialises transformer.h.0.attn.c_attn, a Conv",
        ),
        (
            lambda: make_small_llama().to(torch.bfloat16),
            {"init_lora_weights": "pissa"},
            "base weights in float32.* that of model.layers.0.self_attn.q_proj is bfloat16",
        ),
    ],
)
def test_base_weights_that_cannot_be_what_they_were_are_refused(tmp_path, make, settings, message):
    model = make_lora(make(), **settings)
    trainer = make_trainer(model, tmp_path)
    stack = find_layer_stack(model)
    with pytest.raises(LayerselError, match=message):
        remove_unselected(Run.of(trainer), stack, stack.lora_modules[1])


def test_modules_to_save_are_in_the_file(tmp_path):
    model = make_lora(make_small_llama(), modules_to_save=["lm_head"])
    trainer = make_trainer(model, tmp_path)
    stack = find_layer_stack(model)
    remove_unselected(Run.of(trainer), stack, stack.lora_modules[1])
    torch.nn.init.normal_(model.get_base_model().lm_head.modules_to_save["default"].weight)
    AdapterWriter(Run.of(trainer)).save(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    head = model.get_base_model().lm_head.modules_to_save["default"].weight
    assert torch.equal(saved["base_model.model.lm_head.weight"], head)
    rebuilt = PeftModel.from_pretrained(make_small_llama(), tmp_path / "adapter")
    tokens = torch.arange(3, 33)[None]
    with torch.no_grad():
        torch.testing.assert_close(rebuilt.eval()(tokens).logits, model.eval()(tokens).logits, atol=1e-6, rtol=1e-6)
