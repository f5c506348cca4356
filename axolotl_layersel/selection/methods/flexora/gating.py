"""The gates of Flexora (arXiv 2408.10774), which multiply LoRA outputs, and their gradient.

Each layer has a number α, which starts at 0. The LoRA output of layer i is multiplied by n·softmax(α)_i, where n is the
number of layers. So all multipliers start at 1, and their mean stays 1.
"""

import torch

from axolotl_layersel.common.errors import LayerselError


def find_multipliers(alpha: torch.Tensor) -> torch.Tensor:
    """Return n·softmax(α), of the shape and type of ``alpha``, (n,)."""
    return len(alpha) * torch.softmax(alpha, dim=0)


def find_alpha_gradient(alpha: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Return the gradient with respect to α, (n,), from that with respect to the multipliers.

    With s = softmax(α): ∂L/∂α_j = n·s_j·(g_j − Σ_i s_i·g_i). Its sum is 0: a gate rises at the expense of the others.

    Args:
        alpha: (n,).
        gradient: g, ∂L/∂(n·s), (n,).
    """
    share = torch.softmax(alpha, dim=0)
    return len(alpha) * share * (gradient - (share * gradient).sum())


def choose_positive(alpha: dict[str, float]) -> list[str]:
    """Return the names of the gates above zero, the paper's rule, in order.

    Raises:
        LayerselError: if no gate is above zero, or all are.
    """
    kept = [name for name, value in alpha.items() if value > 0]
    if kept and len(kept) < len(alpha):
        return kept
    shown = ", ".join(f"{name}: {value:.4g}" for name, value in alpha.items())
    raise LayerselError(
        f"layersel.selection.keep: 'positive' keeps {'everything' if kept else 'nothing'}: the gates ended at {shown}. "
        "Set `ratio` (or `num_layers`) to keep the highest ones, or search longer: raise flexora.steps or "
        "flexora.gate_lr."
    )
