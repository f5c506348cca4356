import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from axolotl_layersel.selection.methods.cka import is_constant, linear_cka, score_pairs


def reference_cka(first: torch.Tensor, second: torch.Tensor) -> float:
    """HSIC(K, L) / √(HSIC(K, K)·HSIC(L, L)) with HSIC(K, L) = tr(KHLH)/(n − 1)², written out in float64."""
    n = first.shape[0]
    centring = torch.eye(n, dtype=torch.float64) - torch.full((n, n), 1 / n, dtype=torch.float64)
    k, other = first.double() @ first.double().T, second.double() @ second.double().T

    def hsic(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.trace(a @ centring @ b @ centring) / (n - 1) ** 2

    return float(hsic(k, other) / (hsic(k, k) * hsic(other, other)).sqrt())


def draw(n: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) + 3).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "width"), [(9, 40), (60, 12), (16, 16)])
def test_cka_is_the_definition_for_few_and_for_many_samples(n, width, dtype):
    first = draw(n, width, 0, dtype)
    second = (first + draw(n, width, 1, dtype)) * 2
    assert linear_cka(first, second) == pytest.approx(reference_cka(first, second), abs=1e-6)


@settings(deadline=None, max_examples=50)
@given(n=st.integers(3, 24), width=st.integers(1, 24), other=st.integers(1, 24), seed=st.integers(0, 10**6))
def test_cka_is_the_definition_for_any_shapes(n, width, other, seed):
    first, second = draw(n, width, seed), draw(n, other, seed + 1)
    assert linear_cka(first, second) == pytest.approx(reference_cka(first, second), abs=1e-6)
    assert linear_cka(first, second) == pytest.approx(linear_cka(second, first), abs=1e-9)


def test_cka_ignores_scale_shift_and_rotation():
    first = draw(20, 8, 0).double()
    rotation, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
    assert linear_cka(first, 7 * first @ rotation + 5) == pytest.approx(1, abs=1e-9)


def test_equal_rows_are_constant_however_they_are_rounded():
    row = torch.randn(1, 64)
    assert is_constant(row.repeat(13, 1))
    assert is_constant((row.repeat(13, 1) * 1.1) / 1.1)
    assert not is_constant(row.repeat(13, 1) + 1e-3 * torch.randn(13, 64))
    with pytest.raises(ValueError, match="undefined"):
        linear_cka(row.repeat(13, 1), torch.randn(13, 64))


def test_a_layer_is_as_important_as_it_changes_its_input():
    first = draw(20, 30, 0)
    states = torch.stack([first, first + 0.01 * draw(20, 30, 1), draw(20, 30, 2)], dim=1)
    scores, reasons = score_pairs(states, [(0, 1), (1, 2)])
    assert reasons == {}
    assert scores[0] == pytest.approx(1 - reference_cka(states[:, 0], states[:, 1]), abs=1e-6)
    assert scores[1] == pytest.approx(1 - reference_cka(states[:, 1], states[:, 2]), abs=1e-6)
    assert scores[1] > scores[0]


def test_a_layer_that_sees_one_token_only_has_no_score():
    same = torch.randn(1, 30).repeat(20, 1)
    scores, reasons = score_pairs(torch.stack([same, draw(20, 30, 1), draw(20, 30, 2)], dim=1), [(0, 1), (1, 2)])
    assert scores[0] is None
    assert scores[1] is not None
    assert "input is the same for all samples" in reasons[0]
