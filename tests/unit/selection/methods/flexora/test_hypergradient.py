"""Unrolled gradients against finite differences, on a tiny model that computes in float64 throughout."""

import pytest
import torch
from helpers.models import make_lora
from peft import PeftModel
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from axolotl_layersel.lora.gates import Gates
from axolotl_layersel.lora.modules import find_lora_modules
from axolotl_layersel.selection.methods.flexora.hypergradient import find_unrolled_gradient, unroll

LAYERS, STEP = 3, 1e-4
# Large, so that what the inner steps add to the gradient is no rounding: see the last test.
LEARNING_RATE = 0.5


def make_gated() -> tuple[PeftModel, Gates]:
    """Return a GPT-2 (whose norms are not rounded to fp32) with random LoRA weights, and a gate on each layer."""
    torch.manual_seed(0)
    size = {"n_embd": 16, "n_head": 2, "n_positions": 16, "vocab_size": 31}
    pure = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "attn_implementation": "eager"}
    model = make_lora(GPT2LMHeadModel(GPT2Config(n_layer=LAYERS, **size, **pure)), ["c_attn", "c_proj"])
    model = model.double().train()
    for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
        torch.nn.init.normal_(parameter, std=0.3)
    modules = find_lora_modules(model.get_base_model())
    downs = {
        str(layer): [module.lora_A["default"] for name, module in modules.items() if f".{layer}." in name]
        for layer in range(LAYERS)
    }
    gates = Gates(downs, 1, torch.device("cpu"))
    gates.values, gates.gradient = gates.values.double(), gates.gradient.double()
    gates.values.copy_(torch.tensor([0.7, 1.4, 0.9]))
    gates.attach()
    return model, gates


def make_loss(model: PeftModel, seed: int):
    """Return the loss of one batch as a function of the LoRA weights."""
    tokens = torch.randint(31, (2, 12), generator=torch.Generator().manual_seed(seed))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def loss(weights: list[torch.Tensor]) -> torch.Tensor:
        logits = torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (tokens,)).logits
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    return loss


def get_weights(model: PeftModel) -> list[torch.Tensor]:
    return [p.detach().clone().requires_grad_() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("inner_steps", [1, 2, 3])
def test_the_gradient_is_that_of_finite_differences(inner_steps):
    model, gates = make_gated()
    inner = [make_loss(model, seed) for seed in range(inner_steps)]
    rates = [LEARNING_RATE / (k + 1) for k in range(inner_steps)]
    validation = make_loss(model, 100)
    weights = get_weights(model)

    loss, gradients = find_unrolled_gradient(weights, list(gates.leaves.values()), inner, rates, validation)

    def measure() -> float:
        return validation(unroll(get_weights(model), inner, rates, lambda gradients: gradients)).item()

    assert loss.item() == pytest.approx(measure(), abs=1e-12)
    start = gates.values.clone()
    for gate, found in enumerate(torch.cat(gradients)):
        around = {}
        for steps in (-2, -1, 1, 2):
            gates.values.copy_(start)
            gates.values[gate] += steps * STEP
            around[steps] = measure()
        # Five points: off by h⁴ times the fifth derivative.
        expected = (8 * (around[1] - around[-1]) - (around[2] - around[-2])) / (12 * STEP)
        assert found.item() == pytest.approx(expected, rel=1e-7, abs=1e-9)
    with torch.no_grad():
        gates.values.copy_(start)
    reached = [w.detach() for w in unroll(weights, inner, rates, lambda gradients: gradients)]
    first_order = torch.autograd.grad(validation(reached), list(gates.leaves.values()))
    beyond = (torch.cat(gradients) - torch.cat(first_order)).abs() / torch.cat(first_order).abs()
    assert beyond.max() > 0.05, "the inner steps' part is too small for this test to see"


def test_without_inner_steps_the_gradient_is_of_first_order():
    model, gates = make_gated()
    validation, weights = make_loss(model, 100), get_weights(model)
    leaves = list(gates.leaves.values())
    loss, gradients = find_unrolled_gradient(weights, leaves, [], [], validation)
    assert loss.item() == validation(weights).item()
    assert torch.equal(torch.cat(gradients), torch.cat(torch.autograd.grad(validation(weights), leaves)))


def test_a_gate_that_nothing_depends_on_has_no_gradient():
    model, _gates = make_gated()
    idle = torch.ones(1, dtype=torch.float64, requires_grad=True)
    _, gradients = find_unrolled_gradient(
        get_weights(model), [idle], [make_loss(model, 0)], [0.1], make_loss(model, 100)
    )
    assert gradients[0].tolist() == [0.0]
