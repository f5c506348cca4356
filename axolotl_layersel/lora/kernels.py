"""Axolotl's fused LoRA kernels compute past LoRA's modules: they are given the gates, or are off as long as need be.

Seen in axolotl 0.19.0 (``tests/unit/lora/test_kernels.py`` fails when one of them changes):

* ``axolotl.monkeypatch.lora_kernels.apply_lora_kernel_patches``: once a model is loaded the kernels take the place of
  methods of its modules, as attributes of the instance; without any kernel in its configuration it sets what they fall
  back to.
* ``axolotl.kernels.lora.get_lora_parameters``: all kernels read A, B and the scaling of a module from what it returns.
"""

import contextlib
import functools
import importlib
import logging
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import Trainer

from axolotl_layersel.config.selection import SelectionConfig
from axolotl_layersel.engines import find_engine
from axolotl_layersel.engines.trainers import unwrap_model
from axolotl_layersel.lora.gates import ATTRIBUTE

LOG = logging.getLogger(__name__)

KERNEL_MODULES = ("axolotl.kernels.lora", "axolotl.monkeypatch.lora_kernels")
READER = "get_lora_parameters"
GIVES_GATES = "layersel_gives_gates"


def give_gates_to_kernels() -> bool:
    """Let the kernels compute with the gates of modules that have one, and return whether this Axolotl can.

    Call it before a model is loaded: some kernels take a copy of the function that is exchanged here.
    """
    try:
        kernels = importlib.import_module("axolotl.kernels.lora")
    except ImportError as error:
        LOG.info("layersel: Axolotl's fused LoRA kernels cannot be loaded here: %s", error)
        return False
    read = getattr(kernels, READER, None)
    if read is None:
        LOG.info("layersel: the fused LoRA kernels of this Axolotl cannot be given gates, for want of %s", READER)
        return False
    if not hasattr(read, GIVES_GATES):
        setattr(kernels, READER, with_gates(read))
    return True


def with_gates(read: Callable[[nn.Module], tuple]) -> Callable[[nn.Module], tuple]:
    """Return ``get_lora_parameters`` with diag(c)·A in place of A, or B·diag(c) in place of B, where a gate c is.

    Both stand for B·diag(c)·A; the smaller matrix is taken, and rounded to its own type once. A module in which no
    active adapter has LoRA is read as its base layer, where upstream raises KeyError.
    """

    @functools.wraps(read)
    def read_gated(projection: Any) -> tuple:
        if isinstance(projection, LoraLayer) and is_bare(projection):
            return read(projection.get_base_layer())
        parameters = read(projection)
        downs = getattr(projection, "lora_A", {})
        adapter = next((name for name in getattr(projection, "active_adapters", ()) if name in downs), None)
        gate = None if adapter is None else getattr(downs[adapter], ATTRIBUTE, None)
        if gate is None:
            return parameters
        down, up = downs[adapter].weight, projection.lora_B[adapter].weight
        if down.numel() < up.numel():
            return exchange(parameters, down, (down * gate.to(down.device)[:, None]).to(down.dtype))
        return exchange(parameters, up, (up * gate.to(up.device)).to(up.dtype))

    setattr(read_gated, GIVES_GATES, True)
    return read_gated


def is_bare(module: LoraLayer) -> bool:
    """Return whether no active adapter has LoRA in a module, but an inactive one has."""
    return not any(name in module.r for name in module.active_adapters)


def let_kernels_pass_by(model: nn.Module) -> None:
    """Let the kernels compute modules that only an inactive adapter has LoRA in."""
    if any(isinstance(module, LoraLayer) and is_bare(module) for module in model.modules()):
        give_gates_to_kernels()


def exchange(parameters: tuple, old: torch.Tensor, new: torch.Tensor) -> tuple:
    """Return what a kernel reads with another matrix in the place of one.

    Raises:
        RuntimeError: if the matrix is not there, since kernels would compute past the gates.
    """
    if sum(value is old for value in parameters) != 1:
        if all(value is None for value in parameters[3:]):  # LoRA is off
            return parameters
        raise RuntimeError(f"{READER} of this Axolotl does not return the matrices of LoRA as axolotl 0.19.0 does")
    return tuple(new if value is old else value for value in parameters)


def while_choosing(trainer: Trainer, selection: SelectionConfig | None) -> contextlib.AbstractContextManager[None]:
    """Return the context in which layers are chosen: without the kernels, unless gates are all that a method needs.

    The run itself, and one that is given its plan, use them. They cannot be differentiated twice, as ``unrolled`` does.
    On an engine that streams weights a search would end with some that a kernel has read and the engine holds for it.
    """
    search = None if selection is None else selection.resolve(run_seed=0).flexora
    by_gates = search is not None and search.hypergradient == "first_order" and not find_engine(trainer).is_streamed
    if by_gates and give_gates_to_kernels():
        return contextlib.nullcontext()
    return without_fused_lora(unwrap_model(trainer))


@contextlib.contextmanager
def without_fused_lora(model: nn.Module) -> Iterator[None]:
    """Let LoRA's own modules compute within the block, so that hooks on them run.

    Args:
        model: a PEFT model, unwrapped.
    """
    fused = take_off(model)
    if fused:
        from axolotl.monkeypatch.lora_kernels import apply_lora_kernel_patches
        from axolotl.utils.dict import DictDefault

        apply_lora_kernel_patches(model, DictDefault({}))
    try:
        yield
    finally:
        take_off(model)
        for module, methods in fused:
            vars(module).update(methods)


def take_off(model: nn.Module) -> list[tuple[nn.Module, dict[str, types.MethodType]]]:
    """Remove what Axolotl's kernels have put on the modules of ``model``, and return it."""
    found = []
    for module in model.modules():
        methods = {name: value for name, value in vars(module).items() if is_fused(value)}
        for name in methods:
            delattr(module, name)
        if methods:
            found.append((module, methods))
    return found


def is_fused(value: object) -> bool:
    """Return whether an attribute of a module is a method that Axolotl's kernels have put there."""
    return isinstance(value, types.MethodType) and value.__func__.__module__ in KERNEL_MODULES
