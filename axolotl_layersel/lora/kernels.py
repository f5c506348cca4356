"""Make Axolotl's fused LoRA kernels, which bypass LoRA's modules, compute with gates, or switch them off for a while.

Seen in axolotl 0.19.0 (``tests/unit/lora/test_kernels.py`` fails when one of them changes):

* ``axolotl.monkeypatch.lora_kernels.apply_lora_kernel_patches``: replaces methods of a loaded model's modules by the
  kernels, as attributes of the instance; without any kernel in its configuration it sets the fallbacks.
* ``axolotl.kernels.lora.get_lora_parameters``: returns A, B and the scaling of a module to all kernels.
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

from axolotl_layersel.common.terminal import is_first_process
from axolotl_layersel.config.selection import SelectionConfig
from axolotl_layersel.engines import find_engine
from axolotl_layersel.engines.trainers import unwrap_model
from axolotl_layersel.lora.gates import ATTRIBUTE

LOG = logging.getLogger(__name__)

KERNEL_MODULES = ("axolotl.kernels.lora", "axolotl.monkeypatch.lora_kernels")
READER = "get_lora_parameters"
GIVES_GATES = "layersel_gives_gates"


def give_gates_to_kernels() -> bool:
    """Make the kernels compute with gates, and return whether this Axolotl supports it.

    Call it before a model is loaded: some kernels keep a reference to the function that is replaced here.
    """
    try:
        kernels = importlib.import_module("axolotl.kernels.lora")
    except ImportError as error:
        if is_first_process():
            LOG.info("layersel: Axolotl's fused LoRA kernels cannot be imported here: %s", error)
        return False
    read = getattr(kernels, READER, None)
    if read is None:
        if is_first_process():
            LOG.info(
                "layersel: the fused LoRA kernels of this Axolotl cannot be given gates, since they have no %s", READER
            )
        return False
    if not hasattr(read, GIVES_GATES):
        setattr(kernels, READER, with_gates(read))
    return True


def with_gates(read: Callable[[nn.Module], tuple]) -> Callable[[nn.Module], tuple]:
    """Return a ``get_lora_parameters`` that multiplies a gate c into A or B.

    diag(c)·A and B·diag(c) both give B·diag(c)·A; the smaller matrix is multiplied, and rounded once to its dtype. A
    module without LoRA of an active adapter is read as its base layer, where upstream raises KeyError.
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
    """Return whether only inactive adapters have LoRA in a module."""
    return not any(name in module.r for name in module.active_adapters)


def make_kernels_accept_bare_modules(model: nn.Module) -> None:
    """Make the kernels accept modules in which only inactive adapters have LoRA."""
    if any(isinstance(module, LoraLayer) and is_bare(module) for module in model.modules()):
        give_gates_to_kernels()


def exchange(parameters: tuple, old: torch.Tensor, new: torch.Tensor) -> tuple:
    """Return a kernel's parameters with the matrix ``old`` replaced by ``new``.

    Raises:
        RuntimeError: if ``old`` is not among them, since the kernel would ignore the gates.
    """
    if sum(value is old for value in parameters) != 1:
        if all(value is None for value in parameters[3:]):  # LoRA is switched off
            return parameters
        raise RuntimeError(f"{READER} of this Axolotl does not return the matrices of LoRA as axolotl 0.19.0 does")
    return tuple(new if value is old else value for value in parameters)


def while_choosing(trainer: Trainer, selection: SelectionConfig | None) -> contextlib.AbstractContextManager[None]:
    """Return the context for choosing layers: without the kernels, unless the method needs nothing but gates.

    The kernels cannot be differentiated twice, as ``unrolled`` requires. On an engine that streams weights, a search
    would leave weights gathered that a kernel has read.
    """
    search = None if selection is None else selection.resolve(run_seed=0).flexora
    by_gates = search is not None and search.hypergradient == "first_order" and not find_engine(trainer).is_streamed
    if by_gates and give_gates_to_kernels():
        return contextlib.nullcontext()
    return without_fused_lora(unwrap_model(trainer))


@contextlib.contextmanager
def without_fused_lora(model: nn.Module) -> Iterator[None]:
    """Run LoRA's own modules, and hooks on them, within the block. ``model``: a PEFT model, unwrapped."""
    fused = remove_kernels(model)
    if fused:
        from axolotl.monkeypatch.lora_kernels import apply_lora_kernel_patches
        from axolotl.utils.dict import DictDefault

        apply_lora_kernel_patches(model, DictDefault({}))
    try:
        yield
    finally:
        remove_kernels(model)
        for module, methods in fused:
            vars(module).update(methods)


def remove_kernels(model: nn.Module) -> list[tuple[nn.Module, dict[str, types.MethodType]]]:
    """Remove the kernels' methods from the modules of ``model``, and return them by module."""
    found = []
    for module in model.modules():
        methods = {name: value for name, value in vars(module).items() if is_fused(value)}
        for name in methods:
            delattr(module, name)
        if methods:
            found.append((module, methods))
    return found


def is_fused(value: object) -> bool:
    return isinstance(value, types.MethodType) and value.__func__.__module__ in KERNEL_MODULES
