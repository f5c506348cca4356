"""Units, which are chosen, gated and given ranks as one: layers, their branches, or LoRA modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from axolotl_layersel.lora.layers import LayerStack


@dataclass(frozen=True)
class Unit:
    """LoRA modules that are kept, or lose their adapter, together.

    Attributes:
        name: a unique name.
        layer: the position of their layer, see ``layers.LayerStack``.
        modules: their names in the base model.
        parts: for a branch, its parts of the layer, see ``list_parts``.
    """

    name: str
    layer: int
    modules: list[str]
    parts: tuple[str, ...] = ()


def find_layers(stack: LayerStack, layer: int) -> list[Unit]:
    """Return a layer as one unit, with the layer's name."""
    return [Unit(str(stack.names[layer]), layer, stack.lora_modules[layer])]


def find_groups(stack: LayerStack, layer: int) -> list[Unit]:
    """Return each branch of a layer that carries LoRA as a unit: its attention, its MLP, and any others.

    Its name is that of its first part that carries LoRA, such as ``model.layers.3.self_attn``.
    """
    prefix = f"{stack.paths[layer]}."
    units = []
    for parts in split_branches(stack.layers[layer]):
        inside = {
            part: [name for name in stack.lora_modules[layer] if f"{name}.".startswith(f"{prefix}{part}.")]
            for part in parts
        }
        carrying = [part for part, names in inside.items() if names]
        if carrying:
            modules = [name for part in carrying for name in inside[part]]
            units.append(Unit(f"{prefix}{carrying[0]}", layer, modules, tuple(parts)))
    return units


def find_modules(stack: LayerStack, layer: int) -> list[Unit]:
    """Return each LoRA module of a layer as a unit, with the module's name.

    LoRA on several parameters of one module, such as its experts, is one unit: PEFT nests their wrappers, and an inner
    one would have another name without the outer one.
    """
    units: list[Unit] = []
    for name in stack.lora_modules[layer]:
        if units and name.startswith(f"{units[-1].name}.base_layer"):
            units[-1].modules.append(name)
        else:
            units.append(Unit(name, layer, [name]))
    return units


def split_branches(layer: nn.Module) -> list[list[str]]:
    """Return the names of a layer's parts, in their order, grouped by branch.

    A branch is complete once a linear module in it has the input width of another, or its own, as its output width.
    Modules are listed as they are defined, which need not be the order in which they run. The attention and the MLP of
    most models are parts of their own. In BERT and OPT, for example, the MLP has two parts: the first one widens, and
    the second one narrows. A part of several modules without a linear one, such as routed experts, is a branch too.
    """
    branches: list[list[str]] = []
    given: set[int] = set()
    returned: set[int] = set()
    for name, part in list_parts(layer).items():
        widths = list_widths(part)
        if not can_be_branch(part):
            continue
        if not given:
            branches.append([])
        branches[-1].append(name)
        given |= {inputs for inputs, _ in widths}
        returned |= {outputs for _, outputs in widths}
        if given & returned or not given:
            given, returned = set(), set()
    return branches


def list_parts(layer: nn.Module) -> dict[str, nn.Module]:
    """Return the parts of a layer by name, in the order of definition: its children, or those of its only list (T5)."""
    parts = dict(layer.named_children())
    if len(parts) == 1:
        ((name, only),) = parts.items()
        inner = dict(only.named_children())
        # The items of a module list are named by numbers.
        if inner and list(inner) == [str(number) for number in range(len(inner))]:
            return {f"{name}.{number}": part for number, part in inner.items()}
    return parts


def can_be_branch(part: nn.Module) -> bool:
    """Return whether a part of a layer is more than a norm, an activation or a dropout, which are single modules."""
    return bool(list_widths(part)) or next(part.children(), None) is not None


def list_widths(part: nn.Module) -> list[tuple[int, int]]:
    """Return the number of inputs and outputs of every linear module in ``part``, except for those of LoRA."""
    names = [name for name, module in part.named_modules() if hasattr(module, "lora_A")]
    inside = tuple(f"{name}." if name else "" for name in names)
    found = []
    for name, module in part.named_modules():
        if name in names or not (inside and name.startswith(inside)):
            widths = find_widths(module)
            found += [widths] if widths else []
    return found


def find_widths(module: nn.Module) -> tuple[int, int] | None:
    """Return the number of inputs and outputs of a linear module or of LoRA on one, None for other modules."""
    given, returned = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(given, int) and isinstance(returned, int):
        return given, returned
    weight = getattr(module, "weight", None)
    # GPT-2's Conv1D has a transposed weight, and an attribute only for the number of its outputs.
    return tuple(weight.shape) if isinstance(getattr(module, "nf", None), int) and weight is not None else None


# Functions that return the units of one layer, by kind of unit.
UNITS: dict[str, Callable[[LayerStack, int], list[Unit]]] = {
    "layer": find_layers,
    "group": find_groups,
    "module": find_modules,
}


def find_units(stack: LayerStack, kind: str, layers: list[int]) -> list[Unit]:
    """Return the units of ``layers``, lowest layer first. ``kind``: a key of ``UNITS``."""
    return [unit for layer in layers for unit in UNITS[kind](stack, layer)]
