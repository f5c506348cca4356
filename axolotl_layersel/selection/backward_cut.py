"""Stop the backward pass at the lowest layer that trains, instead of at the embeddings."""

import functools
import itertools
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from axolotl_layersel.config.facts import find_text_config
from axolotl_layersel.engines.trainers import needs_differentiable_inputs, remove_embedding_hooks
from axolotl_layersel.lora.layers import LayerStack
from axolotl_layersel.lora.modules import get_base_model


def find_lowest_trained(model: PeftModel, stack: LayerStack) -> int:
    """Return the position of the lowest layer below which no parameter trains; 0 if the pass cannot be cut.

    All layers of an encoder count as below those of its decoder, and those of a vision tower as below the language
    model's. Outside the layers only heads are known to run after them: trained input embeddings or a trained vision
    tower need the gradient of the lowest layer's input. Everything outside a vision tower runs after its layers.
    """
    base = get_base_model(model)
    lowest = next(
        (i for i, layer in enumerate(stack.layers) if any(p.requires_grad for p in layer.parameters())),
        len(stack.layers),
    )
    inside = {id(parameter) for layer in stack.layers for parameter in layer.parameters()}
    after = {id(parameter) for head in find_heads(base) for parameter in head.parameters()}
    after -= {id(parameter) for parameter in list_input_embeddings(base)}  # the two can be tied
    if stack.vision is not None and lowest < len(stack.vision.layers):
        tower = {id(parameter) for parameter in base.get_encoder("image").parameters()}
        after = {id(parameter) for parameter in base.parameters()} - tower
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in inside and id(parameter) not in after:
            return 0
    return min(lowest, len(stack.layers) - 1)


def list_input_embeddings(base: PreTrainedModel) -> list[nn.Parameter]:
    """Return the weights of a model's token embeddings; CANINE, which reads characters, has none."""
    try:
        embeddings = base.get_input_embeddings()
    except NotImplementedError:
        return []
    return [] if embeddings is None else list(embeddings.parameters())


def find_heads(base: PreTrainedModel) -> list[nn.Module]:
    """Return the parts of a model that run after its body: output embeddings, or a classifier.

    In a model with other inputs than text, parts outside the body can run before it.
    """
    output, body = base.get_output_embeddings(), base.base_model
    heads = [] if output is None else [output]
    if body is not base and find_text_config(base.config) is base.config:
        heads += [part for part in base.children() if part is not body]
    return heads


class TruncatedBackward:
    """The backward pass of a model in training, cut below the lowest layer that trains.

    Gradients above are unchanged, with gradient checkpointing (reentrant or not) or without. Layers below keep no graph
    and are not computed again. If the lowest layer is a decoder's, the encoder has no graph.
    """

    def __init__(self, model: PeftModel, stack: LayerStack) -> None:
        self.model = model
        self.stack = stack
        self.lowest = find_lowest_trained(model, stack)
        self.handles: list[torch.utils.hooks.RemovableHandle] = []

    def install(self) -> None:
        """Cut the backward pass. Call it at ``on_train_begin``, when the trainer has set up checkpointing."""
        base: Any = get_base_model(self.model)
        enable = base.gradient_checkpointing_enable

        @functools.wraps(enable)
        def enable_above(*args: Any, **kwargs: Any) -> None:
            enable(*args, **kwargs)
            self.leave_out()

        # TRL's trainers set up checkpointing again in every step.
        base.gradient_checkpointing_enable = enable_above
        self.leave_out()
        if self.lowest == 0:
            return
        starts = [self.stack.layers[self.lowest - 1]] if needs_differentiable_inputs(self.model) else []
        if self.stack.vision is not None and self.lowest <= len(self.stack.vision.layers):
            # A row without an image does not run the vision tower, so the graph cannot start at the tower's end. If
            # only the tower trains, such a row would have no gradient at all.
            starts = starts if self.lowest < len(self.stack.vision.layers) else []
            starts.append(get_base_model(self.model).get_input_embeddings())
        self.handles = [module.register_forward_hook(start_graph) for module in starts]

    def leave_out(self) -> None:
        """Exclude layers without a backward pass from checkpointing."""
        if self.lowest == 0:
            self.start_tower()
            return
        remove_embedding_hooks(self.model)
        # Their parts too: under checkpointing T5's cross-attention would start a graph of its own.
        for layer in self.stack.layers[: self.lowest]:
            keep_from_checkpointing(layer)

    def start_tower(self) -> None:
        """Exclude the lowest trained layer of a vision tower from checkpointing, which would give it no gradient.

        Transformers 5.16.1 makes the inputs of most towers require a gradient, but not those of Qwen3-VL.
        """
        if self.stack.vision is None or not needs_differentiable_inputs(self.model):
            return
        layers = (layer for layer in self.stack.vision.layers if any(p.requires_grad for p in layer.parameters()))
        for lowest in itertools.islice(layers, 1):
            keep_from_checkpointing(lowest)

    def remove(self) -> None:
        """Remove the cut."""
        vars(get_base_model(self.model)).pop("gradient_checkpointing_enable", None)
        while self.handles:
            self.handles.pop().remove()


def keep_from_checkpointing(layer: nn.Module) -> None:
    """Turn checkpointing off in all parts of a layer."""
    parts: list[Any] = list(layer.modules())
    for module in parts:
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False


def start_graph(layer: nn.Module, args: tuple, output: torch.Tensor | tuple) -> None:
    """Make a layer's output the leaf where gradients end; reentrant checkpointing above needs one."""
    hidden = output if isinstance(output, torch.Tensor) else output[0]
    if torch.is_grad_enabled() and hidden.is_leaf:
        hidden.requires_grad_(True)
