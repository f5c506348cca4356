"""The time of a training step relative to plain LoRA's, by counting floating-point operations of matrix products.

With F operations in the forward pass of the layers, H in that of the output head, and the share u of the layers from
the lowest kept one upwards, a step takes

    F + H + u·B + H                 without gradient checkpointing,
    F + H + u·B + H + u·F           with it, since layers below the lowest kept one are not computed again,

where B is the backward pass: as much as F for the frozen weights, whose own gradient nobody needs, and twice as much as
the forward pass for attention's products and for A and B of LoRA. Plain LoRA has u = 1, also if only upper layers have
it, because Axolotl lets the output of the embeddings require a gradient. Operations are not seconds: memory traffic,
communication and the optimizer are left out.

Everything is counted from sizes, so weights may be on the meta device, packed into 4 bits, or split across processes.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from axolotl_layersel.config.facts import find_text_config, read_fact
from axolotl_layersel.lora.layers import LayerStack
from axolotl_layersel.lora.modules import count_experts

# Modules whose frozen weights read the input of a layer.
INPUTS = ("q_proj", "k_proj", "v_proj")
# Configuration keys for the number of experts that a token runs through.
ACTIVE_EXPERTS = ("num_experts_per_tok", "moe_k", "moe_topk", "num_selected_experts")

Shape = Callable[[torch.Tensor], torch.Size]


@dataclass(frozen=True)
class Work:
    """Operations of a forward pass per token.

    Attributes:
        frozen: of the linear weights of each layer, and of the experts that a token runs through.
        attention: of attention's two products in each layer.
        lora: of LoRA in each layer.
        first: of the frozen weights of each layer that read its input, by which no gradient need pass if it is lowest.
        head: of the output head.
    """

    frozen: list[int]
    attention: list[int]
    lora: list[int]
    first: list[int]
    head: int


def count_work(
    base: PreTrainedModel,
    stack: LayerStack,
    parameters: Mapping[str, int],
    tokens: float,
    find_shape: Shape = lambda weight: weight.shape,
) -> Work:
    """Return the operations of a forward pass per token, in rows of ``tokens`` tokens.

    Args:
        base: the model that carries LoRA.
        stack: its layers.
        parameters: the number of LoRA parameters of each module.
        tokens: the length of a row.
        find_shape: returns the shape of a whole weight, of which this process may hold a part.
    """
    heads = read_size(base, "num_attention_heads")
    width = read_size(base, "head_dim") or (read_size(base, "hidden_size") // heads if heads else 0)
    active = count_active_experts(base)
    frozen, first = [], []
    for layer in stack.layers:
        sizes = {name: count_weights(module, find_shape) for name, module in layer.named_modules() if not is_lora(name)}
        experts = 0
        if active is not None:
            experts = sum(
                count_expert_weights(find_shape(weight), active)
                for name, weight in layer.named_parameters()
                if not is_lora(name)
            )
        frozen.append(2 * (sum(sizes.values()) + experts))
        first.append(2 * sum(size for name, size in sizes.items() if has(name, INPUTS)))
    output = base.get_output_embeddings()
    head = 0 if output is None else 2 * count_output(output, find_shape)
    lora = count_lora_work(base, stack, parameters)
    return Work(frozen, [round(4 * tokens * heads * width)] * len(frozen), lora, first, head)


def count_lora_work(base: PreTrainedModel, stack: LayerStack, parameters: Mapping[str, int]) -> list[int]:
    """Return the operations of LoRA in a forward pass of each layer per token; ``parameters``: see ``count_work``."""
    active, work = count_active_experts(base), []
    for place in range(len(stack.layers)):
        total = 0
        for name in stack.lora_modules.get(place, []):
            module, size = base.get_submodule(name), 2 * parameters.get(name, 0)
            experts = count_experts(module) if isinstance(module, LoraLayer) else 1
            total += size if active is None else size * min(active, experts) // experts
        work.append(total)
    return work


def read_size(base: PreTrainedModel, name: str) -> int:
    """Return a size of the model that reads tokens, such as ``hidden_size``; 0 if its configuration lacks it."""
    value = read_fact(find_text_config(base.config), name)
    return value if isinstance(value, int) else 0


def count_active_experts(base: PreTrainedModel) -> int | None:
    """Return the number of experts that a token runs through; None in a model whose configuration names no number."""
    return next((size for name in ACTIVE_EXPERTS if (size := read_size(base, name))), None)


def is_lora(name: str) -> bool:
    """Return whether a module or a parameter is a part of LoRA, by its name."""
    return any(part.startswith("lora_") for part in name.split("."))


def has(name: str, parts: tuple[str, ...]) -> bool:
    return any(part in name.split(".") for part in parts)


def count_weights(module: nn.Module, find_shape: Shape) -> int:
    """Return the number of weights of a linear module of the base model; 0 for other modules.

    LoRA around a linear module, which tells the same sizes, is one of the others.
    """
    if next(module.children(), None) is not None:
        return 0
    given, returned = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(given, int) and isinstance(returned, int):
        return given * returned
    weight = getattr(module, "weight", None)
    # GPT-2's Conv1D has an attribute only for the number of its outputs.
    if isinstance(getattr(module, "nf", None), int) and isinstance(weight, torch.Tensor):
        return math.prod(find_shape(weight))
    return 0


def count_expert_weights(shape: torch.Size, active: int) -> int:
    """Return the weights that a token runs through in a parameter of experts, (experts, …, …); 0 for other shapes."""
    return min(active, shape[0]) * shape[1] * shape[2] if len(shape) == 3 else 0


def count_output(output: nn.Module, find_shape: Shape) -> int:
    """Return the number of weights of an output head, which may carry LoRA."""
    given, returned = getattr(output, "in_features", None), getattr(output, "out_features", None)
    if isinstance(given, int) and isinstance(returned, int):
        return given * returned
    weight = getattr(output, "weight", None)
    return math.prod(find_shape(weight)) if isinstance(weight, torch.Tensor) else 0


def count_step(work: Work, lowest: int, kept: set[int], checkpointing: bool, cuts: bool) -> int:
    """Return the operations of a training step per token.

    Args:
        work: of a forward pass.
        lowest: the position of the lowest layer that trains.
        kept: the positions of the layers with LoRA.
        checkpointing: whether layers are computed again in the backward pass.
        cuts: whether the input of the lowest layer needs no gradient; Axolotl asks for that of layer 0.
    """
    total = 2 * work.head
    for place, (frozen, attention) in enumerate(zip(work.frozen, work.attention)):
        lora = work.lora[place] if place in kept else 0
        forward = frozen + attention + lora
        total += forward
        if place < lowest:
            continue
        total += frozen + 2 * attention + 2 * lora
        if checkpointing:
            total += forward
        if cuts and place == lowest:
            total -= work.first[place]
    return total


def find_relative(
    work: Work,
    lowest: int,
    everything: set[int],
    checkpointing: bool,
    reentrant: bool = False,
    lora: list[int] | None = None,
) -> float:
    """Return the operations of a step relative to plain LoRA's, which is in the layers ``everything``.

    ``lora``: the operations of LoRA in each layer; by default the layers from ``lowest`` upwards have plain LoRA's.
    """
    chosen = work if lora is None else dataclasses.replace(work, lora=lora)
    kept = {layer for layer in everything if layer >= lowest or lora is not None}
    cuts = lowest > 0 and not (checkpointing and reentrant)
    plain = count_step(work, 0, everything, checkpointing, cuts=False)
    return count_step(chosen, lowest, kept, checkpointing, cuts) / plain
