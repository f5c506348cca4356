"""Controls to compare other methods with: random, first, last and explicit layers."""

import random

from axolotl_layersel.selection.types import Choice, Selection


def choose_random(selection: Selection) -> Choice:
    """Return units drawn by the seed."""
    units = selection.units
    drawn = random.Random(selection.settings.seed).sample(range(len(units)), selection.count_kept())
    modules = [module for place in sorted(drawn) for module in units[place].modules]
    return Choice(modules, scores=[None] * len(selection.stack.layers))


def choose_first(selection: Selection) -> Choice:
    """Return the lowest candidates; the layers of an encoder count as below those of its decoder."""
    return keep(selection, selection.candidates[: selection.count_kept()])


def choose_last(selection: Selection) -> Choice:
    """Return the highest candidates; the layers of a decoder count as above those of its encoder."""
    return keep(selection, selection.candidates[len(selection.candidates) - selection.count_kept() :])


def choose_explicit(selection: Selection) -> Choice:
    """Return the layers that the settings list."""
    stack = selection.stack
    return keep(selection, [stack.names.index(name) for name in selection.settings.layers or []])


def keep(selection: Selection, layers: list[int]) -> Choice:
    """Return the choice of ``layers``, without scores."""
    return Choice(selection.stack.list_modules(layers), scores=[None] * len(selection.stack.layers))
