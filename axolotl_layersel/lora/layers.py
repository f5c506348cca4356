"""Find the layers of a model's language model, encoder and decoder, or vision tower, and the LoRA modules in them."""

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

# Under what names configurations say how many layers a decoder has beside an encoder.
DECODER_COUNTS = ("num_decoder_layers", "decoder_layers")


@dataclass(frozen=True)
class Side:
    """Layers that run one after the other: all of a model, or those of its encoder or its decoder.

    Attributes:
        name: one of ``layer_names.SIDES``, or empty where the layers are called by their numbers.
        path: where they are in the base model, such as ``model.layers``.
        layers: the layers, lowest first.
        owner: the module that runs them and ends in the final norm, if the model has one.
    """

    name: str
    path: str
    layers: nn.ModuleList
    owner: nn.Module


@dataclass(frozen=True)
class LayerStack:
    """The layers that are chosen among, known by their position in the order that they run.

    Those of an encoder come before those of the decoder, which reads what the last one of them returns, and those of a
    vision tower before those of the language model.

    Attributes:
        sides: one, or an encoder and a decoder, or a vision tower and a language model.
        lora_modules: names in the base model of the LoRA modules of each layer that carries any, by its position.
        towers: names of the LoRA modules outside of the layers, by the place that they are in, such as
            ``model.vision_tower``, ``model.multi_modal_projector``, or ``lm_head``.
        beside: the language model, where a vision tower's layers alone are chosen among.
        idle: positions of layers of whose output the model makes nothing.
    """

    sides: list[Side]
    lora_modules: dict[int, list[str]]
    towers: dict[str, list[str]]
    beside: list[Side] = field(default_factory=list)
    idle: frozenset[int] = frozenset()

    @functools.cached_property
    def layers(self) -> list[nn.Module]:
        """All layers."""
        return [layer for side in self.sides for layer in side.layers]

    @functools.cached_property
    def side_of(self) -> list[int]:
        """The place in ``sides`` of each layer's side."""
        return [place for place, side in enumerate(self.sides) for _ in side.layers]

    @functools.cached_property
    def names(self) -> list[LayerName]:
        """What the layers are called: by their number, or ``encoder.3`` and ``decoder.3`` where there are both."""
        return name_layers({side.name: len(side.layers) for side in self.sides})

    @functools.cached_property
    def paths(self) -> list[str]:
        """Where each layer is in the base model, such as ``model.layers.3``."""
        return [f"{side.path}.{number}" for side in self.sides for number in range(len(side.layers))]

    @property
    def place(self) -> Place:
        """Where the layers are in the base model, as a plan says it."""
        paths = {side.name: side.path for side in self.sides}
        return paths.get("", paths)

    @property
    def has_decoder(self) -> bool:
        """Whether there is a decoder beside an encoder, which reads tokens of its own."""
        return any(side.name == "decoder" for side in self.sides)

    @property
    def vision(self) -> Side | None:
        """The vision tower's layers, where they are chosen among."""
        return next((side for side in self.sides if side.name == VISION), None)

    def list_modules(self, layers: Iterable[int]) -> list[str]:
        """Return the names of the LoRA modules of ``layers``, in their order."""
        return [name for layer in layers for name in self.lora_modules[layer]]


def find_layer_stack(model: PeftModel, stacks: str = "language") -> LayerStack:
    """Return the layers that LoRA is in: the language model's, or those of both an encoder and a decoder.

    ``stacks``: a key of ``STACKS``; a vision tower is not taken for the layers unless it says so, an audio tower never.

    Raises:
        LayerselError: if none, or more than one list of layers, could be meant, or there is no vision tower.
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
    idle = (
        frozenset(range(count_read(base, sides[0]), len(sides[0].layers))) if sides[0].name == VISION else frozenset()
    )
    return LayerStack(sides, modules, towers, beside, idle)


def find_both_sides(base: PreTrainedModel) -> list[Side]:
    """Return the encoder's and the decoder's layers of a model that has both; nothing of another model."""
    if not read_fact(base.config, "is_encoder_decoder"):
        return []
    found = [find_lists(base, part) for part in (base.get_encoder(), base.get_decoder())]
    if [len(lists) for lists in found] != [1, 1] or found[0] == found[1]:
        return []
    return [make_side(base, name, path) for name, (path,) in zip(ENCODER_DECODER, found)]


def find_vision_side(base: PreTrainedModel, stacks: str) -> Side:
    """Return the layers of a model's vision tower, for a setting of ``stacks`` that asks for them.

    Transformers 5.16.1 looks for the tower by names, and returns the model itself where it has none.

    Raises:
        LayerselError: if there is no such tower, or it has no one list of layers.
    """
    tower, config = base.get_encoder("image"), base.config
    if tower in (base, base.base_model) or read_fact(config, "is_encoder_decoder"):
        raise LayerselError(describe_missing_tower(stacks, type(base).__name__))
    expected = list_layer_counts(tower.config) if hasattr(tower, "config") else []
    paths = find_lists(base, tower, expected)
    if len(paths) != 1:
        raise LayerselError(
            f"layersel.selection.stacks: {stacks!r} chooses among the layers of a vision tower, and in the "
            f"{type(tower).__name__} of {type(base).__name__} it cannot be told which they are: {len(paths)} lists of "
            f"{' or '.join(map(str, expected)) or 'an unknown number of'} modules are outermost. Use `stacks: "
            "language`."
        )
    return make_side(base, VISION, paths[0])


def describe_missing_tower(stacks: str, model: str) -> str:
    """Return the message for a setting of ``stacks`` that asks for a vision tower that ``model`` has not."""
    return (
        f"layersel.selection.stacks: {stacks!r} chooses among the layers of a vision tower, and {model} has no vision "
        "tower beside a language model. Remove `stacks`, or use a model such as LLaVA, Qwen2.5-VL or Gemma 3."
    )


def count_read(base: PreTrainedModel, vision: Side) -> int:
    """Return how many of a vision tower's layers, from the lowest on, the model makes something of.

    LLaVA and its like read the hidden states that ``vision_feature_layer`` says, of which 0 are the embeddings: by
    default not the last ones. What the layers above add is thrown away, and LoRA there gets no gradient.
    """
    layers, read = len(vision.layers), read_fact(base.config, "vision_feature_layer")
    if read is None:
        return layers
    places = [read] if isinstance(read, int) else list(read)
    return max(place if place >= 0 else layers + 1 + place for place in places)


def find_language_side(base: PreTrainedModel, lora_names: list[str], name: str = "") -> Side:
    """Return the layers of the language model, some of which carry the LoRA modules ``lora_names``.

    With a ``name``, LoRA may be in other sides alone.

    Raises:
        LayerselError: if none, or more than one list of layers, could be meant.
    """
    found = find_lists(base, find_language_model(base), outermost=False)
    carrying = [path for path in found if any(lora.startswith(f"{path}.") for lora in lora_names)]
    paths = keep_outermost(carrying or (found if name else []))
    if len(paths) != 1:
        several = "more than one stack of layers carries LoRA"
        raise refuse(base, several if paths else "no stack of layers that carries LoRA")
    return make_side(base, name, paths[0])


def make_side(base: PreTrainedModel, name: str, path: str) -> Side:
    """Return the layers at ``path`` in a model as the side ``name``."""
    layers = base.get_submodule(path)
    assert isinstance(layers, nn.ModuleList), "only such are looked for"
    return Side(name, path, layers, base.get_submodule(path.rpartition(".")[0]))


def find_lists(
    base: PreTrainedModel, part: nn.Module, expected: list[int] | None = None, outermost: bool = True
) -> list[str]:
    """Return where in a model there are as many modules as it may have layers, within one ``part`` of it.

    The part may have a configuration of its own, as the sides of T5Gemma do. ``expected``: how many layers it may have,
    by default what these configurations say of a language model.
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
    """Return the names of modules that lie in none of the others.

    A mixture of experts may have as many experts as layers, and a layer of T5 as many parts: the outer list is meant.
    """
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def refuse(base: PreTrainedModel, problem: str) -> LayerselError:
    """Return the error for a model whose layers cannot be told."""
    found = {name: module for name, module in base.named_modules() if isinstance(module, nn.ModuleList)}
    lists = ", ".join(f"{name} ({len(module)})" for name, module in found.items()) or "none"
    counts = " or ".join(map(str, list_layer_counts(find_text_config(base.config)))) or "no number of"
    return LayerselError(
        f"lora_target_modules: {problem} was found in {type(base).__name__}, whose configuration says {counts} "
        f"layers (lists of modules in it: {lists}). Target linear modules inside the language model's layers, such "
        "as q_proj and v_proj; other architectures are not supported."
    )


def check_layers_apart(base: PreTrainedModel) -> None:
    """Raise LayerselError where layers share their weights, as in ALBERT."""
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
    """Return the part of a model that reads tokens: of a multimodal one the language model alone.

    Of a text model it is all of it or its body. Transformers 5.16.1 looks for it by names, ``decoder`` among them,
    which is what ModernBERT calls the output layer of its masked language model.
    """
    found = base.get_decoder()
    has_layers = any(isinstance(module, nn.ModuleList) for module in found.modules())
    return found if has_layers else base.base_model


def list_layer_counts(config: PreTrainedConfig) -> list[int]:
    """Return how many layers the language model may have: those of a decoder may be others than those of an encoder.

    GPT-2 and others map their own name to ``num_hidden_layers``; T5 and BART have the next ones for their decoders, and
    vision towers of Qwen-VL the next. LongCat counts the two attentions of each layer in the first, its layers in the
    last.
    """
    counts = [read_fact(config, name) for name in ("num_hidden_layers", *DECODER_COUNTS, "depth", "num_layers")]
    return list(dict.fromkeys(count for count in counts if isinstance(count, int) and count))


def find_layer_counts(config: PreTrainedConfig, sides: Sequence[str]) -> dict[str, int] | None:
    """Return how many layers a model of a configuration has on each of ``sides``; None where that is not known.

    ``sides``: a value of ``STACKS``, or ``ENCODER_DECODER``.
    """
    found = {side: list_side_counts(config, side) for side in sides}
    known = all(len(counts) == 1 for counts in found.values())
    return {side: counts[0] for side, counts in found.items()} if known else None


def list_side_counts(config: PreTrainedConfig, side: str) -> list[int]:
    """Return how many layers one side of a model may have, as its configuration says."""
    if side == VISION:
        return list_layer_counts(config.vision_config) if read_fact(config, "vision_config") else []
    if side in ENCODER_DECODER and read_fact(config, side):
        return list_layer_counts(find_text_config(read_fact(config, side)))
    text = find_text_config(config)
    if not read_fact(config, "is_encoder_decoder"):
        return list_layer_counts(text)
    if side == ENCODER_DECODER[0]:  # of a composite model it is another part, such as one that reads images
        return list_layer_counts(text)[:1] if text is config else []
    own = [count for name in DECODER_COUNTS if (count := read_fact(text, name))]
    return own or list_layer_counts(text)[:1]


def find_tower(module: str, stacks: list[str]) -> str:
    """Return the outermost part of the model around ``module`` that holds none of the layers at ``stacks``."""
    parts = module.split(".")

    def count_shared(stack: str) -> int:
        others = stack.split(".")
        return next(i for i, part in enumerate(parts) if others[i : i + 1] != [part])

    return ".".join(parts[: max(map(count_shared, stacks)) + 1])
