"""Relative: a layer is important if it adds much to its input, relative to the input's size."""

import functools

import torch

from axolotl_layersel.selection.choosing import choose_by_score
from axolotl_layersel.selection.passes.forward import score_by_tokens
from axolotl_layersel.selection.types import Choice, Selection


def choose(selection: Selection) -> Choice:
    """Return the layers that change their input most, relative to its size. Every process must call this."""
    return choose_by_score(selection, functools.partial(score_by_tokens, compare=sum_changes))


def sum_changes(inputs: torch.Tensor, outputs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the sum over each sample's tokens of ‖output − input‖ / ‖input‖: (samples,), float64.

    A token whose input is zero counts as unchanged.

    Args:
        inputs: a layer's input, (samples, tokens, width).
        outputs: its output, before any final norm, same shape.
        mask: (samples, tokens), 1 at real tokens and 0 at padding.
    """
    before, after = inputs.double(), outputs.double()
    size = before.norm(dim=-1)
    change = torch.where(size > 0, (after - before).norm(dim=-1) / size, 0.0)
    return (change * mask).sum(dim=1)
