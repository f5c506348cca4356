"""Stop the backward pass at the lowest layer that trains, instead of at the embeddings."""

import functools
import itertools
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from axolotl_layersel.engines.trainers import needs_differentiable_inputs, remove_embedding_hooks
from axolotl_layersel.lora.backward_end import find_input_embeddings, find_lowest_trained
from axolotl_layersel.lora.layers import LayerStack
from axolotl_layersel.lora.modules import get_base_model


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
        self.left_out: list[Any] = []  # modules below whose checkpointing was turned off
        self.opened: torch.utils.hooks.RemovableHandle | None = None

    def install(self) -> None:
        """Cut the backward pass. Call it at ``on_train_begin``, when the trainer has set up checkpointing."""
        base: Any = get_base_model(self.model)
        enable = base.gradient_checkpointing_enable

        @functools.wraps(enable)
        def enable_above(*args: Any, **kwargs: Any) -> None:
            enable(*args, **kwargs)
            if self.opened is None:
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
        found = [part for layer in self.stack.layers[: self.lowest] for part in keep_from_checkpointing(layer)]
        self.left_out = found or self.left_out

    def start_tower(self) -> None:
        """Exclude the lowest trained layer of a vision tower from checkpointing, which would give it no gradient.

        Transformers 5.16.1 makes the inputs of most towers require a gradient, but not those of Qwen3-VL.
        """
        if self.stack.vision is None or not needs_differentiable_inputs(self.model):
            return
        layers = (layer for layer in self.stack.vision.layers if any(p.requires_grad for p in layer.parameters()))
        for lowest in itertools.islice(layers, 1):
            keep_from_checkpointing(lowest)

    def can_open(self) -> bool:
        """Return whether the pass is cut and can run down to the embeddings instead."""
        return self.lowest > 0 and self.stack.vision is None and find_input_embeddings(self.get_base()) is not None

    def open(self) -> None:
        """Let the backward pass run down to the embeddings, as without the cut, until ``close``.

        No weight trains there, so the gradients of all others stay the same. Call it between two optimizer steps, only
        if ``can_open``.
        """
        embeddings = find_input_embeddings(self.get_base())
        assert embeddings is not None and self.opened is None, "it can be opened, and is not open"
        for part in self.left_out:
            part.gradient_checkpointing = True
        # As transformers does it: checkpointing, if reentrant, computes no gradients without it.
        self.opened = embeddings.register_forward_hook(start_graph)

    def close(self) -> None:
        """Cut the backward pass again, if it is open."""
        if self.opened is not None:
            self.opened.remove()
            self.opened = None
            self.leave_out()

    def get_base(self) -> PreTrainedModel:
        return get_base_model(self.model)

    def remove(self) -> None:
        """Remove the cut, also an open one, and checkpoint the layers below again."""
        if self.opened is not None:
            self.opened.remove()
            self.opened = None
        while self.left_out:
            self.left_out.pop().gradient_checkpointing = True
        vars(get_base_model(self.model)).pop("gradient_checkpointing_enable", None)
        while self.handles:
            self.handles.pop().remove()


def keep_from_checkpointing(layer: nn.Module) -> list[Any]:
    """Turn checkpointing off in all parts of a layer, and return those where it was on."""
    parts: list[Any] = list(layer.modules())
    changed = [module for module in parts if getattr(module, "gradient_checkpointing", False)]
    for module in changed:
        module.gradient_checkpointing = False
    return changed


def start_graph(layer: nn.Module, args: tuple, output: torch.Tensor | tuple) -> None:
    """Make the output of a layer, or of embeddings, the leaf where gradients end; reentrant checkpointing needs one."""
    hidden = output if isinstance(output, torch.Tensor) else output[0]
    if torch.is_grad_enabled() and hidden.is_leaf:
        hidden.requires_grad_(True)
