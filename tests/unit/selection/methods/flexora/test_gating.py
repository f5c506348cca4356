import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.selection.methods.flexora.gating import choose_positive, find_alpha_gradient, find_multipliers

NUMBERS = st.lists(st.floats(-3, 3), min_size=2, max_size=12)


@given(st.integers(1, 200))
def test_gates_at_zero_multiply_by_exactly_one(count):
    assert torch.equal(find_multipliers(torch.zeros(count, dtype=torch.float64)).float(), torch.ones(count))


@given(NUMBERS, st.data())
def test_the_gradient_of_alpha_is_what_autograd_says_and_sums_to_zero(values, data):
    alpha = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    size = len(values)
    gradient = torch.tensor(data.draw(st.lists(st.floats(-3, 3), min_size=size, max_size=size)), dtype=torch.float64)
    multipliers = find_multipliers(alpha)
    assert multipliers.sum().item() == pytest.approx(size)
    (expected,) = torch.autograd.grad(multipliers, alpha, gradient)
    found = find_alpha_gradient(alpha.detach(), gradient)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)
    assert abs(found.sum().item()) < 1e-9


def test_gates_above_zero_are_kept():
    assert choose_positive({"0": 0.1, "1": -0.2, "2": 0.0, "3": 0.3}) == ["0", "3"]


@pytest.mark.parametrize(("values", "what"), [((0.1, 0.2), "everything"), ((0.0, -0.2), "nothing")])
def test_keeping_everything_or_nothing_is_an_error_with_the_gates(values, what):
    with pytest.raises(LayerselError, match=f"'positive' keeps {what}: the gates ended at 0: {values[0]:g}.*`ratio`"):
        choose_positive(dict(zip("01", values)))
