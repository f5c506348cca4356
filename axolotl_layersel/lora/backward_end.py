"""The layer at which the backward pass of a model can end: the lowest one that trains, unless weights below do."""

from collections.abc import Sequence

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.facts import find_text_config
from axolotl_layersel.config.selection import ResolvedSelection, describe_open_end, describe_two_stacks
from axolotl_layersel.lora.layers import LayerStack
from axolotl_layersel.lora.modules import get_base_model


def find_lowest_trained(model: PeftModel, stack: LayerStack) -> int:
    """Return the position of the lowest layer below which no parameter trains; 0 if the pass cannot be cut.

    All layers of an encoder count as below those of its decoder, and those of a vision tower as below the language
    model's. Outside the layers only heads are known to run after them: trained input embeddings or a trained vision
    tower need the gradient of the lowest layer's input. Everything outside a vision tower runs after its layers.
    """
    if list_trained_below(model, stack):
        return 0
    lowest = next(
        (i for i, layer in enumerate(stack.layers) if any(p.requires_grad for p in layer.parameters())),
        len(stack.layers),
    )
    return min(lowest, len(stack.layers) - 1)


def list_trained_below(model: PeftModel, stack: LayerStack) -> list[str]:
    """Return the names of the trained parameters that run before the layers, or may do so; see ``find_lowest_trained``.

    The backward pass must go down to them.
    """
    base = get_base_model(model)
    inside = {id(parameter) for layer in stack.layers for parameter in layer.parameters()}
    after = {id(parameter) for head in find_heads(base) for parameter in head.parameters()}
    after -= {id(parameter) for parameter in list_input_embeddings(base)}  # the two can be tied
    if stack.vision is not None and any(p.requires_grad for layer in stack.vision.layers for p in layer.parameters()):
        tower = {id(parameter) for parameter in base.get_encoder("image").parameters()}
        after = {id(parameter) for parameter in base.parameters()} - tower
    return [
        name.removeprefix("base_model.model.")
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in inside and id(parameter) not in after
    ]


def list_input_embeddings(base: PreTrainedModel) -> list[nn.Parameter]:
    """Return the weights of a model's token embeddings."""
    embeddings = find_input_embeddings(base)
    return [] if embeddings is None else list(embeddings.parameters())


def find_input_embeddings(base: PreTrainedModel) -> nn.Module | None:
    """Return a model's token embeddings; None for CANINE, which reads characters."""
    try:
        return base.get_input_embeddings()
    except NotImplementedError:
        return None


def find_heads(base: PreTrainedModel) -> list[nn.Module]:
    """Return the parts of a model that run after its body: output embeddings, or a classifier.

    In a model with other inputs than text, parts outside the body can run before it.
    """
    output, body = base.get_output_embeddings(), base.base_model
    heads = [] if output is None else [output]
    if body is not base and find_text_config(base.config) is base.config:
        heads += [part for part in base.children() if part is not body]
    return heads


def check_limit(model: PeftModel, stack: LayerStack, settings: ResolvedSelection, removed: Sequence[str] = ()) -> None:
    """Raise LayerselError if no choice of layers could make a step of this model shorter, and ``time`` asks for it.

    ``removed``: names of LoRA modules that the run will not have.
    """
    if settings.time is None:
        return
    if stack.has_decoder:
        raise LayerselError(describe_two_stacks(settings.time, type(get_base_model(model)).__name__))
    gone = tuple(f"{name}." for name in removed)
    trained = [name for name in list_trained_below(model, stack) if not name.startswith(gone)]
    if not trained:
        return
    others = f" and {len(trained) - 1} more" if len(trained) > 1 else ""
    outside = tuple(f"{name}." for names in stack.towers.values() for name in names)
    way_out = "Set `outside_layers: remove`" if all(name.startswith(outside) for name in trained) else "Freeze them"
    raise LayerselError(describe_open_end(settings.time, f"{trained[0]}{others}", f"{way_out}, or remove `time`."))
