"""Communication between the ranks of a run, whatever the engine; it is trivial if there is one process.

Relied on in torch 2.13.0: the process group's store is ``distributed_c10d._get_default_store()``, and its ``wait``
raises ``DistStoreError`` after the timeout.
"""

from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed

from axolotl_layersel.common.errors import LayerselError

T = TypeVar("T")


def is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def get_rank() -> int:
    """Return this process's rank among all processes of all nodes."""
    return torch.distributed.get_rank() if is_distributed() else 0


def count_ranks() -> int:
    """Return the number of processes of all nodes."""
    return torch.distributed.get_world_size() if is_distributed() else 1


def decide_on_rank_zero(decide: Callable[[], T]) -> T:
    """Compute ``decide()`` on rank 0 and return the result on every rank; a collective call.

    Raises:
        LayerselError: on every rank, if rank 0 raised it. If rank 0 raised another exception, it is raised there, and
            the other ranks raise a LayerselError that names it, so that none waits for rank 0.
    """
    if not is_distributed():
        return decide()
    outcome: list[Any] = [None, None]
    failure: Exception | None = None
    if get_rank() == 0:
        try:
            outcome[0] = decide()
        except Exception as error:
            failure = error
            outcome[1] = str(error) if isinstance(error, LayerselError) else f"process 0 failed: {error!r}"
    torch.distributed.broadcast_object_list(outcome, src=0)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise LayerselError(outcome[1])
    return outcome[0]


def gather_on_rank_zero(values: dict[int, torch.Tensor], ranks: list[int]) -> torch.Tensor | None:
    """Return the values of ``ranks`` on rank 0, stacked in the order of their index; None elsewhere."""
    if is_distributed() and ranks != [0]:
        world = torch.distributed.get_world_size()
        parts: list[dict[int, torch.Tensor]] | None = [{} for _ in range(world)] if get_rank() == 0 else None
        torch.distributed.gather_object(values, parts, dst=0)
        values = {index: value for part in parts or [] for index, value in part.items()}
    return torch.stack([values[index] for index in sorted(values)]) if get_rank() == 0 else None


def wait_for_everyone() -> None:
    if is_distributed():
        torch.distributed.barrier()


def broadcast(tensor: torch.Tensor) -> None:
    """Overwrite ``tensor`` with rank 0's on every rank; a collective call."""
    if is_distributed():
        torch.distributed.broadcast(tensor, src=0)


def add_up(tensor: torch.Tensor) -> None:
    """Sum ``tensor`` over all ranks in place; a collective call."""
    if is_distributed():
        torch.distributed.all_reduce(tensor)


def average(tensor: torch.Tensor) -> None:
    if is_distributed():
        add_up(tensor)
        tensor.div_(torch.distributed.get_world_size())


def average_differentiably(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the averages over all ranks; forward and backward pass are collective calls."""
    if not is_distributed():
        return tensors
    from torch.distributed.nn.functional import all_reduce

    flat = torch.cat([tensor.flatten() for tensor in tensors])
    flat = all_reduce(flat) / torch.distributed.get_world_size()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors)]


def gather_from_all(value: T) -> list[T]:
    """Return the values of all ranks, by rank; a collective call."""
    if not is_distributed():
        return [value]
    values: list[T] = [value] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def gather_union(values: Iterable[T]) -> set[T]:
    """Return the union of the values of all ranks; a collective call."""
    return {value for passed in gather_from_all(list(values)) for value in passed}


def find_differing_ranks(digest: bytes | None) -> list[int]:
    """Return the ranks whose ``digest`` is neither None nor that of rank 0, ascending; a collective call."""
    digests = gather_from_all(digest)
    return [rank for rank, other in enumerate(digests) if other not in (None, digests[0])]


def find_absent_ranks(place: str, seconds: float) -> list[int]:
    """Return the ranks that have not called this with ``place`` within ``seconds``, ascending.

    It uses the store instead of a collective call, which would wait or match another library's call.
    """
    if not is_distributed():
        return []
    store = torch.distributed.distributed_c10d._get_default_store()
    keys = [f"layersel/{place}/{rank}" for rank in range(torch.distributed.get_world_size())]
    store.set(keys[get_rank()], "here")
    try:
        store.wait(keys, timedelta(seconds=seconds))
    except torch.distributed.DistStoreError:
        return [rank for rank, key in enumerate(keys) if not store.check([key])]
    return []


def begin_to_share(number: int, device: torch.device) -> Callable[[], int]:
    """Start to compute the largest ``number`` of all ranks; a collective call.

    Return a function that waits for the other ranks and the device, and returns the result.
    """
    if not is_distributed():
        return lambda: number
    value = torch.tensor([number], device=device)
    work = torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX, async_op=True)

    def finish() -> int:
        work.wait()
        return int(value.item())

    return finish


def share_largest(number: int, device: torch.device) -> int:
    """Return the largest ``number`` of all ranks; a collective call that waits for all of them."""
    return begin_to_share(number, device)()


def leave(code: int) -> None:
    """Exit with ``code`` once all ranks call this, so that none is left in a collective call."""
    wait_for_everyone()
    if is_distributed():
        torch.distributed.destroy_process_group()
    raise SystemExit(code)
