"""Axolotl's fused LoRA kernels: those for attention, which run on a CPU too."""

import contextlib

import pytest
import torch
from axolotl.kernels import lora
from axolotl.monkeypatch import lora_kernels
from axolotl.utils.dict import DictDefault
from helpers.kernels import ON, TARGETS
from helpers.models import make_lora, make_small_llama, make_trainer
from transformers.models.llama.modeling_llama import LlamaAttention

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.gate_requirements import GPU_KERNELS, LORA_KERNELS
from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.config.selection import SelectionConfig
from axolotl_layersel.lora.gates import Gates
from axolotl_layersel.lora.kernels import (
    exchange,
    give_gates_to_kernels,
    is_fused,
    make_kernels_accept_bare_modules,
    without_fused_lora,
)
from axolotl_layersel.lora.modules import find_lora_modules
from axolotl_layersel.lora.resizing import set_scaling
from axolotl_layersel.plugin import LayerSelectionPlugin
from axolotl_layersel.training.prepare import prepare_trainer

MLP = ["gate_proj", "up_proj", "down_proj"]
ALL_ON = {**ON, "lora_mlp_kernel": True}


def compute_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(gate) * up


def differentiate_swiglu(gradient, gate, up):
    """As the kernel does: return what the forward pass returned, and the gradients by ``gate`` and ``up``."""
    with torch.enable_grad():
        gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
        hidden = compute_swiglu(gate, up)
    return hidden.detach(), *torch.autograd.grad(hidden, (gate, up), gradient)


@pytest.fixture
def make_fused(monkeypatch):
    """Makes a model with the kernels on, as Axolotl loads it."""
    forward = LlamaAttention.forward
    monkeypatch.setattr(lora_kernels, "get_attention_cls_from_config", lambda cfg: LlamaAttention)
    # These two alone are written in Triton, which needs a GPU. What is around them runs here as it does there.
    monkeypatch.setattr(lora, "swiglu_forward", compute_swiglu)
    monkeypatch.setattr(lora, "swiglu_backward", differentiate_swiglu)
    lora_kernels.patch_self_attn_lora(DictDefault(ON))

    def make(targets, kernels=ON, **settings):
        model = make_lora(make_small_llama(layers=2), targets, task_type="CAUSAL_LM", **settings)
        return lora_kernels.apply_lora_kernel_patches(model, DictDefault(kernels))

    yield make
    LlamaAttention.forward = forward
    del LlamaAttention._original_forward


@pytest.fixture
def fused(make_fused):
    return make_fused(TARGETS)


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


def attach_gates(model, components: int) -> Gates:
    """Give every LoRA module a gate, none of which is 1, and matrices B that are not 0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    downs = {name: module for name, module in model.named_modules() if name.endswith("lora_A.default")}
    gates = Gates({name: [down] for name, down in downs.items()}, components, torch.device("cpu"))
    gates.values.copy_(torch.rand(len(gates.values), generator=generator) + 0.25)
    gates.attach()
    return gates


def differentiate(model, gates: Gates, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return the loss of a batch, and its gradients by all that is trained and by the gates."""
    model.train()
    model.zero_grad()
    gates.clear_gradient()
    ids = torch.randint(3, 97, (3, 12), generator=torch.Generator().manual_seed(2))
    torch.manual_seed(seed)
    loss = model(ids, labels=ids).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "loss": loss.detach(), "gates": gates.gradient.clone()}


def find_largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of all tensors, as a share of the largest number in those of its kind.

    Gradients of queries and keys alone are differences of numbers a thousand times as large.
    """
    assert one.keys() == other.keys()
    sizes: dict[str, float] = {}
    for name, tensor in other.items():
        kind = name.partition(".lora_")[2]
        sizes[kind or name] = max(sizes.get(kind or name, 0.0), float(tensor.abs().max()))
    return max(
        float((tensor - other[name]).abs().max()) / sizes[name.partition(".lora_")[2] or name]
        for name, tensor in one.items()
    )


@pytest.mark.parametrize("components", [4, 1], ids=["a gate for each component", "a gate for all"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"bias": "lora_only", "lora_bias": True}, {"r": 4, "target_modules": MLP}],
    ids=["lora", "rslora", "bias", "mlp"],
)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_kernels_compute_with_gates_as_the_modules_do(make_fused, components, settings, checkpointing):
    assert give_gates_to_kernels()
    targets = settings.get("target_modules", TARGETS + MLP)
    model = make_fused(targets, ALL_ON, **{name: v for name, v in settings.items() if name != "target_modules"})
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    gates = attach_gates(model, components)
    assert count_hook_calls(model) == 0, "every LoRA module is a kernel's"
    found = differentiate(model, gates)
    with without_fused_lora(model):
        assert count_hook_calls(model) > 0
        expected = differentiate(model, gates)
    assert expected["gates"].abs().min() > 0
    # Both compute in fp32, in another order.
    assert find_largest_difference(found, expected) <= 1e-5


def test_kernels_read_the_scaling_at_every_call(make_fused):
    """It changes when rank moves, if it follows the rank."""
    assert give_gates_to_kernels()
    model = make_fused(TARGETS + MLP, ALL_ON)
    gates = attach_gates(model, 4)
    before = differentiate(model, gates)
    modules = find_lora_modules(model.base_model.model, "default")
    for place, module in enumerate(modules.values()):
        set_scaling(module, "default", module.scaling["default"] * (1 + place / len(modules)))
    found = differentiate(model, gates)
    assert find_largest_difference(found, before) > 0.1
    with without_fused_lora(model):
        assert find_largest_difference(found, differentiate(model, gates)) <= 1e-5


def test_kernels_drop_out_with_gates_as_they_do_with_matrices_that_are_multiplied_by_them(make_fused):
    """They cannot be compared with PEFT, which draws a mask for each module, and not one for each input."""
    assert give_gates_to_kernels()
    model = make_fused(TARGETS + MLP, ALL_ON, lora_dropout=0.3)
    gates = attach_gates(model, 4)
    found = differentiate(model, gates)
    assert find_largest_difference(differentiate(model, gates, seed=5), found) > 1e-3, "dropout is on"
    values = {name: gates.values[part].clone() for name, part in gates.parts.items()}
    gates.detach()
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            named[f"{name}.weight"].mul_(value[:, None])
    expected = differentiate(model, gates)
    for name, value in values.items():
        gradient = expected[f"{name}.weight"]
        # Of the loss by A in diag(c)·A, and by c.
        expected["gates"][gates.parts[name]] = (gradient * named[f"{name}.weight"]).sum(dim=1) / value
        expected[f"{name}.weight"] = gradient * value[:, None]
    # Both compute in fp32, in another order.
    assert find_largest_difference(found, expected) <= 1e-5


def test_a_gate_of_one_changes_no_bit_of_what_kernels_compute(make_fused):
    assert give_gates_to_kernels()
    model = make_fused(TARGETS + MLP, ALL_ON)
    gates = attach_gates(model, 4)
    gates.values.fill_(1)
    found = differentiate(model, gates)
    gates.detach()
    assert torch.equal(found["loss"], differentiate(model, gates)["loss"])


def test_kernels_without_lora_and_without_gates_compute_as_before(make_fused):
    assert give_gates_to_kernels()
    model = make_fused(TARGETS, ON)
    gates = attach_gates(model, 4)
    ids = torch.arange(3, 13)[None]
    with torch.no_grad(), model.disable_adapter():
        found = model(ids).logits
        with without_fused_lora(model):
            assert torch.equal(found, model(ids).logits)
    gates.detach()
    projection = model.base_model.model.model.layers[0].self_attn.q_proj
    assert lora.get_lora_parameters(projection)[3] is projection.lora_A["default"].weight


def test_kernels_that_cannot_be_given_gates_are_off_with_l1ra(monkeypatch, caplog):
    monkeypatch.delattr(lora, "get_lora_parameters")
    caplog.set_level("INFO")
    cfg = DictDefault({"layersel": {"l1ra": {}}})
    LayerSelectionPlugin().register(cfg)
    assert [cfg[key] for key in LORA_KERNELS] == [False] * 4
    assert "cannot be given gates, since they have no get_lora_parameters" in caplog.text
    with pytest.raises(LayerselError, match=r"lora_o_kernel: True bypasses .* Remove lora_o_kernel or layersel"):
        LayerSelectionPlugin().register(DictDefault({"layersel": {"l1ra": {}}, "lora_o_kernel": True}))


def test_kernels_that_read_other_matrices_are_not_computed_with():
    matrices = tuple(torch.ones(2, 2) for _ in range(9))
    with pytest.raises(RuntimeError, match="does not return the matrices of LoRA"):
        exchange(matrices, torch.ones(2, 2), torch.zeros(2, 2))


def test_kernels_compute_modules_in_which_only_another_adapter_has_lora(make_fused, tmp_path, monkeypatch):
    read = lora.get_lora_parameters
    monkeypatch.setattr(lora, "get_lora_parameters", getattr(read, "__wrapped__", read))
    model = make_fused(TARGETS + MLP, ALL_ON)
    model.add_adapter("ref", model.peft_config["default"])
    for parameter in (p for n, p in model.named_parameters() if "lora_B.ref" in n):
        torch.nn.init.normal_(parameter, std=0.1)
    trainer = make_trainer(model, tmp_path)
    prepare_trainer(trainer, LayerselConfig(selection=SelectionConfig(method="explicit", layers=[1])))
    ids = torch.arange(3, 13)[None]
    with pytest.raises(KeyError, match="default"):
        model(ids)
    make_kernels_accept_bare_modules(model)
    for adapter in ("default", "ref"):
        model.set_adapter(adapter)
        with torch.no_grad():
            found = model(ids).logits
            with without_fused_lora(model):
                torch.testing.assert_close(found, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_the_kernels_that_need_a_gpu_are_known():
    model = make_lora(make_small_llama(layers=1), MLP, task_type="CAUSAL_LM")
    lora_kernels.apply_lora_kernel_patches(model, DictDefault(dict.fromkeys(GPU_KERNELS, True)))
    fails = pytest.raises((AssertionError, RuntimeError), match=r"CUDA")
    with contextlib.nullcontext() if torch.accelerator.is_available() else fails:
        model(input_ids=torch.arange(8)[None])
