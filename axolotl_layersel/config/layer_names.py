"""Names of layers: a number, or a side and a number such as ``encoder.3`` in models with several stacks."""

import re
from collections.abc import Iterable, Mapping, Sequence

LayerName = int | str
# The path of the layers in the base model, such as ``model.layers``, or one path by side.
Place = str | dict[str, str]
ENCODER_DECODER = ("encoder", "decoder")
VISION, LANGUAGE = "vision", "language"
# By the value of `stacks`: the sides to choose from. The names are plain numbers only with `language`.
STACKS = {"language": ("",), "vision": (VISION,), "both": (VISION, LANGUAGE)}
# In the order in which they run.
SIDES = (*ENCODER_DECODER, VISION, LANGUAGE)
NUMBER = re.compile("0|[1-9][0-9]{0,8}")
NAME = re.compile(rf"({'|'.join(SIDES)})\.({NUMBER.pattern})")


def name_layers(counts: Mapping[str, int]) -> list[LayerName]:
    """Return the names of layers, in the order in which they run.

    Args:
        counts: the number of layers by side; the side is empty in a model with one stack.
    """
    return [f"{side}.{number}" if side else number for side, count in counts.items() for number in range(count)]


def is_layer_name(text: str) -> bool:
    """Return whether ``text`` is the name of a layer, as opposed to a group or a module."""
    return text.isdecimal() or NAME.fullmatch(text) is not None


def split_name(name: LayerName) -> tuple[str, int]:
    """Return the side of a layer, empty in a model with one stack, and its number in it."""
    if isinstance(name, int):
        return "", name
    side, _, number = name.partition(".")
    return side, int(number)


def sort_names(names: Iterable[LayerName]) -> list[LayerName]:
    """Return names of layers in the order in which the layers run."""
    order = ["", *SIDES]

    def find_order(name: LayerName) -> tuple[int, int]:
        side, number = split_name(name)
        return order.index(side), number

    return sorted(names, key=find_order)


def format_names(names: Iterable[LayerName]) -> str:
    """Return names of layers as a list in YAML."""
    return f"[{', '.join(map(str, names))}]"


def split_place(place: Place) -> dict[str, str]:
    """Return the paths of layers by side, which is empty in a model with one stack."""
    return {"": place} if isinstance(place, str) else place


def find_layer(place: Place, module: str) -> LayerName | None:
    """Return the layer that contains a module, given the module's name in the base model; None if no layer does."""
    for side, path in split_place(place).items():
        number, _, rest = module.removeprefix(f"{path}.").partition(".")
        if module.startswith(f"{path}.") and NUMBER.fullmatch(number) and rest:
            return f"{side}.{int(number)}" if side else int(number)
    return None


def are_all(names: Sequence[LayerName], place: Place) -> bool:
    """Return whether ``names`` start at the first layer of each side and leave out none, in order."""
    sides = split_place(place)
    if not all(isinstance(name, int) or NAME.fullmatch(name) for name in names):
        return False
    found = [split_name(name)[0] for name in names]
    return list(names) == name_layers({side: found.count(side) for side in sides})
