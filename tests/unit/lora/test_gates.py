import pytest
import torch
from helpers.models import make_lora, make_small_llama
from helpers.settings import CHECKPOINTING

from axolotl_layersel.engines.base import Engine
from axolotl_layersel.lora.gates import Gates
from axolotl_layersel.lora.modules import find_lora_modules

TOKENS = torch.arange(3, 43).reshape(2, 20)


def make_gated(checkpointing: str = "none", dtype: torch.dtype = torch.float32, layers: int = 3, **lora):
    """Return a model with random LoRA weights, and random gates attached to it."""
    model = make_lora(make_small_llama(layers), **lora)
    generator = torch.Generator().manual_seed(5)
    for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    model.to(dtype)
    if CHECKPOINTING[checkpointing]:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=CHECKPOINTING[checkpointing])
    model.train()
    modules = find_lora_modules(model.get_base_model())
    gates = Gates({name: [module.lora_A["default"]] for name, module in modules.items()}, 4, torch.device("cpu"))
    gates.values.copy_(torch.rand(gates.values.shape, generator=generator))
    gates.attach()
    return model, gates


def run_backward(model, tokens=TOKENS) -> float:
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return loss.item()


def test_the_output_is_that_of_b_times_the_gates_times_a():
    model, gates = make_gated()
    gated = model(TOKENS).logits
    gates.detach()
    for name, module in find_lora_modules(model.get_base_model()).items():
        module.lora_B["default"].weight.data *= gates.values[gates.parts[name]]
    torch.testing.assert_close(model(TOKENS).logits, gated, atol=1e-5, rtol=0)
    assert not any(hasattr(linear, "layersel_gate") for (linear,) in gates.linears.values())


def test_the_gradient_follows_from_that_of_b_with_the_gates_folded_in():
    """B' = B·diag(c), so the gradient of a gate is that of its column in B' times the column of B, summed up."""
    model, gates = make_gated()
    run_backward(model)
    measured = gates.gradient.clone()
    gates.detach()
    modules = find_lora_modules(model.get_base_model())
    ups = {name: module.lora_B["default"].weight for name, module in modules.items()}
    originals = {name: up.detach().clone() for name, up in ups.items()}
    for name, up in ups.items():
        up.data *= gates.values[gates.parts[name]]
    model.zero_grad()
    run_backward(model)
    for name, up in ups.items():
        expected = (up.grad * originals[name]).sum(dim=0)
        torch.testing.assert_close(measured[gates.parts[name]], expected, atol=1e-7, rtol=1e-4)
    assert measured.ne(0).all()


def test_gradients_of_micro_batches_add_up_in_the_flat_tensor():
    model, gates = make_gated()
    for rows in (TOKENS[:1], TOKENS[1:]):
        run_backward(model, rows)
    added = gates.gradient.clone()
    gates.clear_gradient()
    run_backward(model)
    # The loss of two rows is the mean of theirs.
    torch.testing.assert_close(added / 2, gates.gradient, atol=1e-6, rtol=1e-4)


def test_the_gradients_of_a_say_what_gates_of_1_would_get():
    model, gates = make_gated(lora_dropout=0.3)
    gates.values.fill_(1.0)
    for rows in (TOKENS[:1], TOKENS[1:]):
        run_backward(model, rows)
    products = Engine(None, "single").multiply_by_gradients([linear.weight for (linear,) in gates.linears.values()])
    torch.testing.assert_close(products, gates.gradient, atol=1e-7, rtol=1e-5)
    assert products.ne(0).all()


@pytest.mark.parametrize("checkpointing", ["reentrant", "non-reentrant"])
def test_checkpointing_changes_no_gradient(checkpointing):
    (plain, one), (checkpointed, two) = make_gated(), make_gated(checkpointing)
    assert run_backward(plain) == run_backward(checkpointed)
    torch.testing.assert_close(one.gradient, two.gradient, atol=1e-7, rtol=0)


def test_gates_stay_in_fp32_beside_bf16_weights():
    (_, exact), (model, gates) = make_gated(), make_gated(dtype=torch.bfloat16)
    run_backward(_)
    run_backward(model)
    assert gates.values.dtype == gates.gradient.dtype == torch.float32
    (linear,) = next(iter(gates.linears.values()))
    assert linear(torch.ones(1, linear.in_features, dtype=torch.bfloat16)).dtype == torch.bfloat16
    # bf16 keeps 8 bits of every activation on the way.
    error = (gates.gradient - exact.gradient).norm() / exact.gradient.norm()
    assert 0 < error < 0.1


def test_compiled_models_use_the_gates_of_the_moment():
    (plain, one), (compiled, two) = make_gated(layers=1), make_gated(layers=1)
    # Everything but the generation of machine code, which takes minutes.
    compiled = torch.compile(compiled, backend="aot_eager")
    for _ in range(2):
        assert run_backward(compiled) == pytest.approx(run_backward(plain), abs=1e-5)
        torch.testing.assert_close(one.gradient, two.gradient, atol=1e-5, rtol=1e-3)
        for gates in (one, two):
            gates.values.mul_(0.5)
            gates.clear_gradient()


def test_a_component_is_named_by_its_module():
    _, gates = make_gated()
    names = list(gates.parts)
    assert gates.name_component(0) == gates.name_component(3) == names[0]
    assert gates.name_component(4) == names[1]
