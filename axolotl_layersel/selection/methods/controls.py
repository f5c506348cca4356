"""The controls that every claim is measured against: random, first, last and explicit layers."""

import random

from axolotl_layersel.selection.choosing import Choice, Selection


def choose_random(selection: Selection) -> Choice:
    """Return layers drawn by the seed."""
    drawn = random.Random(selection.settings.seed).sample(selection.candidates, selection.count_kept())
    return keep(selection, sorted(drawn))


def choose_first(selection: Selection) -> Choice:
    """Return the lowest candidates."""
    return keep(selection, selection.candidates[: selection.count_kept()])


def choose_last(selection: Selection) -> Choice:
    """Return the highest candidates."""
    return keep(selection, selection.candidates[len(selection.candidates) - selection.count_kept() :])


def choose_explicit(selection: Selection) -> Choice:
    """Return the layers that the settings list."""
    return keep(selection, sorted(selection.settings.layers or []))


def keep(selection: Selection, layers: list[int]) -> Choice:
    """Return the choice of ``layers``, without scores."""
    return Choice(selection.stack.list_modules(layers), scores=[None] * len(selection.stack.layers))
