"""FSDP2: weights, masters and moments are sharded DTensors.

Relied on beyond documented interfaces (``tests/unit/engines/test_fsdp2.py`` fails when one of them changes):

* transformers 5.16.1 and accelerate 1.13.0: the names of the files that a run resumes from. When the trainer is created
  the model is whole on the CPU, with ``cpu_ram_efficient_loading`` only on rank 0.
* accelerate 1.13.0: restoring from FULL_STATE_DICT leaves the shards of ranks above 0 as initialised.
* accelerate 1.13.0, ``_prepare_fsdp2``, and axolotl 0.19.0: ``activation_checkpointing`` wraps modules in others, which
  changes the names of weights. Both read the key when the model is prepared, after ``Trainer.train`` of transformers
  5.16.1 has applied ``gradient_checkpointing``.
* accelerate 1.13.0, ``_prepare_fsdp2``: identifies the parameters of a model that is prepared again by the
  ``data_ptr()`` of their local shards, which is 0 for every empty one.
* torch 2.13.0: parameters and their optimizer's moments are ``DTensor``s. After a forward pass without a backward pass
  a parameter may be whole and plain, in the precision of the forward pass. The offset of a part in the whole comes from
  ``compute_local_shape_and_global_offset``.
"""

import functools
import logging
import math
import os
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.state import AcceleratorState, is_initialized
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Placement, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.engines.base import Engine, multiply_rows, name_random_state
from axolotl_layersel.engines.collectives import add_up, count_ranks, get_rank
from axolotl_layersel.engines.edits import Edit, edit_data
from axolotl_layersel.engines.trainers import get_model

LOG = logging.getLogger("axolotl.layersel")

FOLDERS = ("pytorch_model_fsdp_0", "optimizer_0")


class ShardedEngine(Engine):
    """FSDP2: each rank holds a part of every weight, and gathers a layer for its forward and backward pass."""

    is_streamed: ClassVar[bool] = True
    title: ClassVar[str] = "FSDP2"
    restores_lora: ClassVar[bool] = False
    loads_adapter: ClassVar[bool] = False
    resumes_with_others: ClassVar[bool] = False
    state_writers: ClassVar[dict[str, str]] = {
        "optimizer.bin": "FSDP2 with FULL_STATE_DICT",
        "optimizer_0": "FSDP2 with SHARDED_STATE_DICT",
    }

    @staticmethod
    def list_state_files(checkpoint: Path, rank: int, world: int) -> list[str]:
        if find_state_dict_type() == "FULL_STATE_DICT":
            # Only rank 0 reads them, but the Trainer behaves differently on a rank that does not see them.
            weights = ["pytorch_model_fsdp.bin", "optimizer.bin"]
        else:
            # Replicated data is in one rank's file, which all ranks read.
            shards = [f"__{writer}_*.distcp" for writer in range(world)]
            weights = [f"{folder}/{name}" for folder in FOLDERS for name in (".metadata", *shards)]
        return [*weights, "scheduler.pt", name_random_state(rank, world)]

    def list_ranks_with_weights(self) -> list[int]:
        plugin = self.trainer.accelerator.state.fsdp_plugin
        return [0] if plugin.cpu_ram_efficient_loading else list(range(count_ranks()))

    def take_over_checkpointing(self) -> None:
        plugin, arguments = self.trainer.accelerator.state.fsdp_plugin, self.trainer.args
        if not plugin.activation_checkpointing:
            return
        # Accelerate wraps the parts of each layer and Axolotl the whole layer, so that parts are recomputed twice. The
        # adapter that Axolotl then saves has names that PEFT ignores.
        plugin.activation_checkpointing = False
        arguments.gradient_checkpointing = True
        arguments.gradient_checkpointing_kwargs = {"use_reentrant": False}
        # Another trainer may be created with these arguments, which must not contain both keys.
        config: Any = arguments.fsdp_config  # a dictionary, also if the user gave a file
        config.pop("activation_checkpointing", None)
        if get_rank() == 0:
            LOG.info(
                "layersel: fsdp_config.activation_checkpointing is done by gradient_checkpointing with use_reentrant: "
                "false"
            )

    def writes_whole_state(self) -> bool:
        return self.trainer.accelerator.state.fsdp_plugin.state_dict_type.name == "FULL_STATE_DICT"

    def release(self, model: nn.Module) -> None:
        super().release(model)
        for parameter in model.parameters():
            # Empty shards get distinct pointers, by which accelerate tells them apart.
            shard: Any = getattr(parameter, "_local_tensor", parameter)
            if parameter.requires_grad and shard.numel() == 0:
                shard.data_ptr = functools.partial(id, parameter)

    def reshard(self) -> None:
        for module in get_model(self.trainer).modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def gather_parameter(self, parameter: torch.Tensor) -> torch.Tensor:
        whole = gather_shards(parameter) if isinstance(parameter, DTensor) else parameter
        return super().gather_parameter(whole)

    def write_parameter(self, parameter: torch.Tensor, value: torch.Tensor | None) -> None:
        assert isinstance(parameter, DTensor), "the engine is live, and resharded"
        value = torch.empty(parameter.shape, dtype=parameter.dtype) if value is None else value
        whole = value.to(device=parameter.device_mesh.device_type, dtype=parameter.dtype)
        shards = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
        with torch.no_grad():
            parameter.to_local().copy_(shards.to_local())

    @torch.no_grad()
    def multiply_by_gradients(self, matrices: list[torch.Tensor]) -> torch.Tensor:
        products = torch.zeros(sum(map(len, matrices)), device=self.trainer.args.device)
        parts = products.split([len(matrix) for matrix in matrices])
        for matrix, part in zip(matrices, parts):
            shard = self.find_shard(matrix)
            if shard is not None and isinstance(matrix.grad, DTensor):
                rows = shard[0].view(-1, matrix.shape[1])
                own = part.narrow(0, shard[1] // matrix.shape[1], len(rows))
                own.copy_(multiply_rows(rows, matrix.grad.to_local()))
        add_up(products)
        return products

    def find_shard(self, parameter: torch.Tensor) -> tuple[torch.Tensor, int] | None:
        if not isinstance(parameter, DTensor):
            return super().find_shard(parameter)
        mesh, placements = parameter.device_mesh, parameter.placements
        coordinate = mesh.get_coordinate()
        assert coordinate is not None, "every rank holds a part"
        if any(place and not placement.is_shard() for place, placement in zip(coordinate, placements)):
            return None
        return parameter.to_local().detach().flatten(), find_start(parameter)

    def edit_held(self, tensor: torch.Tensor, edit: Edit, part: torch.Tensor | None = None) -> None:
        if isinstance(tensor, DTensor):
            edit_data(tensor.to_local() if part is None else part, find_start(tensor), tensor.shape, edit)
        else:
            super().edit_held(tensor, edit, part)


def find_state_dict_type() -> str:
    """Return the type of saved state dicts, from the trainer or, before it exists, from the environment."""
    if is_initialized() and getattr(AcceleratorState(), "fsdp_plugin", None) is not None:
        return AcceleratorState().fsdp_plugin.state_dict_type.name
    return os.environ.get("FSDP_STATE_DICT_TYPE", "").upper()


def gather_shards(shards: DTensor) -> torch.Tensor:
    """Return the whole tensor of shards, which may be offloaded, on the mesh's device; a collective call."""
    mesh = shards.device_mesh
    local = shards.to_local().detach().to(mesh.device_type)
    return DTensor.from_local(local, mesh, shards.placements, shape=shards.shape, stride=shards.stride()).full_tensor()


def find_start(shards: DTensor) -> int:
    """Return the offset of this rank's part in the flattened whole.

    Raises:
        LayerselError: if a dimension other than the first is sharded.
    """
    return find_start_of(shards.shape, shards.device_mesh, shards.placements)


@functools.lru_cache
def find_start_of(shape: torch.Size, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> int:
    """Return ``find_start`` of DTensors with these properties; cached, because torch computes it slowly."""
    held, offsets = compute_local_shape_and_global_offset(shape, mesh, placements)
    if tuple(held[1:]) != tuple(shape[1:]):
        raise LayerselError(f"fsdp_config: shards of {placements} are not supported. Shard the first dimension.")
    return offsets[0] * math.prod(held[1:])
