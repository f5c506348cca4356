"""Cosine: a layer is important if it turns its input far (LS-LoRA)."""

import functools

import torch

from axolotl_layersel.selection.choosing import choose_by_score
from axolotl_layersel.selection.passes.forward import score_by_tokens
from axolotl_layersel.selection.types import Choice, Selection


def choose(selection: Selection) -> Choice:
    """Return the layers that turn their input farthest. Every process must call this."""
    return choose_by_score(selection, functools.partial(score_by_tokens, compare=sum_turns))


def sum_turns(inputs: torch.Tensor, outputs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the sum over each sample's tokens of 1 − cos(input, output): (samples,), float64.

    Args:
        inputs: a layer's input, (samples, tokens, width).
        outputs: its output, before any final norm, same shape.
        mask: (samples, tokens), 1 at real tokens and 0 at padding.
    """
    cosine = torch.nn.functional.cosine_similarity(inputs.double(), outputs.double(), dim=-1)
    return ((1 - cosine) * mask).sum(dim=1)
