"""AdamE, the optimizer of L1RA's gates (arXiv 2509.04884, section 3.1): Adam, a decoupled L1 term, and a clamp."""

import torch

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


@torch.no_grad()
def step_gates(
    gates: torch.Tensor,
    gradient: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    steps: torch.Tensor,
    active: torch.Tensor,
    learning_rate: float,
    l1_lambda: float,
) -> None:
    """Step the gates of the active components in place.

    c ← clamp(c − η·m̂/(√v̂ + ε) − η·λ·sign(c), 0, 1), where sign(c) is taken before the step, as in AdamW's decay. Every
    component counts its own steps, so that the moments of one added late are corrected properly.

    Args:
        gates: c, (components,), fp32; 0 for inactive components.
        gradient: gradient of the loss by c, (components,), fp32.
        exp_avg: m, (components,), fp32.
        exp_avg_sq: v, (components,), fp32.
        steps: number of steps of each component, (components,), int64.
        active: whether each component is in use, (components,), bool.
        learning_rate: η, constant.
        l1_lambda: λ.
    """
    gradient = torch.where(active, gradient, 0.0)
    steps.add_(active)
    exp_avg.mul_(BETA1).add_(gradient, alpha=1 - BETA1)
    exp_avg_sq.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
    # In float64, because 1 − 0.999 loses three digits in fp32.
    count = steps.clamp(min=1).double()
    mean = exp_avg / (1 - BETA1**count)
    root = (exp_avg_sq / (1 - BETA2**count)).sqrt()
    change = learning_rate * (mean / (root + EPSILON) + l1_lambda * gates.sign())
    gates.copy_(torch.where(active, (gates - change).clamp(0, 1), 0.0))
