"""A layer that is computed again in the backward pass, with everything that it reads from other layers or leaves them.

A layer returns hidden states, and some exchange more: keys and values that upper layers share lie in a dictionary that
all of them are given. So every tensor that is found in what a layer is given is an input of it, and every new one in
what it returns, or in what it was given once it has run, is an output. Gradients flow through all of them.
"""

import contextlib
import copy
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from axolotl_layersel.common.errors import LayerselError

# Objects in which no tensors for other layers are looked for.
OPAQUE = (nn.Module, PreTrainedConfig, type, types.ModuleType)
# What a layer returns for the same input differs by rounding at the most, 4e-3 of a number in bf16.
ROUNDING = 0.02
# The share of vectors that may differ by more.
FEW = 0.2


class Copier:
    """Copies nested containers, so that what is written to a copy is not seen in the original.

    One container becomes one copy, wherever it is found; tensors are not copied.

    Args:
        exchanged: tensors that copies hold in place of others, by the id of these.

    Attributes:
        originals: the containers that were copied.
        copies: of each of them, by its id.
        tensors: the tensors that were found, by their id, in the order in which they were.
    """

    def __init__(self, exchanged: Mapping[int, torch.Tensor] | None = None) -> None:
        self.exchanged = exchanged or {}
        self.originals: list[Any] = []
        self.copies: dict[int, Any] = {}
        self.tensors: dict[int, torch.Tensor] = {}

    def copy(self, value: Any) -> Any:
        """Return a copy of a container; a tensor or what is exchanged for it; anything else as it is."""
        if isinstance(value, torch.Tensor):
            self.tensors[id(value)] = value
            return self.exchanged.get(id(value), value)
        if not is_container(value):
            return value
        if id(value) not in self.copies:
            self.originals.append(value)  # an id is known while its object lives
            self.copies[id(value)] = copy.copy(value)
            if isinstance(value, tuple):
                items = [self.copy(item) for item in value]
                self.copies[id(value)] = value._make(items) if hasattr(value, "_make") else type(value)(items)
            elif self.copies[id(value)] is not value:  # there is one of each constant
                self.fill(self.copies[id(value)], value)
        return self.copies[id(value)]

    def fill(self, target: Any, source: Any) -> None:
        """Let a container hold copies of what another container of its kind holds."""
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
    """Return whether a tensor is of a kind that has gradients."""
    return tensor.is_floating_point() or tensor.is_complex()


def get_hidden(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """Return the hidden states that a layer was called with, usually (samples, tokens, width)."""
    return args[0] if args else kwargs["hidden_states"]


def recompute(
    layer: Callable, ready: Callable[[], contextlib.AbstractContextManager], args: tuple, kwargs: dict[str, Any]
) -> Any:
    """Return what a layer returns, without a graph inside of it: in the backward pass it is computed once more.

    Args:
        layer: computes the layer.
        ready: returns the context in which its weights can be computed with.
        args: what the layer is called with. Its hidden states get a gradient in any case, and what it writes to
            containers is in them afterwards.
        kwargs: the same, by name.

    Raises:
        LayerselError: if the layer writes to a tensor that it is given, which would be done twice.
    """
    found = Copier()
    frozen = found.copy((args, kwargs))  # containers as the layer finds them, both times
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
    # The layer wrote to copies; what it left in them belongs where the next layer finds it.
    back = Copier(dict(zip(map(id, made), outputs)))
    pairs = [(original, thawed.copies[id(found.copies[id(original)])]) for original in found.originals]
    pairs = [(original, own) for original, own in pairs if not isinstance(original, tuple) and own is not original]
    back.copies.update({id(own): original for original, own in pairs})
    for original, own in pairs:
        back.fill(original, own)
    return back.copy(returned)


@torch.no_grad()
def find_impure(layers: Sequence[nn.Module], call: Callable[[], object]) -> str | None:
    """Return the name of a layer that reads of others what it is not given, which no gradient would reach.

    The model runs once as it is, and once with other hidden states. In the second run each layer also computes with the
    tensors of the first one, and returns the same again, unless it has read something else.

    Args:
        layers: those of the model that are computed again, lowest first.
        call: runs the model on a short row, without a graph.
    """
    first: dict[int, list[tuple[list[torch.Tensor], list[torch.Tensor]]]] = {}
    impure: list[str] = []

    def record(layer: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        given = list_tensors((args, kwargs))
        returned = forward(*args, **kwargs)
        first.setdefault(id(layer), []).append((given, list_tensors(returned)))
        return returned

    def compare(layer: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        calls = first.get(id(layer))
        given, returned = calls.pop(0) if calls else ([], [])
        own = Copier(dict(zip(map(id, list_tensors((args, kwargs))), given)))
        own_args, own_kwargs = own.copy((args, kwargs))
        again = list_tensors(forward(*own_args, **own_kwargs))
        if any(map(differ, again, returned)):
            impure.append(type(layer).__name__)
        other_args, other_kwargs = turn_hidden(args, kwargs)
        return forward(*other_args, **other_kwargs)

    for look in (record, compare):
        with contextlib.ExitStack() as looking:
            for layer in layers:
                looking.enter_context(replace_forward(layer, look))
            call()
    return next(iter(impure), None)


def turn_hidden(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Return what a layer is called with, the hidden states exchanged for others of their size."""
    turned = get_hidden(args, kwargs).roll(1, dims=-1)
    return ((turned, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": turned})


def list_tensors(value: Any) -> list[torch.Tensor]:
    """Return the tensors in ``value``, each once, in order."""
    copier = Copier()
    copier.copy(value)
    return list(copier.tensors.values())


def differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors differ by more than rounding in a good share of the vectors of their last dimension.

    On a GPU a router may send one token elsewhere when it is computed again.
    """
    if one.shape != other.shape or not is_differentiable(one):
        return one.shape != other.shape
    missed, size = (one - other).float().norm(dim=-1), other.float().norm(dim=-1)
    return float((missed > ROUNDING * size).float().mean()) > FEW


@contextlib.contextmanager
def replace_forward(layer: nn.Module, look: Callable) -> Iterator[None]:
    """Let ``look(layer, forward, args, kwargs)`` compute what a layer returns within the block."""
    forward, own = layer.forward, vars(layer).get("forward")
    layer.forward = lambda *args, **kwargs: look(layer, forward, args, kwargs)
    try:
        yield
    finally:
        del layer.forward
        if own is not None:
            layer.forward = own


def describe(layer: Callable) -> str:
    """Return what messages call a layer, by its ``forward``."""
    return type(getattr(layer, "__self__", layer)).__name__


class RecomputedLayer(torch.autograd.Function):
    """A layer that is run without a graph, and once more in the backward pass, with its weights whole both times."""

    @staticmethod
    def forward(ctx: Any, compute: Callable, ready: Callable, first: list, *tensors: torch.Tensor) -> tuple:
        ctx.compute, ctx.ready = compute, ready
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        with ready():
            first.append(compute(*tensors))
        # A view among several outputs could not be written to by what comes after the layer.
        return tuple(made.clone() if made._is_view() else made for made in first[0][-1])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        with torch.enable_grad(), ctx.ready():
            tensors = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
            *_, made = ctx.compute(*tensors)
            pairs = [
                (value, gradient)
                for value, gradient in zip(made, gradients, strict=True)
                if gradient is not None and value.requires_grad  # not what depends on no input, such as biases
            ]
            if pairs:
                torch.autograd.backward([value for value, _ in pairs], [gradient for _, gradient in pairs])
        return (None, None, None, *(tensor.grad for tensor in tensors))
