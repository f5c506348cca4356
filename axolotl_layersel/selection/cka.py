"""CKA: a layer that changes its input's geometry much is important (Layer-wise LoRA, arXiv 2602.05988)."""

import torch

# Embeddings of one repeated token differ by rounding only, about 1e-7 of their norm in fp32 and 4e-3 in bf16
# times zero: equal tokens give equal rows. Centring in fp64 then leaves about 1e-16; 1e-5 is far from both.
ZERO_VARIANCE = 1e-5


def centre(representations: torch.Tensor) -> torch.Tensor:
    """Return ``representations`` (samples, width) in float64 with the mean of each column taken away."""
    values = representations.double()
    return values - values.mean(dim=0, keepdim=True)


def is_constant(representations: torch.Tensor) -> bool:
    """Return whether all samples have the same representation: ‖Xc‖ ≤ 1e-5·‖X‖ (Frobenius)."""
    norm = representations.double().norm()
    return bool(centre(representations).norm() <= ZERO_VARIANCE * norm)


def linear_cka(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the linear CKA of two representations of the same samples, in [0, 1], computed in float64.

    CKA(X, Y) = ‖YcᵀXc‖²_F / (‖XcᵀXc‖_F · ‖YcᵀYc‖_F), with centred columns (Kornblith et al. 2019, eq. 4).
    With fewer samples than features the same numbers come from the Gram matrices K = XcXcᵀ and L = YcYcᵀ:
    ⟨K, L⟩ / (‖K‖·‖L‖), which are n×n.

    Args:
        first: (samples, features), any floating dtype.
        second: (samples, other features), any floating dtype.

    Raises:
        ValueError: if one of them is the same for all samples: CKA is 0/0 there.
    """
    if is_constant(first) or is_constant(second):
        raise ValueError("linear CKA is undefined where all samples have the same representation")
    x, y = centre(first), centre(second)
    if x.shape[0] < max(x.shape[1], y.shape[1]):
        gram_x, gram_y = x @ x.T, y @ y.T
        return float((gram_x * gram_y).sum() / (gram_x.norm() * gram_y.norm()))
    return float((y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


def score_layers(states: torch.Tensor) -> tuple[list[float | None], dict[int, str]]:
    """Return the importance 1 − CKA(R_{i−1}, R_i) of each layer, and why a layer has none.

    Args:
        states: (samples, layers + 1, width): the embeddings and each layer's output, the last after the final
            norm, as Hugging Face's ``hidden_states``.
    """
    scores: list[float | None] = []
    reasons: dict[int, str] = {}
    constant = [is_constant(states[:, i]) for i in range(states.shape[1])]
    for layer in range(states.shape[1] - 1):
        if constant[layer] or constant[layer + 1]:
            where = "input" if constant[layer] else "output"
            reasons[layer] = f"its {where} is the same for all samples at the token chosen"
            scores.append(None)
        else:
            scores.append(1 - linear_cka(states[:, layer], states[:, layer + 1]))
    return scores, reasons
