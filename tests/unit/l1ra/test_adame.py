import math

import pytest
import torch

from axolotl_layersel.l1ra.adame import step_gates


def make_state(size: int, gates: float = 0.5) -> dict[str, torch.Tensor]:
    return {
        "gates": torch.full((size,), gates),
        "exp_avg": torch.zeros(size),
        "exp_avg_sq": torch.zeros(size),
        "steps": torch.zeros(size, dtype=torch.int64),
        "active": torch.ones(size, dtype=torch.bool),
    }


def test_without_pressure_it_is_torchs_adam():
    generator = torch.Generator().manual_seed(0)
    state = make_state(6)
    reference = torch.full((6,), 0.5, requires_grad=True)
    adam = torch.optim.Adam([reference], lr=0.01, betas=(0.9, 0.999), eps=1e-8)
    for _ in range(20):
        gradient = torch.randn(6, generator=generator)
        reference.grad = gradient.clone()
        adam.step()
        step_gates(gradient=gradient, learning_rate=0.01, l1_lambda=0.0, **state)
    torch.testing.assert_close(state["gates"], reference.detach(), atol=1e-6, rtol=0)


def test_the_pressure_is_decoupled_from_the_moments():
    state = make_state(2)
    step_gates(gradient=torch.zeros(2), learning_rate=0.02, l1_lambda=0.5, **state)
    assert state["gates"].tolist() == pytest.approx([0.49, 0.49])
    assert not state["exp_avg"].any() and not state["exp_avg_sq"].any()


def test_gates_end_at_exactly_zero_and_never_exceed_one():
    state = make_state(2)
    for _ in range(60):
        step_gates(gradient=torch.tensor([1.0, -1.0]), learning_rate=0.02, l1_lambda=0.5, **state)
    assert state["gates"].tolist() == [0.0, 1.0]


def test_a_gate_at_zero_comes_back_when_the_loss_asks_for_it():
    state = make_state(1, gates=0.0)
    step_gates(gradient=torch.tensor([-3.0]), learning_rate=0.02, l1_lambda=0.5, **state)
    assert state["gates"].item() == pytest.approx(0.02)


def test_components_that_are_not_active_stay_at_zero_and_count_nothing():
    state = make_state(2)
    state["active"][1] = False
    state["gates"][1] = 0
    for _ in range(3):
        step_gates(gradient=torch.tensor([-1.0, -1.0]), learning_rate=0.02, l1_lambda=0.0, **state)
    assert state["gates"][1] == 0 and state["exp_avg"][1] == 0 and state["exp_avg_sq"][1] == 0
    assert state["steps"].tolist() == [3, 0]


def test_a_component_that_is_added_late_makes_a_first_step_like_any_other():
    state = make_state(2)
    state["steps"][0] = 500
    state["exp_avg"][0], state["exp_avg_sq"][0] = 1.0, 1.0 - 0.999**500
    step_gates(gradient=torch.tensor([1.0, 1.0]), learning_rate=0.02, l1_lambda=0.0, **state)
    assert state["gates"][1].item() == pytest.approx(0.48, abs=1e-6)


def test_a_gradient_that_is_not_a_number_or_overflows_shows_in_the_second_moment():
    for bad in (math.nan, math.inf, 1e30):
        state = make_state(2)
        step_gates(gradient=torch.tensor([bad, 0.1]), learning_rate=0.02, l1_lambda=0.0, **state)
        assert state["exp_avg_sq"].isfinite().tolist() == [False, True]
