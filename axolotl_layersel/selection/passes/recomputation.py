"""A layer that is computed again in the backward pass, with all tensors that it exchanges with other layers.

A layer returns hidden states, and some layers exchange more: keys and values that upper layers share lie in a
dictionary among their arguments. So every tensor in a layer's arguments is an input. Every new tensor in its result, or
in its arguments after it has run, is an output. Gradients flow through all of them.
"""

import contextlib
import copy
import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.selection.passes.hooks import get_hidden, replacing_method, set_hidden

# Objects that are not searched for tensors of other layers.
OPAQUE = (nn.Module, PreTrainedConfig, type, types.ModuleType)
# Outputs of a layer for the same input differ at most by rounding, 4e-3 of a number in bf16.
ROUNDING = 0.02
# The share of vectors that may differ more.
FEW = 0.2


class Copier:
    """Copies nested containers, so that writing to a copy does not change the original.

    A container that is found several times has one copy. Tensors are not copied.

    Args:
        exchanged: tensors that copies hold in place of others, by the id of the latter.

    Attributes:
        originals: the copied containers.
        copies: the copy of each of them, by the original's id.
        tensors: the tensors that were found, by id, in order.
    """

    def __init__(self, exchanged: Mapping[int, torch.Tensor] | None = None) -> None:
        self.exchanged = exchanged or {}
        self.originals: list[Any] = []
        self.copies: dict[int, Any] = {}
        self.tensors: dict[int, torch.Tensor] = {}

    def copy(self, value: Any) -> Any:
        """Return a copy of a container, a tensor or the one in its place, and anything else unchanged."""
        if isinstance(value, torch.Tensor):
            self.tensors[id(value)] = value
            return self.exchanged.get(id(value), value)
        if not is_container(value):
            return value
        if id(value) not in self.copies:
            self.originals.append(value)  # keeps its id from being used again
            self.copies[id(value)] = copy.copy(value)
            if isinstance(value, tuple):
                items = [self.copy(item) for item in value]
                self.copies[id(value)] = value._make(items) if hasattr(value, "_make") else type(value)(items)
            elif self.copies[id(value)] is not value:  # the copy of a constant is itself
                self.fill(self.copies[id(value)], value)
        return self.copies[id(value)]

    def fill(self, target: Any, source: Any) -> None:
        """Fill a container with copies of the items of another one of its kind."""
        if isinstance(source, list):
            target[:] = [self.copy(item) for item in source]
        elif isinstance(source, dict):
            items = {key: self.copy(item) for key, item in source.items()}
            target.clear()
            for key, item in items.items():
                target[key] = item
        if hasattr(source, "__dict__"):
            attributes = {name: self.copy(item) for name, item in vars(source).items()}
            vars(target).clear()
            vars(target).update(attributes)


def is_container(value: Any) -> bool:
    """Return whether ``value`` may hold tensors: a dictionary, a list, a tuple, or an object with attributes."""
    if isinstance(value, dict | list | tuple):
        return True
    return hasattr(value, "__dict__") and not isinstance(value, OPAQUE) and not callable(value)


def is_differentiable(tensor: torch.Tensor) -> bool:
    """Return whether a tensor's dtype has gradients."""
    return tensor.is_floating_point() or tensor.is_complex()


def recompute(
    layer: Callable, ready: Callable[[], contextlib.AbstractContextManager], args: tuple, kwargs: dict[str, Any]
) -> Any:
    """Return the result of a layer without keeping its graph; the backward pass computes it again.

    Args:
        layer: computes the layer.
        ready: returns the context in which the layer's weights can be used.
        args: the layer's arguments. Its hidden states always get a gradient. Containers hold afterwards what the layer
            has written to them.
        kwargs: the layer's keyword arguments.

    Raises:
        LayerselError: if the layer writes to one of its argument tensors, which would happen twice.
    """
    found = Copier()
    frozen = found.copy((args, kwargs))  # both computations start from the same containers
    given = list(found.tensors.values())
    starts = {id(tensor): tensor for tensor in given if tensor.requires_grad}
    hidden = get_hidden(args, kwargs)
    starts.setdefault(id(hidden), hidden.detach().requires_grad_())
    versions = [tensor._version for tensor in given]
    first: list[tuple[Copier, Any, list[torch.Tensor]]] = []

    def compute(*tensors: torch.Tensor) -> tuple[Copier, Any, list[torch.Tensor]]:
        thawed = Copier(dict(zip(starts, tensors)))
        own_args, own_kwargs = thawed.copy(frozen)
        returned = layer(*own_args, **own_kwargs)
        after = Copier()
        after.copy((own_args, own_kwargs, returned))
        known = {*map(id, given), *map(id, tensors)}
        made = [value for key, value in after.tensors.items() if key not in known and is_differentiable(value)]
        return thawed, returned, made

    outputs = RecomputedLayer.apply(compute, ready, first, *starts.values())
    ((thawed, returned, made),) = first
    if versions != [tensor._version for tensor in given]:
        raise LayerselError(
            f"layersel.selection.method: {describe(layer)} writes to the tensors that it is given, so it cannot be "
            "computed again for its gradient. Use method cka or cosine."
        )
    # The layer wrote to copies. Write the same to the originals, where the next layer reads it.
    back = Copier(dict(zip(map(id, made), outputs)))
    pairs = [(original, thawed.copies[id(found.copies[id(original)])]) for original in found.originals]
    pairs = [(original, own) for original, own in pairs if not isinstance(original, tuple) and own is not original]
    back.copies.update({id(own): original for original, own in pairs})
    for original, own in pairs:
        back.fill(original, own)
    return back.copy(returned)


@torch.no_grad()
def find_impure(layers: Sequence[nn.Module], call: Callable[[], object]) -> str | None:
    """Return the class name of a layer that reads tensors of other layers outside its arguments, or None.

    No gradient would reach those tensors. The model runs once as it is, and once with other hidden states. In the
    second run each layer also computes with its arguments of the first run, and must return the same again.

    Args:
        layers: the layers of the model that are computed again, lowest first.
        call: runs the model on a short row, without a graph.
    """
    first: dict[int, list[tuple[list[torch.Tensor], list[torch.Tensor]]]] = {}
    impure: list[str] = []

    def record(layer: nn.Module, forward: Callable, /, *args: Any, **kwargs: Any) -> Any:
        given = list_tensors((args, kwargs))
        returned = forward(*args, **kwargs)
        first.setdefault(id(layer), []).append((given, list_tensors(returned)))
        return returned

    def compare(layer: nn.Module, forward: Callable, /, *args: Any, **kwargs: Any) -> Any:
        calls = first.get(id(layer))
        given, returned = calls.pop(0) if calls else ([], [])
        own = Copier(dict(zip(map(id, list_tensors((args, kwargs))), given)))
        own_args, own_kwargs = own.copy((args, kwargs))
        again = list_tensors(forward(*own_args, **own_kwargs))
        if any(map(differ, again, returned)):
            impure.append(type(layer).__name__)
        other_args, other_kwargs = set_hidden(args, kwargs, get_hidden(args, kwargs).roll(1, dims=-1))
        return forward(*other_args, **other_kwargs)

    for look in (record, compare):
        with contextlib.ExitStack() as looking:
            for layer in layers:
                method = functools.partial(look, layer, layer.forward)
                looking.enter_context(replacing_method(layer, "forward", method))
            call()
    return next(iter(impure), None)


def list_tensors(value: Any) -> list[torch.Tensor]:
    """Return the tensors in ``value``, each once, in order."""
    copier = Copier()
    copier.copy(value)
    return list(copier.tensors.values())


def differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors differ by more than rounding in more than a few vectors of their last dimension.

    On a GPU a router may send a few tokens elsewhere when it is computed again.
    """
    if one.shape != other.shape or not is_differentiable(one):
        return one.shape != other.shape
    missed, size = (one - other).float().norm(dim=-1), other.float().norm(dim=-1)
    return float((missed > ROUNDING * size).float().mean()) > FEW


def describe(layer: Callable) -> str:
    """Return the name of a layer in messages, from its ``forward``."""
    return type(getattr(layer, "__self__", layer)).__name__


class RecomputedLayer(torch.autograd.Function):
    """A layer that runs without a graph, and again in the backward pass, with its weights whole both times."""

    @staticmethod
    def forward(ctx: Any, compute: Callable, ready: Callable, first: list, *tensors: torch.Tensor) -> tuple:
        ctx.compute, ctx.ready = compute, ready
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        with ready():
            first.append(compute(*tensors))
        # Later layers could not write to a view among several outputs.
        return tuple(made.clone() if made._is_view() else made for made in first[0][-1])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        with torch.enable_grad(), ctx.ready():
            tensors = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
            *_, made = ctx.compute(*tensors)
            pairs = [
                (value, gradient)
                for value, gradient in zip(made, gradients, strict=True)
                if gradient is not None and value.requires_grad  # outputs such as biases depend on no input
            ]
            if pairs:
                torch.autograd.backward([value for value, _ in pairs], [gradient for _, gradient in pairs])
        return (None, None, None, *(tensor.grad for tensor in tensors))
