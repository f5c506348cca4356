"""What is chosen among, or gets a gate: layers, or LoRA modules. A unit is a group of LoRA modules with one name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from axolotl_layersel.layers import LayerStack


@dataclass(frozen=True)
class Unit:
    """LoRA modules that are kept, or lose their adapter, together.

    Attributes:
        name: no other unit's.
        layer: the layer that they are in.
        modules: their names in the base model.
    """

    name: str
    layer: int
    modules: list[str]


def find_layers(stack: LayerStack, layer: int) -> list[Unit]:
    """Return a layer as one unit, called by its number."""
    return [Unit(str(layer), layer, stack.lora_modules[layer])]


def find_modules(stack: LayerStack, layer: int) -> list[Unit]:
    """Return each LoRA module of a layer as a unit, called by its name."""
    return [Unit(name, layer, [name]) for name in stack.lora_modules[layer]]


# What finds the units of one layer, by the kind of unit.
UNITS: dict[str, Callable[[LayerStack, int], list[Unit]]] = {"layer": find_layers, "module": find_modules}


def find_units(stack: LayerStack, kind: str, layers: list[int]) -> list[Unit]:
    """Return the units of ``layers``, lowest layer first. ``kind``: a key of ``UNITS``; another one is a KeyError."""
    return [unit for layer in layers for unit in UNITS[kind](stack, layer)]
