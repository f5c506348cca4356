"""The time of a training step relative to plain LoRA's, by counting floating-point operations of matrix products.

With F operations in the forward pass of the layers, H in that of the output head, and the share u of the layers from
the lowest kept one upwards, a step takes

    F + H + u·B + H                 without gradient checkpointing,
    F + H + u·B + H + u·F           with it, since layers below the lowest kept one are not computed again,

where B is the backward pass: as much as F for the frozen weights, whose own gradient nobody needs, and twice as much as
the forward pass for attention's products and for A and B of LoRA. Plain LoRA has u = 1. Operations are no seconds:
memory traffic, communication and the optimizer are left out.
"""

from dataclasses import dataclass

from torch import nn

from axolotl_layersel.cli.doctor.case import Case, Fact
from axolotl_layersel.cli.doctor.model import Model
from axolotl_layersel.config.strict_block import as_mapping, as_whole

# The lowest kept layers that are shown if the settings do not determine it, as shares of the number of layers.
SHOWN = (0.0, 0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Work:
    """Operations of a forward pass per token.

    Attributes:
        frozen: of the linear weights of each layer.
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


def count_work(model: Model, tokens: int) -> Work:
    """Return the operations of a forward pass per token, in rows of ``tokens`` tokens."""
    stack = model.stack
    heads = model.read_size("num_attention_heads")
    width = model.read_size("head_dim") or (model.read_size("hidden_size") // heads if heads else 0)
    frozen, lora, first = [], [], []
    for place, layer in enumerate(stack.layers):
        linear = [module for name, module in layer.named_modules() if is_frozen(name, module)]
        frozen.append(sum(2 * module.weight.numel() for module in linear))
        lora.append(sum(2 * model.sizes[name] for name in stack.lora_modules.get(place, [])))
        inputs = ("q_proj", "k_proj", "v_proj")
        reads = [module for name, module in layer.named_modules() if is_frozen(name, module) and has(name, inputs)]
        first.append(sum(2 * module.weight.numel() for module in reads))
    output = model.base.get_output_embeddings()
    head = 0 if output is None else 2 * output.weight.numel()
    return Work(frozen, [4 * tokens * heads * width] * len(frozen), lora, first, head)


def has(name: str, parts: tuple[str, ...]) -> bool:
    return any(part in name.split(".") for part in parts)


def is_frozen(name: str, module: nn.Module) -> bool:
    """Return whether a module is a linear one of the base model."""
    return isinstance(module, nn.Linear) and not any(part.startswith("lora_") for part in name.split("."))


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


def find_relative(work: Work, lowest: int, everything: set[int], checkpointing: bool, reentrant: bool = False) -> float:
    """Return the operations of a step relative to plain LoRA's, which is in the layers ``everything``."""
    kept = {layer for layer in everything if layer >= lowest}
    cuts = lowest > 0 and not (checkpointing and reentrant)
    plain = count_step(work, min(everything), everything, checkpointing, cuts=False)
    return count_step(work, lowest, kept, checkpointing, cuts) / plain


def describe_time(case: Case, model: Model) -> list[Fact]:
    """Return the time of a step relative to plain LoRA's."""
    checkpointing = bool(case.data.get("gradient_checkpointing"))
    reentrant = as_mapping(case.data.get("gradient_checkpointing_kwargs")).get("use_reentrant") is True
    tokens = as_whole(case.data.get("sequence_len")) or 512
    work = count_work(model, tokens)
    places = sorted(model.stack.lora_modules)
    lowest = case.lowest
    if lowest is None and case.choice is not None:
        lowest = case.choice.lowest
    asked = [lowest] if lowest is not None else [places[int(share * len(places))] for share in SHOWN] + [places[-1]]
    how = "with" if checkpointing else "without"
    facts = [
        Fact(
            "formula",
            {"checkpointing": checkpointing, "tokens": tokens},
            f"Matrix products of a step {how} gradient checkpointing, relative to plain LoRA's, in rows of {tokens} "
            "tokens. docs/doctor.md has the formula.",
        )
    ]
    for place in asked:
        share = find_relative(work, place, set(places), checkpointing, reentrant)
        facts.append(
            Fact(
                f"lowest_{model.stack.names[place]}",
                round(share, 4),
                f"If layer {model.stack.names[place]} is the lowest that is kept: {share:.2f}.",
            )
        )
    return facts
