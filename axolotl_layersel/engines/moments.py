"""Where an optimizer keeps Adam's moments of a weight, and what stands for zero there: a row for each layout.

Relied on beyond documented interfaces (``tests/unit/engines/test_moments.py`` fails when one of them changes):

* torch 2.13.0: Adam's and AdamW's moments are ``exp_avg``, ``exp_avg_sq`` and ``max_exp_avg_sq``; deepspeed 0.18.9: its
  own Adam has the first two.
* bitsandbytes 0.50.2: its Adam's are ``state1`` and ``state2``: numbers, or from 4096 elements on 8-bit codes. A code
  stands for the number at its place in ``qmap1`` or ``qmap2``, times the maximum of its block of 256. Paged ones are
  tensors of the CPU in memory that the GPU reads too, which is at rest after a step. ``GlobalPageManager`` lists every
  one that was ever made.
* torchao 0.17.0: its Adam's have torch's names. From 4096 elements on they are an ``OptimState8bit``, whose ``codes``
  stand for the numbers in ``qmap`` times the scale of their block, or an ``OptimStateFp8``, whose ``codes`` are numbers
  of 8 bits. Under FSDP2 they lie inside of DTensors.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from axolotl_layersel.common.errors import LayerselError


@dataclass(frozen=True)
class Moment:
    """One of Adam's moments of a weight.

    Attributes:
        name: what it is called in the optimizer's state.
        whole: the tensor there, which also says how it is split over the ranks.
        values: what of it this rank holds and may write into, of the same shape: numbers, or codes for numbers.
        zero: the value that stands for the number 0, whatever its block is scaled by.
    """

    name: str
    whole: torch.Tensor
    values: torch.Tensor
    zero: float


@dataclass(frozen=True)
class Layout:
    """One way to keep moments.

    Attributes:
        names: of the moments in the state of a weight; the first two are always there.
        read: returns what may be written of a moment, and its zero, from the state, the name, and what this rank holds;
            None where it is kept in another way.
        optimizers: the classes that keep them so, by their modules and names.
    """

    names: tuple[str, ...]
    read: Callable[[Mapping[str, Any], str, torch.Tensor], tuple[torch.Tensor, float] | None]
    optimizers: tuple[str, ...]


def read_numbers(state: Mapping[str, Any], name: str, held: torch.Tensor) -> tuple[torch.Tensor, float] | None:
    """See ``Layout.read``: plain numbers."""
    return (held.data, 0.0) if type(held) is torch.Tensor and held.is_floating_point() else None


def read_blocks(state: Mapping[str, Any], name: str, held: torch.Tensor) -> tuple[torch.Tensor, float] | None:
    """See ``Layout.read``: bitsandbytes' codes beside the map of what they stand for, or numbers."""
    numbers = state.get(name.replace("state", "qmap"))
    if held.dtype == torch.uint8 and numbers is not None:
        return held.data, find_zero(numbers)
    return read_numbers(state, name, held)


def read_low_bits(state: Mapping[str, Any], name: str, held: torch.Tensor) -> tuple[torch.Tensor, float] | None:
    """See ``Layout.read``: torchao's tensors around codes."""
    wrapped: Any = held
    if type(held).__name__ == "OptimState8bit":
        return wrapped.codes, find_zero(wrapped.qmap)
    if type(held).__name__ == "OptimStateFp8":
        return wrapped.codes.view(torch.uint8), 0
    return None


def find_zero(numbers: torch.Tensor) -> int:
    """Return the code that stands for 0, its place in the map of all ``numbers``."""
    return numbers.tolist().index(0.0)


ADAM = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
# The libraries whose optimizers leave a weight of 0 there as long as its gradients are 0. bitsandbytes 0.50.2 rounds
# 8-bit moments of 0 to the number beside it after the first step, by which such a weight drifts away.
LEAVES_IDLE = ("PyTorch",)
LAYOUTS = {
    "PyTorch": Layout(
        ADAM,
        read_numbers,
        (
            "torch.optim.adam.Adam",
            "torch.optim.adamw.AdamW",
            "deepspeed.ops.adam.fused_adam.FusedAdam",
            "deepspeed.ops.adam.cpu_adam.DeepSpeedCPUAdam",
        ),
    ),
    "bitsandbytes": Layout(
        ("state1", "state2"),
        read_blocks,
        tuple(
            f"bitsandbytes.optim.{name.lower()}.{paged}{name}{bits}"
            for name in ("Adam", "AdamW")
            for paged in ("", "Paged")
            for bits in ("", "8bit", "32bit")
        ),
    ),
    "torchao": Layout(
        ADAM,
        read_low_bits,
        tuple(f"torchao.optim.adam.{name}" for name in ("Adam8bit", "AdamFp8", "AdamW8bit", "AdamWFp8")),
    ),
}


NAMES = {name for layout in LAYOUTS.values() for name in layout.names}


def find_maps(states: Mapping[Any, Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Return bitsandbytes' maps of what codes stand for, by name: an optimizer has the same for all its weights."""
    return {name: state[name] for state in states.values() for name in ("qmap1", "qmap2") if name in state}


def find_moments(state: Mapping[str, Any], optimizer: str) -> list[Moment]:
    """Return Adam's moments in the ``state`` of a weight.

    Args:
        state: what the optimizer keeps of the weight.
        optimizer: its name, for the message.

    Raises:
        LayerselError: if they are kept in no way that is known here.
    """
    for layout in LAYOUTS.values():
        if all(torch.is_tensor(state.get(name)) for name in layout.names[:2]):
            moments = [read_moment(layout, state, name) for name in layout.names if name in state]
            found = [moment for moment in moments if moment is not None]
            if len(found) == len(moments):
                return found
    raise LayerselError(
        f"optimizer: {optimizer} keeps Adam moments in no way that layersel.l1ra could move rank with. "
        "Use `optimizer: adamw_torch`."
    )


def read_moment(layout: Layout, state: Mapping[str, Any], name: str) -> Moment | None:
    """Return one moment, or None where it is not of ``layout``."""
    whole = state[name]
    part = layout.read(state, name, whole.to_local() if isinstance(whole, DTensor) else whole)
    return None if part is None else Moment(name, whole, *part)


def find_library(optimizer: type) -> str | None:
    """Return by which row of ``LAYOUTS`` optimizers of a class keep their moments, or None where that is unknown."""
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in optimizer.__mro__}
    return next((library for library, layout in LAYOUTS.items() if names & set(layout.optimizers)), None)


def unwrap_optimizer(optimizer: Any) -> Any:
    """Return the optimizer inside of what accelerate and an engine have put around it."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def release_pages(optimizer: Any) -> None:
    """Let go of the paged memory of an optimizer that will make no more steps, which bitsandbytes would keep.

    Its pages move to the CPU first: the memory itself is never freed by bitsandbytes, but the GPU then has it back.
    """
    bitsandbytes = sys.modules.get("bitsandbytes")
    if bitsandbytes is None or optimizer is None:
        return
    states = unwrap_optimizer(optimizer).state.values()
    held = {id(value) for state in states for value in state.values() if torch.is_tensor(value)}
    manager = bitsandbytes.functional.GlobalPageManager.get_instance()
    for tensor in manager.paged_tensors:
        if id(tensor) in held and getattr(tensor, "is_paged", False):
            bitsandbytes.functional.prefetch_tensor(tensor, to_cpu=True)
    manager.paged_tensors[:] = [tensor for tensor in manager.paged_tensors if id(tensor) not in held]
