"""The layers that may be chosen, and how many units are kept."""

from collections.abc import Mapping, Sequence

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.layer_names import (
    ENCODER_DECODER,
    STACKS,
    LayerName,
    format_names,
    name_layers,
    split_name,
)
from axolotl_layersel.config.selection import ResolvedSelection, count_share
from axolotl_layersel.lora.layers import LayerStack


def find_candidates(settings: ResolvedSelection, stack: LayerStack) -> list[int]:
    """Return the positions of the layers that may be chosen, ascending.

    Raises:
        LayerselError: if a layer named in the settings does not exist, carries no LoRA, or is not read by the model.
    """
    carrying = [stack.names[layer] for layer in sorted(stack.lora_modules) if layer not in stack.idle]
    for key in ("layers", "candidates"):
        named: list[LayerName] = getattr(settings, key) or []
        check_naming(key, named, [side.name for side in stack.sides], settings.stacks, "this model")
        check_range(key, named, {side.name: len(side.layers) for side in stack.sides})
        idle = [name for name in named if stack.names.index(name) in stack.idle]
        if idle:
            raise LayerselError(
                f"layersel.selection.{key}: layers {format_names(idle)} lie above what the model reads of its vision "
                "tower (vision_feature_layer in its configuration), so LoRA in them learns nothing. Remove them from "
                "the list."
            )
        bare = [name for name in named if name not in carrying]
        if bare:
            raise LayerselError(
                f"layersel.selection.{key}: layers {format_names(bare)} carry no LoRA under these lora_target_modules. "
                "Remove them from the list, or target modules in them."
            )
    return [stack.names.index(name) for name in settings.candidates or carrying]


# By the sides of a selection: the parts of such a model, and how its layers are named.
WAYS = {
    STACKS["language"]: ("has one list of layers", "by their numbers, such as [0, 1, 5]"),
    ENCODER_DECODER: ("has an encoder and a decoder", "such as [encoder.3, decoder.0]"),
    STACKS["vision"]: ("has them in its vision tower under `stacks: vision`", "such as [vision.0, vision.3]"),
    STACKS["both"]: ("has them in two stacks under `stacks: both`", "such as [vision.3, language.0]"),
}


def check_naming(key: str, named: list[LayerName], sides: Sequence[str], stacks: str, model: str) -> None:
    """Raise LayerselError for layers that are named as in a model of another kind, or under another ``stacks``.

    Args:
        key: the key that names them.
        named: the layers, all named in one way.
        sides: names of the sides of the selection, see ``layers.Side``.
        stacks: the setting.
        model: its name in the message.
    """
    others = {split_name(name)[0] for name in named} - set(sides)
    if not others:
        return
    kind, way = WAYS[tuple(sides)]
    if stacks == "language" and others & set(STACKS["both"]):
        way += ", or set `stacks: both`, or `stacks: vision`, whose layers are named so"
    raise LayerselError(
        f"layersel.selection.{key}: {format_names(named)} is not how the layers of {model} are named, which {kind}. "
        f"Name them {way}."
    )


def check_range(key: str, named: list[LayerName], counts: Mapping[str, int]) -> None:
    """Raise LayerselError for layers, named under ``key``, that a model with these ``counts`` by side does not have."""
    names = [name_layers({side: count}) for side, count in counts.items()]
    outside = [name for name in named if not any(name in side for side in names)]
    if outside:
        known = " and ".join(f"{side[0]} to {side[-1]}" for side in names)
        raise LayerselError(
            f"layersel.selection.{key}: {format_names(outside)} are out of range: the model's layers are {known}."
        )


def count_kept(settings: ResolvedSelection, candidates: int, what: str = "layers") -> int:
    """Return how many of so many candidates, named ``what`` in messages, are kept.

    Raises:
        LayerselError: if that is 0, or more than there are.
    """
    key, number = ("num_layers", settings.num_layers) if what == "layers" else ("num_units", settings.num_units)
    if number is not None:
        if number > candidates:
            raise LayerselError(
                f"layersel.selection.{key}: {number} is more than the {candidates} {what} that can be chosen. Set it "
                f"to at most {candidates}."
            )
        return number
    ratio = settings.ratio
    assert ratio is not None, "settings as they take effect say how much is kept"
    keep = count_share(ratio, candidates)
    if keep == 0:
        raise LayerselError(
            f"layersel.selection.ratio: {ratio} of {candidates} {what} keeps none. Set at least "
            f"{1 / candidates:.3f}, or `{key}: 1`."
        )
    return keep
