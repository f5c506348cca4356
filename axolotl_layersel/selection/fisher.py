"""Fisher: a layer whose weights the log-likelihood depends on is important."""

import torch


def ghost_norm(inputs: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """Return the squared Frobenius norm of a linear layer's weight gradient, which is never formed whole.

    For one sample with inputs x_t and output gradients g_t the gradient is Σ_t g_t x_tᵀ, and its squared norm
    is Σ (XXᵀ ∘ GGᵀ) over pairs of tokens (ghost clipping, Li et al. 2022, eq. 3 of arXiv 2110.05679).
    Where the weight is smaller than the tokens' pairs, its gradient is formed after all: same number, less work.

    Args:
        inputs: X, (tokens, in), any floating dtype.
        gradients: G, (tokens, out), any floating dtype.

    Returns:
        A scalar, float64.
    """
    x, g = inputs.float(), gradients.float()
    tokens, wide, high = x.shape[0], x.shape[1], g.shape[1]
    if tokens * (wide + high) <= wide * high:
        return ((x @ x.T).double() * (g @ g.T).double()).sum()
    return (g.T @ x).double().square().sum()


def score_layers(squares: torch.Tensor, weights: torch.Tensor) -> tuple[list[float | None], dict[int, str]]:
    """Return each layer's mean squared gradient, over samples and over its own LoRA-target weights.

    Args:
        squares: (samples, layers), squared norms of the gradient, summed over the layer's target modules.
        weights: (layers,), number of those weights; 0 where the layer has none, which leaves it unscored.
    """
    reasons = {layer: "it carries no LoRA" for layer, count in enumerate(weights.tolist()) if not count}
    means = squares.mean(dim=0) / weights.clamp(min=1)
    return [None if layer in reasons else value for layer, value in enumerate(means.tolist())], reasons
