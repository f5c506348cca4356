import pytest
import torch
from helpers.models import make_lora, make_small_llama

from axolotl_layersel.lora.modules import find_lora_modules
from axolotl_layersel.lora.weights import initialize_lora


def module_products(model) -> list[float]:
    """Return the largest element of B·A of every module."""
    modules = find_lora_modules(model.get_base_model()).values()
    return [float((m.lora_B["default"].weight @ m.lora_A["default"].weight).abs().max()) for m in modules]


def lora_weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "lora_" in name}


@pytest.mark.parametrize("method", [True, "gaussian", "orthogonal"])
def test_initial_weights_come_from_the_seed_alone(method):
    first, second, other = (make_lora(make_small_llama(), init_lora_weights=method) for _ in range(3))
    torch.manual_seed(11)
    state = torch.get_rng_state()
    assert initialize_lora(first, seed=5)
    assert torch.equal(torch.get_rng_state(), state), "the user's random stream moved"
    torch.manual_seed(12)
    initialize_lora(second, seed=5)
    initialize_lora(other, seed=6)
    for name, value in lora_weights(first).items():
        assert torch.equal(value, lora_weights(second)[name])
        assert torch.equal(value, lora_weights(other)[name]) == ("lora_B" in name and method != "orthogonal")


def test_a_row_does_not_depend_on_rank_or_on_what_else_carries_lora():
    small = make_lora(make_small_llama(), r=2, target_modules=["q_proj"])
    large = make_lora(make_small_llama(), r=6, target_modules=["q_proj", "up_proj"])
    for model in (small, large):
        initialize_lora(model, seed=5)
    for name, value in lora_weights(small).items():
        if "lora_A" in name:
            assert torch.equal(value, lora_weights(large)[name][:2])


@pytest.mark.parametrize("method", [True, "gaussian", "orthogonal"])
def test_the_distribution_is_pefts(method):
    model = make_lora(make_small_llama(hidden_size=256, num_attention_heads=8), r=16, init_lora_weights=method)
    stock = torch.cat([value.flatten() for name, value in lora_weights(model).items() if "q_proj.lora_A" in name])
    initialize_lora(model, seed=5)
    ours = torch.cat([value.flatten() for name, value in lora_weights(model).items() if "q_proj.lora_A" in name])
    assert ours.std().item() == pytest.approx(stock.std().item(), rel=0.03)
    assert ours.abs().max().item() == pytest.approx(stock.abs().max().item(), rel=0.01 if method is True else 0.3)
    assert max(module_products(model)) <= 1e-6
    assert abs(ours.mean().item()) < 3 * ours.std().item() / len(ours) ** 0.5


def test_an_initialisation_that_looks_at_the_base_weights_is_kept():
    model = make_lora(make_small_llama(), init_lora_weights="pissa")
    before = lora_weights(model)
    assert not initialize_lora(model, seed=5)
    assert all(torch.equal(value, before[name]) for name, value in lora_weights(model).items())
