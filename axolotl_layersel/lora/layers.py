"""Find the layers of a language model, an encoder-decoder or a vision tower, and the LoRA modules in them."""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.facts import find_text_config, read_fact
from axolotl_layersel.config.layer_names import ENCODER_DECODER, LANGUAGE, STACKS, VISION, LayerName, Place, name_layers
from axolotl_layersel.lora.modules import find_lora_modules, get_adapter_name, get_base_model

# Configuration keys for the number of decoder layers in an encoder-decoder model.
DECODER_COUNTS = ("num_decoder_layers", "decoder_layers")


@dataclass(frozen=True)
class Side:
    """A sequence of layers: all of a model, or those of its encoder, decoder or vision tower.

    Attributes:
        name: one of ``layer_names.SIDES``, or empty if layers are called by their numbers.
        path: name of their list in the base model, such as ``model.layers``.
        layers: the layers, lowest first.
        owner: the module that runs them, with the final norm if there is one.
    """

    name: str
    path: str
    layers: nn.ModuleList
    owner: nn.Module


@dataclass(frozen=True)
class LayerStack:
    """The candidate layers, indexed by their position in the order that they run.

    An encoder's layers come before the decoder's, and a vision tower's before the language model's.

    Attributes:
        sides: one side, or an encoder and a decoder, or a vision tower and a language model.
        lora_modules: names in the base model of each layer's LoRA modules, by position.
        towers: names of the LoRA modules outside the layers, by the part of the model that holds them, such as
            ``model.vision_tower``, ``model.multi_modal_projector``, or ``lm_head``.
        beside: the language model, if only a vision tower's layers are candidates.
        idle: positions of layers whose output the model discards.
    """

    sides: list[Side]
    lora_modules: dict[int, list[str]]
    towers: dict[str, list[str]]
    beside: list[Side] = field(default_factory=list)
    idle: frozenset[int] = frozenset()

    @functools.cached_property
    def layers(self) -> list[nn.Module]:
        return [layer for side in self.sides for layer in side.layers]

    @functools.cached_property
    def side_of(self) -> list[int]:
        """The index in ``sides`` of each layer's side."""
        return [place for place, side in enumerate(self.sides) for _ in side.layers]

    @functools.cached_property
    def names(self) -> list[LayerName]:
        """The names of the layers: their numbers, or names such as ``encoder.3`` if there are two sides."""
        return name_layers({side.name: len(side.layers) for side in self.sides})

    @functools.cached_property
    def paths(self) -> list[str]:
        """The name of each layer in the base model, such as ``model.layers.3``."""
        return [f"{side.path}.{number}" for side in self.sides for number in range(len(side.layers))]

    @property
    def place(self) -> Place:
        """The names of the layer lists in the base model, as a plan records them."""
        paths = {side.name: side.path for side in self.sides}
        return paths.get("", paths)

    @property
    def has_decoder(self) -> bool:
        """Whether the model has an encoder and a decoder, which reads tokens of its own."""
        return any(side.name == "decoder" for side in self.sides)

    @property
    def vision(self) -> Side | None:
        """The vision tower's layers, if they are candidates."""
        return next((side for side in self.sides if side.name == VISION), None)

    def list_modules(self, layers: Iterable[int]) -> list[str]:
        """Return the names of the LoRA modules of ``layers``, in order."""
        return [name for layer in layers for name in self.lora_modules[layer]]


def find_layer_stack(model: PeftModel, stacks: str = "language") -> LayerStack:
    """Return the candidate layers: the language model's, those of an encoder-decoder, or as ``stacks`` says.

    ``stacks``: a key of ``STACKS``. Audio towers are never candidates.

    Raises:
        LayerselError: if the list of layers is missing or ambiguous, or there is no vision tower.
    """
    base = get_base_model(model)
    check_layers_apart(base)
    lora_names = list(find_lora_modules(base, get_adapter_name(model)))
    beside: list[Side] = []
    if VISION in STACKS[stacks]:
        sides = [find_vision_side(base, stacks), find_language_side(base, lora_names, LANGUAGE)]
        if stacks == "vision":
            beside = [sides.pop()]
    else:
        sides = find_both_sides(base) or [find_language_side(base, lora_names)]
    modules: dict[int, list[str]] = {}
    towers: dict[str, list[str]] = {}
    bare = LayerStack(sides, {}, {})
    for lora in lora_names:
        layer = next((i for i, path in enumerate(bare.paths) if lora.startswith(f"{path}.")), None)
        if layer is None:
            towers.setdefault(find_tower(lora, [side.path for side in sides]), []).append(lora)
        else:
            modules.setdefault(layer, []).append(lora)
    if not modules:
        raise refuse(base, "no stack of layers that carries LoRA")
    unread = range(count_read(base, sides[0]), len(sides[0].layers)) if sides[0].name == VISION else ()
    return LayerStack(sides, modules, towers, beside, frozenset(unread))


def find_both_sides(base: PreTrainedModel) -> list[Side]:
    """Return the encoder's and the decoder's layers, or an empty list if the model does not have both."""
    if not read_fact(base.config, "is_encoder_decoder"):
        return []
    found = [find_lists(base, part) for part in (base.get_encoder(), base.get_decoder())]
    if [len(lists) for lists in found] != [1, 1] or found[0] == found[1]:
        return []
    return [make_side(base, name, path) for name, (path,) in zip(ENCODER_DECODER, found)]


def find_vision_side(base: PreTrainedModel, stacks: str) -> Side:
    """Return the layers of a model's vision tower, which the setting ``stacks`` asks for.

    Raises:
        LayerselError: if there is no such tower, or its list of layers is missing or ambiguous.
    """
    tower, config = base.get_encoder("image"), base.config
    # Transformers 5.16.1 finds the tower by name, and returns the model itself if there is none.
    if tower in (base, base.base_model) or read_fact(config, "is_encoder_decoder"):
        raise LayerselError(describe_missing_tower(stacks, type(base).__name__))
    expected = list_layer_counts(tower.config) if hasattr(tower, "config") else []
    paths = find_lists(base, tower, expected)
    if len(paths) != 1:
        raise LayerselError(
            f"layersel.selection.stacks: {stacks!r} chooses among the layers of a vision tower, but the "
            f"{type(tower).__name__} of {type(base).__name__} has {len(paths)} outermost lists of "
            f"{' or '.join(map(str, expected)) or 'an unknown number of'} modules, not one. Use `stacks: language`."
        )
    return make_side(base, VISION, paths[0])


def describe_missing_tower(stacks: str, model: str) -> str:
    """Return the message for a setting of ``stacks`` that needs a vision tower, which ``model`` lacks."""
    return (
        f"layersel.selection.stacks: {stacks!r} chooses among the layers of a vision tower, and {model} has no vision "
        "tower beside a language model. Remove `stacks`, or use a model such as LLaVA, Qwen2.5-VL or Gemma 3."
    )


def count_read(base: PreTrainedModel, vision: Side) -> int:
    """Return how many of a vision tower's layers, counted from the lowest, affect the output.

    LLaVA and similar models read the hidden states ``vision_feature_layer``, where 0 are the embeddings, and by default
    not the last ones. LoRA in the layers above gets no gradient.
    """
    layers, read = len(vision.layers), read_fact(base.config, "vision_feature_layer")
    if read is None:
        return layers
    places = [read] if isinstance(read, int) else list(read)
    return max(place if place >= 0 else layers + 1 + place for place in places)


def find_language_side(base: PreTrainedModel, lora_names: list[str], name: str = "") -> Side:
    """Return the layers of the language model, which must carry LoRA unless the side has a ``name``.

    Raises:
        LayerselError: if the list of layers is missing or ambiguous.
    """
    found = find_lists(base, find_language_model(base), outermost=False)
    carrying = [path for path in found if any(lora.startswith(f"{path}.") for lora in lora_names)]
    paths = keep_outermost(carrying or (found if name else []))
    if len(paths) != 1:
        several = "more than one stack of layers carries LoRA"
        raise refuse(base, several if paths else "no stack of layers that carries LoRA")
    return make_side(base, name, paths[0])


def make_side(base: PreTrainedModel, name: str, path: str) -> Side:
    layers = base.get_submodule(path)
    assert isinstance(layers, nn.ModuleList), "find_lists returns only these"
    return Side(name, path, layers, base.get_submodule(path.rpartition(".")[0]))


def find_lists(
    base: PreTrainedModel, part: nn.Module, expected: list[int] | None = None, outermost: bool = True
) -> list[str]:
    """Return the names of the module lists in one ``part`` of a model that have as many entries as it may have layers.

    ``expected``: possible numbers of layers; default: from the configurations of the model and the part, which has its
    own in models such as T5Gemma.
    """
    if expected is None:
        configs = [base.config, getattr(part, "config", base.config)]
        expected = [count for config in configs for count in list_layer_counts(find_text_config(config))]
    within = {id(module) for module in part.modules()}
    found = [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) in expected and id(module) in within
    ]
    return keep_outermost(found) if outermost else found


def keep_outermost(names: list[str]) -> list[str]:
    """Return the names that are not inside another one.

    A model may have as many experts in a layer, or parts in a layer of T5, as layers: the outer list holds the layers.
    """
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def refuse(base: PreTrainedModel, problem: str) -> LayerselError:
    found = {name: module for name, module in base.named_modules() if isinstance(module, nn.ModuleList)}
    lists = ", ".join(f"{name} ({len(module)})" for name, module in found.items()) or "none"
    counts = " or ".join(map(str, list_layer_counts(find_text_config(base.config)))) or "no number of"
    return LayerselError(
        f"lora_target_modules: {problem} was found in {type(base).__name__}, whose configuration says {counts} "
        f"layers (lists of modules in it: {lists}). Target linear modules inside the language model's layers, such "
        "as q_proj and v_proj; other architectures are not supported."
    )


def check_layers_apart(base: PreTrainedModel) -> None:
    """Raise LayerselError if layers share their weights, as in ALBERT."""
    config = find_text_config(base.config)
    groups, layers = read_fact(config, "num_hidden_groups"), read_fact(config, "num_hidden_layers")
    if groups is not None and layers is not None and groups < layers:
        sets = "one set" if groups == 1 else f"{groups} sets"
        raise LayerselError(
            f"base_model: the {layers} layers of {type(base).__name__} share {sets} of weights, so LoRA there is in "
            "all of them at once, and none of them can be chosen or left out. Use a model whose layers have weights of "
            "their own, such as BERT, or `l1ra` without `selection`, which moves rank between the modules they share."
        )


def find_language_model(base: PreTrainedModel) -> nn.Module:
    """Return the part of a model that reads tokens: the language model of a multimodal one, otherwise the body."""
    # Transformers 5.16.1 finds it by name. ModernBERT has a ``decoder`` that is only an output layer, without layers.
    found = base.get_decoder()
    has_layers = any(isinstance(module, nn.ModuleList) for module in found.modules())
    return found if has_layers else base.base_model


def list_layer_counts(config: PreTrainedConfig) -> list[int]:
    """Return the possible numbers of layers, of which an encoder and a decoder may have different ones.

    ``depth`` is the key of Qwen-VL's vision towers. LongCat counts attentions, two per layer, in ``num_hidden_layers``,
    and layers in ``num_layers``.
    """
    counts = [read_fact(config, name) for name in ("num_hidden_layers", *DECODER_COUNTS, "depth", "num_layers")]
    return list(dict.fromkeys(count for count in counts if isinstance(count, int) and count))


def find_layer_counts(config: PreTrainedConfig, sides: Sequence[str]) -> dict[str, int] | None:
    """Return the number of layers of each side by a model's configuration, or None if it is ambiguous.

    ``sides``: a value of ``STACKS``, or ``ENCODER_DECODER``.
    """
    found = {side: list_side_counts(config, side) for side in sides}
    known = all(len(counts) == 1 for counts in found.values())
    return {side: counts[0] for side, counts in found.items()} if known else None


def list_side_counts(config: PreTrainedConfig, side: str) -> list[int]:
    """Return the possible numbers of layers of one side, by a model's configuration."""
    if side == VISION:
        return list_layer_counts(config.vision_config) if read_fact(config, "vision_config") else []
    if side in ENCODER_DECODER and read_fact(config, side):
        return list_layer_counts(find_text_config(read_fact(config, side)))
    text = find_text_config(config)
    if not read_fact(config, "is_encoder_decoder"):
        return list_layer_counts(text)
    if side == ENCODER_DECODER[0]:  # in a composite model the encoder is another part, such as one for images
        return list_layer_counts(text)[:1] if text is config else []
    own = [count for name in DECODER_COUNTS if (count := read_fact(text, name))]
    return own or list_layer_counts(text)[:1]


def find_tower(module: str, stacks: list[str]) -> str:
    """Return the outermost part of the model that holds ``module`` and none of the layers at ``stacks``."""
    parts = module.split(".")

    def count_shared(stack: str) -> int:
        others = stack.split(".")
        return next(i for i, part in enumerate(parts) if others[i : i + 1] != [part])

    return ".".join(parts[: max(map(count_shared, stacks)) + 1])
