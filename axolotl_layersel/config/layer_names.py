"""What layers are called: by their number, or by side, as ``encoder.3``, where there may be several stacks of them.

Nothing here imports torch, so that plans and settings can be read without it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

LayerName = int | str
# Where the layers are in the base model: ``model.layers``, or by side.
Place = str | dict[str, str]
ENCODER_DECODER = ("encoder", "decoder")
VISION, LANGUAGE = "vision", "language"
# Which sides are chosen among, by the value of `stacks`; the language model's layers alone have numbers for names.
STACKS = {"language": ("",), "vision": (VISION,), "both": (VISION, LANGUAGE)}
# In the order that they run.
SIDES = (*ENCODER_DECODER, VISION, LANGUAGE)
NUMBER = re.compile("0|[1-9][0-9]{0,8}")
NAME = re.compile(rf"({'|'.join(SIDES)})\.({NUMBER.pattern})")


def name_layers(counts: Mapping[str, int]) -> list[LayerName]:
    """Return the names of layers, in the order that they run.

    Args:
        counts: how many there are, by side; the side without a name is that of a model with one list of layers.
    """
    return [f"{side}.{number}" if side else number for side, count in counts.items() for number in range(count)]


def is_layer_name(text: str) -> bool:
    """Return whether ``text`` is the name of a layer, and not that of a group or a module."""
    return text.isdecimal() or NAME.fullmatch(text) is not None


def split_name(name: LayerName) -> tuple[str, int]:
    """Return the side of a layer, empty in a model with one list of them, and its number there."""
    if isinstance(name, int):
        return "", name
    side, _, number = name.partition(".")
    return side, int(number)


def sort_names(names: Iterable[LayerName]) -> list[LayerName]:
    """Return names of layers in the order that the layers run."""
    order = ["", *SIDES]

    def find_order(name: LayerName) -> tuple[int, int]:
        side, number = split_name(name)
        return order.index(side), number

    return sorted(names, key=find_order)


def format_names(names: Iterable[LayerName]) -> str:
    """Return names of layers as a list in YAML."""
    return f"[{', '.join(map(str, names))}]"


def split_place(place: Place) -> dict[str, str]:
    """Return where layers are, by side, whose name is empty in a model with one list of layers."""
    return {"": place} if isinstance(place, str) else place


def find_layer(place: Place, module: str) -> LayerName | None:
    """Return the layer that a module is in, by its name in the base model, or None where it is in none."""
    for side, path in split_place(place).items():
        number, _, rest = module.removeprefix(f"{path}.").partition(".")
        if module.startswith(f"{path}.") and NUMBER.fullmatch(number) and rest:
            return f"{side}.{int(number)}" if side else int(number)
    return None


def are_all(names: Sequence[LayerName], place: Place) -> bool:
    """Return whether ``names`` are those of all layers from the first one of each side on, in their order."""
    sides = split_place(place)
    if not all(isinstance(name, int) or NAME.fullmatch(name) for name in names):
        return False
    found = [split_name(name)[0] for name in names]
    return list(names) == name_layers({side: found.count(side) for side in sides})
