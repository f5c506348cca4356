"""The hidden states before and after each residual branch of a layer, found as the layer runs, not by its class."""

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.selection.passes.hooks import removing
from axolotl_layersel.selection.units import can_be_branch, list_parts, split_branches

# The relative difference allowed between a layer's output and the sum of parallel branches, rounded to bf16 twice.
ROUNDING = 2e-2


@dataclass(frozen=True)
class Call:
    """One call of a part of a layer; ``versions`` tell whether a tensor was written to afterwards."""

    name: str
    given: torch.Tensor
    returned: torch.Tensor
    versions: tuple[int, int]


@dataclass
class Recording:
    """The inputs and outputs of a layer's direct parts, in the order that they ran."""

    layer: nn.Module
    given: torch.Tensor | None = None
    calls: list[Call] = field(default_factory=list)


def watch_branches(
    layer: nn.Module,
    places: Mapping[tuple[str, ...], int],
    record: Callable[[int, torch.Tensor, torch.Tensor], None],
) -> contextlib.AbstractContextManager[None]:
    """Call ``record(place, before, after)`` for branches of a layer each time that the layer has run.

    Args:
        layer: a layer of the stack.
        places: the place of each branch, by its parts, see ``units.split_branches``.
        record: takes the hidden states before and after the branch, both (samples, tokens, width).
    """
    recording, branches = Recording(layer), [tuple(parts) for parts in split_branches(layer)]

    def begin(module: nn.Module, args: tuple, kwargs: dict) -> None:
        recording.given, recording.calls = find_tensor((*args, *kwargs.values())), []

    def note(name: str, module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        given, returned = find_tensor((*args, *kwargs.values())), find_tensor((output,))
        if given is not None and returned is not None:
            recording.calls.append(Call(name, given, returned, (given._version, returned._version)))

    def finish(module: nn.Module, args: tuple, output: object) -> None:
        states = find_states(recording, find_tensor((output,)), branches)
        recording.given, recording.calls = None, []
        for parts, (before, after) in zip(branches, states):
            if parts in places:
                record(places[parts], before, after)

    handles = [layer.register_forward_pre_hook(begin, with_kwargs=True), layer.register_forward_hook(finish)]
    for name, part in list_parts(layer).items():
        handles.append(part.register_forward_hook(functools.partial(note, name), with_kwargs=True))
    return removing(*handles)


def find_tensor(values: tuple[Any, ...]) -> torch.Tensor | None:
    """Return the first tensor among ``values`` that can be hidden states; a tuple counts as its first item."""
    for value in values:
        if isinstance(value, (tuple, list)) and value:
            value = value[0]
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() >= 2:
            return value
    return None


def find_states(
    recording: Recording, output: torch.Tensor | None, branches: list[tuple[str, ...]]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the hidden states before and after each branch, in the shape of the layer's output.

    The state before a branch is the input of its first part, traced back through norms to a state that no part
    returned, or, in a layer with norms after its branches, to the output of a norm. The state after a branch is the one
    before the next branch; after the last one it is the layer's output. Parallel branches start from the same state,
    and each adds its own output.

    Raises:
        LayerselError: if the states do not explain the layer's output.
    """
    calls, layer = recording.calls, recording.layer
    carrying = {name for name, part in list_parts(layer).items() if can_be_branch(part)}
    norms = [call for call in calls if call.name not in carrying]
    if output is None or recording.given is None or not all({call.name for call in calls} & set(b) for b in branches):
        raise refuse(layer)
    if any(call.versions != (call.given._version, call.returned._version) for call in calls):
        raise refuse(layer)
    ends_in_norm = any(is_same(norm.returned, output) for norm in norms)

    def trace_back(state: torch.Tensor) -> torch.Tensor:
        makers = [norm for norm in norms if is_same(norm.returned, state)]
        # Some layers have an identity in place of a norm, which returns its input.
        if not makers or ends_in_norm or is_same(makers[0].given, state):
            return state
        return trace_back(makers[0].given)

    # Branches in the order that they ran, and the state before each of them.
    order = sorted(range(len(branches)), key=lambda i: [call.name in branches[i] for call in calls].index(True))
    starts = {i: trace_back(next(call for call in calls if call.name in branches[i]).given) for i in order}
    if any(start.numel() != output.numel() for start in starts.values()):
        raise refuse(layer)
    ends: dict[int, torch.Tensor] = {}
    for position, i in enumerate(order):
        following = [starts[j] for j in order[position + 1 :] if not is_same(starts[j], starts[i])]
        end = following[0] if following else output
        together = [j for j in order if is_same(starts[j], starts[i])]
        if len(together) > 1:
            additions = {j: find_addition(calls, norms, branches[j]).reshape(output.shape) for j in together}
            start = starts[i].reshape(output.shape)
            missed = (start + sum(additions.values()) - end.reshape(output.shape)).float().norm()
            if not missed <= ROUNDING * end.float().norm():
                raise refuse(layer)
            end = start + additions[i]
        ends[i] = end
    return [(starts[i].reshape(output.shape), ends[i].reshape(output.shape)) for i in range(len(branches))]


def find_addition(calls: list[Call], norms: list[Call], parts: tuple[str, ...]) -> torch.Tensor:
    """Return the output that a branch adds to its input: that of its last part, or of the norm after it."""
    added = [call for call in calls if call.name in parts][-1].returned
    return next((norm.returned for norm in norms if is_same(norm.given, added)), added)


def is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors are the same numbers in memory, possibly in another shape."""
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel()


def refuse(layer: nn.Module) -> LayerselError:
    """Return the error for a layer whose branches cannot be told apart."""
    return LayerselError(
        f"layersel.selection.granularity: 'group' needs the hidden states between the branches of a layer, and in "
        f"{type(layer).__name__} they were not found. Use `granularity: layer`, or method gradient or fisher, which "
        "do not need them."
    )
