"""The one place that knows DDP, DeepSpeed ZeRO and FSDP2, and the private parts of the libraries under them.

What is relied on beyond documented interfaces, with the version it was seen in (``tests/test_engines.py``
fails loudly when one of them changes):

* transformers 5.16.1, ``Trainer.save_model``: writes every checkpoint's adapter, before any push to a hub;
  without a usable adapter on ZeRO-3 (unless ``stage3_gather_16bit_weights_on_model_save``) and on FSDP2
  with SHARDED_STATE_DICT.
* transformers 5.16.1, ``PreTrainedModel.enable_input_require_grads``: registers forward hooks named
  ``make_inputs_require_grads`` on the embeddings, more than once under gradient checkpointing.
* transformers 5.16.1 and accelerate 1.13.0: at the trainer's creation a ZeRO-3 model is partitioned and an
  FSDP2 model lies whole on the CPU, or with ``cpu_ram_efficient_loading`` on rank 0 alone.
* accelerate 1.13.0: restoring FSDP2 weights from FULL_STATE_DICT leaves the shards of ranks above 0 as they
  were initialised.
* deepspeed 0.18.9: a partitioned parameter has ``ds_id``.
* torch 2.13.0: an FSDP2 parameter is a ``DTensor``.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed
from torch import nn
from transformers import Trainer

from axolotl_layersel.errors import LayerselError

T = TypeVar("T")


def name_engine(trainer: Trainer) -> str:
    """Return ``single``, ``ddp``, ``zero1``, ``zero2``, ``zero3`` or ``fsdp2``.

    Raises:
        LayerselError: for an engine that is not supported.
    """
    accelerator = trainer.accelerator
    kind = accelerator.distributed_type.value
    if kind == "NO":
        return "single"
    if kind == "DEEPSPEED":
        stage = int(accelerator.state.deepspeed_plugin.zero_stage)
        return f"zero{stage}" if stage else "ddp"
    if kind == "FSDP" and accelerator.state.fsdp_plugin.fsdp_version == 2:
        return "fsdp2"
    if kind.startswith("MULTI_"):
        return "ddp"
    raise LayerselError(
        f"layersel: the engine {kind} is not supported. Use one process, DDP, DeepSpeed ZeRO-1, 2 or 3, or FSDP2."
    )


def is_distributed() -> bool:
    """Return whether several processes train together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def get_rank() -> int:
    """Return this process's rank among all processes of all nodes."""
    return torch.distributed.get_rank() if is_distributed() else 0


def decide_on_rank_zero(decide: Callable[[], T]) -> T:
    """Return ``decide()`` as rank 0 computed it, on every rank; files that it reads need lie on rank 0's disk only.

    Raises:
        LayerselError: on every rank, if rank 0 raised it. Another exception of rank 0 is raised there, and
            named in a LayerselError elsewhere, so that no rank waits for one that is gone.
    """
    if not is_distributed():
        return decide()
    outcome: list[object] = [None, None]
    failure: Exception | None = None
    if get_rank() == 0:
        try:
            outcome[0] = decide()
        except Exception as error:
            failure = error
            outcome[1] = str(error) if isinstance(error, LayerselError) else f"rank 0 failed: {error!r}"
    torch.distributed.broadcast_object_list(outcome, src=0)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise LayerselError(outcome[1])
    return outcome[0]  # type: ignore[return-value]


def gather_on_rank_zero(values: dict[int, torch.Tensor], ranks: list[int]) -> torch.Tensor | None:
    """Return the values that ``ranks`` hold, stacked in the order of their index, on rank 0; None elsewhere."""
    if is_distributed() and ranks != [0]:
        world = torch.distributed.get_world_size()
        parts: list[dict[int, torch.Tensor]] | None = [{} for _ in range(world)] if get_rank() == 0 else None
        torch.distributed.gather_object(values, parts, dst=0)
        values = {index: value for part in parts or [] for index, value in part.items()}
    return torch.stack([values[index] for index in sorted(values)]) if get_rank() == 0 else None


def wait_for_everyone() -> None:
    """Return when all ranks have come here."""
    if is_distributed():
        torch.distributed.barrier()


# --- A pass of the model before any engine exists -----------------------------------------------------------------


def ranks_with_weights(trainer: Trainer) -> list[int]:
    """Return the ranks that can run the model: all, but rank 0 alone under FSDP's ``cpu_ram_efficient_loading``."""
    if name_engine(trainer) == "fsdp2" and trainer.accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
        return [0]
    return list(range(torch.distributed.get_world_size() if is_distributed() else 1))


def runs_in_lockstep(trainer: Trainer) -> bool:
    """Return whether a forward pass communicates, so that all ranks must run the same number of them."""
    return name_engine(trainer) == "zero3"


def is_streamed(trainer: Trainer) -> bool:
    """Return whether layers come to the device one at a time: ZeRO-3 and FSDP2, whose model need not fit on it."""
    return name_engine(trainer) in ("zero3", "fsdp2")


@contextlib.contextmanager
def materialize(trainer: Trainer, tensors: list[torch.Tensor]) -> Iterator[None]:
    """Make parameters and buffers whole and put them on the trainer's device, then as they were.

    ZeRO-3 gathers its partitions and lets them go again; what lies whole on the CPU (FSDP2 before sharding,
    LoRA weights) is copied to the device, and the copy dropped.
    """
    partitioned = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
    whole = [tensor for tensor in tensors if not hasattr(tensor, "ds_id")]
    with contextlib.ExitStack() as stack:
        if partitioned:
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(partitioned))
        stack.enter_context(move(whole, trainer.args.device))
        yield


@contextlib.contextmanager
def move(tensors: list[torch.Tensor], device: torch.device) -> Iterator[None]:
    """Let ``tensors`` hold copies on ``device``, then their own data again."""
    origins = [(tensor, tensor.data) for tensor in tensors if tensor.device != device]
    for tensor, data in origins:
        move_tensor(tensor, data.to(device))
    try:
        yield
    finally:
        for tensor, data in origins:
            move_tensor(tensor, data)


def move_tensor(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """Give ``tensor`` the data of another device; a 4-bit weight's quantisation state follows it."""
    tensor.data = data
    if getattr(tensor, "quant_state", None) is not None:
        tensor.quant_state.to(data.device)


# --- Weights of a live engine -------------------------------------------------------------------------------------


def gather_parameter(parameter: nn.Parameter) -> torch.Tensor:
    """Return the whole of ``parameter`` on the CPU, detached; a collective call on ZeRO-3 and FSDP2."""
    if hasattr(parameter, "full_tensor"):
        return parameter.full_tensor().detach().cpu()
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone().cpu()
    return parameter.detach().clone().cpu()


def set_fsdp_parameter(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Write rank 0's ``value`` (whole) into the shards of an FSDP2 ``parameter`` on all ranks; a collective call."""
    from torch.distributed.tensor import distribute_tensor

    whole = value.to(device=parameter.device_mesh.device_type, dtype=parameter.dtype)
    shards = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
    with torch.no_grad():
        parameter.to_local().copy_(shards.to_local())


def upstream_writes_adapter(trainer: Trainer) -> bool:
    """Return whether ``Trainer.save_model`` writes a complete adapter on this engine.

    ZeRO-3 leaves frozen LoRA weights out, or everything; FSDP2 writes no adapter with SHARDED_STATE_DICT.
    """
    engine = name_engine(trainer)
    if engine == "fsdp2":
        return "FULL_STATE_DICT" in str(trainer.accelerator.state.fsdp_plugin.state_dict_type)
    return engine != "zero3"


def remove_embedding_hooks(model: nn.Module) -> None:
    """Remove every hook by which transformers makes the embeddings' output require a gradient."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", "") in ("make_inputs_require_grads", "make_inputs_require_grad"):
                del module._forward_hooks[key]


def share_flag(flag: bool, device: torch.device) -> bool:
    """Return whether any rank passed True; a collective call.

    It waits for the device. So does the Trainer after every micro-batch, where it looks for NaN in the loss.
    """
    if not is_distributed():
        return flag
    value = torch.tensor([int(flag)], device=device)
    torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
    return bool(value.item())


def leave(code: int) -> None:
    """End this process with ``code`` once all ranks are here, so that none is cut off in a collective call."""
    wait_for_everyone()
    if is_distributed():
        torch.distributed.destroy_process_group()
    raise SystemExit(code)
