"""The gradient of the validation loss with respect to the gates, through the LoRA steps before it."""

from collections.abc import Callable, Sequence

import torch

# A function from LoRA weights to a loss, a scalar.
Loss = Callable[[list[torch.Tensor]], torch.Tensor]


def unroll(
    weights: list[torch.Tensor],
    inner_losses: Sequence[Loss],
    learning_rates: Sequence[float],
    average: Callable[[list[torch.Tensor]], list[torch.Tensor]],
) -> list[torch.Tensor]:
    """Return the weights after an SGD step on each inner loss, differentiable by everything the losses depend on.

    θ_{k+1} = θ_k − η_k·∇L_k(θ_k), differentiably (the inner problem of arXiv 2408.10774, unrolled).

    Args:
        weights: θ_0, leaves that require a gradient.
        inner_losses: L_k, which also depend on the gates.
        learning_rates: η_k.
        average: averages gradients over the processes, differentiably.
    """
    for loss, learning_rate in zip(inner_losses, learning_rates, strict=True):
        gradients = torch.autograd.grad(loss(weights), weights, create_graph=True)
        weights = [w - learning_rate * g for w, g in zip(weights, average(list(gradients)), strict=True)]
    return weights


def find_unrolled_gradient(
    weights: list[torch.Tensor],
    gates: list[torch.Tensor],
    inner_losses: Sequence[Loss],
    learning_rates: Sequence[float],
    validation_loss: Loss,
    average: Callable[[list[torch.Tensor]], list[torch.Tensor]] = lambda gradients: gradients,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the validation loss after the inner steps, and its total derivative with respect to each gate.

    The gates act directly on the validation loss, and on the weights that the inner steps lead to.

    Args:
        weights: see ``unroll``.
        gates: leaves that require a gradient; the losses depend on them.
        inner_losses: see ``unroll``.
        learning_rates: see ``unroll``.
        validation_loss: of the weights after the inner steps, on the rows of this process.
        average: see ``unroll``.

    Returns:
        A scalar, and for each gate a tensor of its shape, which must be summed over processes.
    """
    loss = validation_loss(unroll(weights, inner_losses, learning_rates, average))
    gradients = torch.autograd.grad(loss, gates, allow_unused=True)
    return loss.detach(), [torch.zeros_like(c) if g is None else g for c, g in zip(gates, gradients, strict=True)]
