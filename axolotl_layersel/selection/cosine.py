"""Cosine: a layer that turns its input far is important (LS-LoRA)."""

import torch


def sum_turns(inputs: torch.Tensor, outputs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the sum over each sample's tokens of 1 − cos(input, output): (samples,), float64.

    Args:
        inputs: a layer's input, (samples, tokens, width).
        outputs: its output, before any final norm, same shape.
        mask: (samples, tokens), 1 at real tokens and 0 at padding.
    """
    cosine = torch.nn.functional.cosine_similarity(inputs.double(), outputs.double(), dim=-1)
    return ((1 - cosine) * mask).sum(dim=1)


def score_layers(turns: torch.Tensor, tokens: torch.Tensor) -> list[float]:
    """Return each layer's mean of 1 − cos over all tokens of all samples.

    Args:
        turns: (samples, layers), sums over each sample's tokens.
        tokens: (samples,), how many tokens each sample has.
    """
    return (turns.sum(dim=0) / tokens.sum()).tolist()
