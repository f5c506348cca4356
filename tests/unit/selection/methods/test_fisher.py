import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from axolotl_layersel.selection.methods.fisher import ghost_norm, score_layers


@settings(deadline=None, max_examples=50)
@given(tokens=st.integers(1, 30), wide=st.integers(1, 20), high=st.integers(1, 20), seed=st.integers(0, 10**6))
def test_the_ghost_norm_is_that_of_the_weight_gradient(tokens, wide, high, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs, gradients = (torch.randn(tokens, width, generator=generator) for width in (wide, high))
    weight = torch.zeros(high, wide, requires_grad=True)
    (inputs @ weight.T).backward(gradients)
    assert ghost_norm(inputs, gradients).item() == pytest.approx(weight.grad.double().square().sum().item(), rel=1e-4)


def test_the_score_is_the_mean_over_samples_and_weights():
    squares = torch.tensor([[8.0, 6.0, 0.0], [4.0, 0.0, 0.0]], dtype=torch.float64)
    scores, reasons = score_layers(squares, torch.tensor([2.0, 3.0, 0.0]))
    assert scores == [3.0, 1.0, None]
    assert reasons == {2: "it carries no LoRA"}
