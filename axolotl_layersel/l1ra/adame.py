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

    c ← clamp(c − η·m̂/(√v̂ + ε) − η·λ·sign(c), 0, 1), with the sign of c before the step, as AdamW decays.
    Every component counts its own steps, so that one added late has its moments corrected like any other.

    Args:
        gates: c, (components,), fp32. Inactive ones are and stay 0.
        gradient: of the loss with respect to c, (components,), fp32.
        exp_avg: m, (components,), fp32.
        exp_avg_sq: v, (components,), fp32.
        steps: steps that each component has made, (components,), int64.
        active: which components there are, (components,), bool.
        learning_rate: η, constant.
        l1_lambda: λ.
    """
    gradient = torch.where(active, gradient, 0.0)
    steps.add_(active)
    exp_avg.mul_(BETA1).add_(gradient, alpha=1 - BETA1)
    exp_avg_sq.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
    # In float64: 1 − 0.999 has lost three digits in fp32.
    count = steps.clamp(min=1).double()
    mean = exp_avg / (1 - BETA1**count)
    root = (exp_avg_sq / (1 - BETA2**count)).sqrt()
    change = learning_rate * (mean / (root + EPSILON) + l1_lambda * gates.sign())
    gates.copy_(torch.where(active, (gates - change).clamp(0, 1), 0.0))
