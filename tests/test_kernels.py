"""Axolotl's fused LoRA kernels: those for attention, which run on a CPU too."""

import pytest
import torch
from axolotl.monkeypatch import lora_kernels
from axolotl.utils.dict import DictDefault
from conftest import make_lora, make_small_llama, selection
from test_runs import difference
from transformers.models.llama.modeling_llama import LlamaAttention

from axolotl_layersel.kernels import is_fused, without_fused_lora

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
ON = {"lora_qkv_kernel": True, "lora_o_kernel": True}


@pytest.fixture
def fused(monkeypatch):
    """A model with the kernels for attention on, as Axolotl loads it."""
    forward = LlamaAttention.forward
    monkeypatch.setattr(lora_kernels, "get_attention_cls_from_config", lambda cfg: LlamaAttention)
    lora_kernels.patch_self_attn_lora(DictDefault(ON))
    model = make_lora(make_small_llama(layers=2), TARGETS, task_type="CAUSAL_LM")
    yield lora_kernels.apply_lora_kernel_patches(model, DictDefault(ON))
    LlamaAttention.forward = forward
    del LlamaAttention._original_forward


def count_hook_calls(model) -> int:
    """Return how many LoRA modules one forward pass goes through."""
    calls = []
    downs = [module for name, module in model.named_modules() if name.endswith("lora_A.default")]
    hooks = [down.register_forward_hook(lambda *_: calls.append(1)) for down in downs]
    model(torch.arange(3, 13)[None])
    for hook in hooks:
        hook.remove()
    return len(calls)


def test_hooks_on_lora_run_while_kernels_are_off_and_the_kernels_come_back(fused):
    before = [{name: value for name, value in vars(module).items() if is_fused(value)} for module in fused.modules()]
    assert count_hook_calls(fused) == 0, "if the kernels ran LoRA's modules, nothing would have to be switched off"
    with without_fused_lora(fused):
        assert count_hook_calls(fused) == 2 * len(TARGETS)
    after = [{name: value for name, value in vars(module).items() if is_fused(value)} for module in fused.modules()]
    assert after == before and any(before)
    assert count_hook_calls(fused) == 0


def test_a_model_without_kernels_is_left_alone():
    model = make_lora(make_small_llama(layers=2), TARGETS)
    attributes = [dict(vars(module)) for module in model.modules()]
    with without_fused_lora(model):
        assert [dict(vars(module)) for module in model.modules()] == attributes


@pytest.mark.parametrize(
    ("engine", "block"),
    [
        ("single", selection("fisher")),
        ("zero3", selection("flexora", ratio=0.5, flexora={"steps": 3, "val_samples": 12})),
    ],
    ids=["fisher", "flexora"],
)
def test_a_run_that_chooses_trains_with_the_kernels_as_one_that_is_given_its_plan(train, engine, block):
    settings = {**ON, "lora_target_modules": TARGETS, "max_steps": 3, "save_steps": 3}
    chosen = train(engine, **settings, **block)
    assert chosen.engine["engine"] == engine
    assert chosen.engine["fused_modules"] == 8, "in training every layer's attention is a kernel's"
    method = block["layersel"]["selection"]["method"]
    plan = str(chosen.folder / "layersel" / "plan.json")
    given = train(engine, **settings, **selection(method, plan=plan))
    assert given.engine["fused_modules"] == 8
    assert given.losses() == chosen.losses()
    assert difference(given.adapter(), chosen.adapter()) == 0
    assert all(choice["score"] for choice in chosen.plan["layers"])
