"""Axolotl's fused LoRA kernels compute past LoRA's modules: they are off while layers are chosen, then on again.

Seen in axolotl 0.19.0, ``apply_lora_kernel_patches``: once a model is loaded they take the place of methods of its
modules, as attributes of the instance; without any kernel in its configuration it sets what they fall back to.
"""

import contextlib
import types
from collections.abc import Iterator

from torch import nn

KERNEL_MODULES = ("axolotl.kernels.lora", "axolotl.monkeypatch.lora_kernels")


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
