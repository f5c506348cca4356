"""Where optimizers keep Adam's moments of a weight, and which value stands for zero there.

Relied on beyond documented interfaces (``tests/unit/engines/test_moments.py`` fails when one of them changes):

* torch 2.13.0: Adam's and AdamW's moments are ``exp_avg``, ``exp_avg_sq`` and ``max_exp_avg_sq``; deepspeed 0.18.9: its
  own Adam has the first two.
* bitsandbytes 0.50.2: Adam's moments are ``state1`` and ``state2``, which are numbers or, from 4096 elements, 8-bit
  codes: indices into ``qmap1`` or ``qmap2``, scaled by the maximum of a block of 256 in ``absmax1`` or ``absmax2``.
  Paged moments are CPU tensors in memory that the GPU reads too; nothing accesses it after a step.
  ``GlobalPageManager`` lists all that were ever made.
* torchao 0.17.0: Adam's moments have torch's names. From 4096 elements they are an ``OptimState8bit``, whose ``codes``
  are indices into ``qmap``, or an ``OptimStateFp8``, whose ``codes`` are 8-bit floats; both are multiplied by the
  ``scale`` of their block. Under FSDP2 they are inside DTensors.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.engines.edits import Edit, multiply, translate


class Held(NamedTuple):
    """This rank's part of a moment.

    Attributes:
        values: its writable numbers or codes.
        zero: the number or code that stands for 0 at any scale.
        scales: the factors of the blocks of codes, which are of this weight only; None without such blocks.
        numbers: what the codes stand for, (256,), where ``scales`` may be missing; None for numbers.
    """

    values: torch.Tensor
    zero: float
    scales: torch.Tensor | None = None
    numbers: torch.Tensor | None = None


@dataclass(frozen=True)
class Moment:
    """One of Adam's moments of a weight; see ``Held`` for the attributes that are not listed.

    Attributes:
        name: its key in the optimizer's state.
        whole: the tensor there, perhaps a DTensor.
        order: 1 for the mean of the gradients, 2 for that of their squares.
    """

    name: str
    whole: torch.Tensor
    order: int
    values: torch.Tensor
    zero: float
    scales: torch.Tensor | None
    numbers: torch.Tensor | None

    def scale(self, factor: float) -> Edit:
        """Return an edit of the values that makes the moment that of gradients ``factor`` times as large.

        Codes become the nearest ones of the same block, up to its maximum.
        """
        factor **= self.order
        if self.numbers is None:
            return multiply(factor)
        nearest = (self.numbers[:, None] * factor - self.numbers).abs().argmin(dim=1)
        return translate(nearest.to(torch.uint8))


@dataclass(frozen=True)
class Layout:
    """A library's way to keep moments.

    Attributes:
        names: keys of the moments in the state of a weight; the first two are always there.
        read: takes the state, a key and this rank's tensor; returns None if the moment is kept in another way.
        optimizers: full names of the classes that keep moments in this way.
    """

    names: tuple[str, ...]
    read: Callable[[Mapping[str, Any], str, torch.Tensor], Held | None]
    optimizers: tuple[str, ...]


def read_numbers(state: Mapping[str, Any], name: str, held: torch.Tensor) -> Held | None:
    return Held(held.data, 0.0) if type(held) is torch.Tensor and held.is_floating_point() else None


def read_blocks(state: Mapping[str, Any], name: str, held: torch.Tensor) -> Held | None:
    """Read bitsandbytes' codes or numbers, see ``Layout.read``."""
    numbers = state.get(name.replace("state", "qmap"))
    if held.dtype == torch.uint8 and numbers is not None:
        # ZeRO joins weights, and its blocks can be of two of them.
        return Held(held.data, find_zero(numbers), state.get(name.replace("state", "absmax")), numbers)
    return read_numbers(state, name, held)


def read_low_bits(state: Mapping[str, Any], name: str, held: torch.Tensor) -> Held | None:
    """Read torchao's codes, see ``Layout.read``."""
    wrapped: Any = held
    if type(held).__name__ == "OptimState8bit":
        return Held(wrapped.codes, find_zero(wrapped.qmap), wrapped.scale)
    if type(held).__name__ == "OptimStateFp8":
        return Held(wrapped.codes.view(torch.uint8), 0, wrapped.scale)
    return None


def find_zero(numbers: torch.Tensor) -> int:
    return numbers.tolist().index(0.0)


ADAM = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
# Libraries whose optimizers keep a weight of 0 at 0 while its gradients are 0. After the first step bitsandbytes 0.50.2
# rounds 8-bit moments of 0 to a neighbouring number, so that such a weight drifts.
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
    """Return bitsandbytes' maps from codes to numbers, by key; an optimizer shares them between its weights."""
    return {name: state[name] for state in states.values() for name in ("qmap1", "qmap2") if name in state}


def find_moments(state: Mapping[str, Any], optimizer: str) -> list[Moment]:
    """Return Adam's moments in the optimizer's ``state`` of a weight.

    ``optimizer``: name of the optimizer, for the message.

    Raises:
        LayerselError: if no layout matches.
    """
    for layout in LAYOUTS.values():
        if all(torch.is_tensor(state.get(name)) for name in layout.names[:2]):
            moments = [read_moment(layout, state, name) for name in layout.names if name in state]
            found = [moment for moment in moments if moment is not None]
            if len(found) == len(moments):
                return found
    raise LayerselError(
        f"optimizer: layersel.l1ra cannot move rank with {optimizer}, because it does not know where its Adam moments "
        "are. Use `optimizer: adamw_torch`."
    )


def read_moment(layout: Layout, state: Mapping[str, Any], name: str) -> Moment | None:
    """Return one moment, or None if it does not match ``layout``."""
    whole = state[name]
    held = layout.read(state, name, whole.to_local() if isinstance(whole, DTensor) else whole)
    return None if held is None else Moment(name, whole, 1 if name == layout.names[0] else 2, *held)


def find_library(optimizer: type) -> str | None:
    """Return the key in ``LAYOUTS`` of an optimizer class, None if there is none."""
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in optimizer.__mro__}
    return next((library for library, layout in LAYOUTS.items() if names & set(layout.optimizers)), None)


def unwrap_optimizer(optimizer: Any) -> Any:
    """Return the optimizer without the wrappers of accelerate and the engine."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def release_pages(optimizer: Any) -> None:
    """Release the paged memory of an optimizer that will not step again.

    bitsandbytes never frees this memory, so its pages are moved to the CPU, which frees them on the GPU.
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
