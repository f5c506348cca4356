"""Hooks on layers and replaced methods, which are removed at the end of a block."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from axolotl_layersel.lora.layers import LayerStack


@contextlib.contextmanager
def replacing_method(owner: Any, name: str, method: Callable) -> Iterator[None]:
    """Replace a method of an object within the block by ``method``, which gets the original's name and signature."""
    original, own = getattr(owner, name), vars(owner).get(name)
    setattr(owner, name, functools.wraps(original)(method))
    try:
        yield
    finally:
        delattr(owner, name)
        if own is not None:
            setattr(owner, name, own)


@contextlib.contextmanager
def removing(*handles: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    """Remove hooks at the end of the block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def hooking_layers(
    stack: LayerStack,
    before: Callable[[int, tuple, dict], None],
    after: Callable[[int, object], None] | None = None,
) -> Iterator[None]:
    """Call ``before(layer, args, kwargs)`` and ``after(layer, output)`` around every layer within the block."""
    with contextlib.ExitStack() as hooks:
        for index, layer in enumerate(stack.layers):
            handle = layer.register_forward_pre_hook(
                lambda module, args, kwargs, index=index: before(index, args, kwargs), with_kwargs=True
            )
            hooks.enter_context(removing(handle))
            if after is not None:
                handle = layer.register_forward_hook(lambda module, args, output, index=index: after(index, output))
                hooks.enter_context(removing(handle))
        yield


def get_hidden(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """Return the hidden states that a layer was called with, usually (samples, tokens, width)."""
    return args[0] if args else kwargs["hidden_states"]


def set_hidden(args: tuple, kwargs: dict[str, Any], hidden: torch.Tensor) -> tuple[tuple, dict[str, Any]]:
    """Return a layer's arguments with other hidden states."""
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def get_output(output: Any) -> torch.Tensor:
    """Return the hidden states that a layer or a stack of layers returned, usually (samples, tokens, width)."""
    if isinstance(output, torch.Tensor):
        return output
    return output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
