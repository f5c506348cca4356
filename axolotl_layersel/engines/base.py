"""The operations of an engine, for those on which every rank holds all weights whole.

Relied on beyond documented interfaces (``tests/unit/engines/test_base.py`` fails when one of them changes): in
transformers 5.16.1 the files that one process and DDP resume from are ``optimizer.pt``, ``scheduler.pt`` and the random
state of each rank.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn
from transformers import Trainer

from axolotl_layersel.engines.collectives import broadcast, count_ranks, decide_on_rank_zero, get_rank
from axolotl_layersel.engines.edits import Edit, edit_data, fill
from axolotl_layersel.engines.moments import find_moments, release_pages, unwrap_optimizer


class Engine:
    """One process, or DDP: every rank holds all weights whole, all the time.

    Other engines override what differs. A call that communicates says so; every rank must make it.

    Attributes:
        trainer: whose engine it is.
        name: as plans and messages have it.
        is_streamed: whether layers come to the device one at a time, so that the model need not fit on it.
        runs_in_lockstep: whether a forward pass communicates, so that all ranks must run the same number of them.
        title: as messages to the user have the engine's kind.
        restores_lora: whether a resumed run gets its LoRA weights back without our help.
        loads_adapter: whether every rank reads the adapter of the checkpoint that it resumes from.
        keeps_gradients: whether weights that train have their averaged gradient from the backward pass to the step.
        resumes_with_others: whether a run resumes with another number of processes than it had.
        state_writers: files that show whose optimizer's state a checkpoint holds, as patterns, and the engine's name.
    """

    is_streamed: ClassVar[bool] = False
    runs_in_lockstep: ClassVar[bool] = False
    title: ClassVar[str] = "DDP"
    restores_lora: ClassVar[bool] = True
    loads_adapter: ClassVar[bool] = True
    keeps_gradients: ClassVar[bool] = True
    resumes_with_others: ClassVar[bool] = True
    state_writers: ClassVar[dict[str, str]] = {"optimizer.pt": "one process or DDP"}

    def __init__(self, trainer: Trainer, name: str) -> None:
        self.trainer = trainer
        self.name = name

    # --- Before the engine runs ---------------------------------------------------------------------------------------

    @staticmethod
    def list_state_files(checkpoint: Path, rank: int, world: int) -> list[str]:
        """Return what this engine reads to resume, as patterns in the folder of a checkpoint.

        Args:
            checkpoint: its folder.
            rank: whose files are asked for: those that all ranks read, and its own.
            world: the number of processes.
        """
        return ["optimizer.pt", "scheduler.pt", name_random_state(rank, world)]

    def list_ranks_with_weights(self) -> list[int]:
        """Return the ranks that can run the model before the engine is built."""
        return list(range(count_ranks()))

    def has_weights(self) -> bool:
        """Return whether this rank can run the model before the engine is built."""
        return get_rank() in self.list_ranks_with_weights()

    @contextlib.contextmanager
    def materialize(self, tensors: list[torch.Tensor]) -> Iterator[None]:
        """Make parameters and buffers whole on the trainer's device within the block, then as they were before.

        What lies whole on the CPU is copied to the device, and the copy dropped.
        """
        with move(tensors, self.trainer.args.device):
            yield

    @contextlib.contextmanager
    def keep_config(self) -> Iterator[None]:
        """Give the engine's configuration back as it was; within the block its schedule follows the run's steps."""
        yield

    def take_over_checkpointing(self) -> None:
        """Let layers compute their activations again as transformers does it, where the engine was asked to do it."""

    def check_storage(self, writes: bool) -> None:
        """Raise LayerselError where weights, or optimizer states that are written too, lie out of reach."""

    def check_optimizer(self) -> None:
        """Raise LayerselError where the engine's own settings choose an optimizer under which rank cannot move."""

    def writes_whole_state(self) -> bool:
        """Return whether checkpoints hold the optimizer's state gathered, where the engine splits it."""
        return False

    def find_shape(self, parameter: torch.Tensor) -> torch.Size:
        """Return the shape of the whole of ``parameter``."""
        return parameter.shape

    def holds_whole(self, parameter: torch.Tensor) -> bool:
        """Return whether this rank holds the whole of ``parameter`` before the engine is built."""
        return True

    # --- A trial of training, and back --------------------------------------------------------------------------------

    def copy_trained(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Return what ``restore_trained`` needs of the parameters that train, by name, before the engine is built."""
        return {name: p.detach().clone().cpu() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def restore_trained(self, model: nn.Module, values: dict[str, torch.Tensor]) -> None:
        """Write ``values`` into the live engine's parameters, but not into its optimizer; every rank must call this."""
        self.reshard()
        parameters = dict(model.named_parameters())
        for name in decide_on_rank_zero(lambda: list(values)):
            self.write_parameter(parameters[name], values.get(name))

    def release(self, model: nn.Module) -> None:
        """Let go of an engine that has trained, so that another one can be built; every rank must call this."""
        for parameter in model.parameters():
            parameter.grad = None
        release_pages(self.trainer.optimizer)
        self.trainer.accelerator.free_memory()

    # --- Weights of the live engine -----------------------------------------------------------------------------------

    def reshard(self) -> None:
        """Let go of whole weights that a forward pass without a backward pass has left behind."""

    def gather_parameter(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return the whole of ``parameter`` on the CPU, detached; every rank must call this."""
        return parameter.detach().clone().cpu()

    def gather_parameters(self, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        """Return the whole parameters by name on rank 0, an empty mapping elsewhere; every rank must call this."""
        gathered = {}
        for name, parameter in parameters.items():
            tensor = self.gather_parameter(parameter)
            if get_rank() == 0:
                gathered[name] = tensor.contiguous()
        return gathered

    def write_parameter(self, parameter: torch.Tensor, value: torch.Tensor | None) -> None:
        """Write rank 0's whole ``value`` into a parameter; every rank must call this, and others may pass None."""
        if value is not None:
            parameter.data.copy_(value)
        broadcast(parameter.data)

    @torch.no_grad()
    def multiply_by_gradients(self, matrices: list[torch.Tensor]) -> torch.Tensor:
        """Return the products of each row of some matrices with its averaged gradient, (rows of all,), fp32.

        A matrix that got no gradient counts as one whose gradient is zero. Every rank must call this, where the engine
        keeps gradients, between the backward pass and the optimizer's step.
        """
        return torch.cat([multiply_rows(matrix, matrix.grad) for matrix in matrices])

    def find_shard(self, parameter: torch.Tensor) -> tuple[torch.Tensor, int] | None:
        """Return this rank's part of a parameter, flat, and the place of its first element in the whole.

        All ranks' parts together are the whole, once: a rank whose part is a copy of another's gets None. Every rank
        must call this, after ``reshard``.
        """
        return (parameter.detach().flatten(), 0) if get_rank() == 0 else None

    @torch.no_grad()
    def edit_parameter(self, parameter: torch.Tensor, edit: Edit) -> None:
        """Change a parameter that the engine trains between two optimizer steps, on every rank.

        What the next forward reads and, where there is one, the fp32 master both change; what ``edit`` leaves as it is
        stays so bit for bit. Nothing is communicated: every rank changes the part that it holds.
        """
        self.edit_weight(parameter, edit)

    @torch.no_grad()
    def edit_weight(self, parameter: torch.Tensor, edit: Edit) -> None:
        """Change a parameter on every rank, but not the fp32 master that the engine may have of it."""
        self.edit_held(parameter, edit)

    @torch.no_grad()
    def zero_moments(self, parameter: torch.Tensor, components: torch.Tensor, dim: int) -> None:
        """Let Adam's moments of some rows or columns of a parameter be zero, on every rank, as ``edit_parameter`` does.

        Those of the others stay as they are bit for bit, and so do the scales of 8-bit ones.

        Args:
            parameter: a matrix.
            components: which rows or columns, (count,), int64.
            dim: 0 for rows, 1 for columns.

        Raises:
            LayerselError: if the optimizer keeps moments in a way that is not known.
        """
        optimizer = unwrap_optimizer(self.trainer.optimizer)
        state = optimizer.state.get(parameter, {})
        if not state and any(optimizer.state.values()):
            return  # no gradient has reached it yet: its moments are zero
        for moment in find_moments(state, type(optimizer).__name__):
            self.edit_held(moment.whole, fill(components, dim, moment.zero), moment.values)

    def edit_held(self, tensor: torch.Tensor, edit: Edit, part: torch.Tensor | None = None) -> None:
        """Change the part of a tensor that this rank holds: ``part`` where it is given, its own data by default."""
        edit_data(tensor.data if part is None else part, 0, tensor.shape, edit)


def multiply_rows(matrix: torch.Tensor, other: torch.Tensor | None) -> torch.Tensor:
    """Return the products of rows of two matrices, (rows,), fp32; None is a matrix of zeros."""
    if other is None:
        return torch.zeros(len(matrix), device=matrix.device)
    return torch.linalg.vecdot(matrix.float(), other.float())


def name_random_state(rank: int, world: int) -> str:
    """Return the name of the file in a checkpoint that holds the random state of a rank."""
    return "rng_state.pth" if world == 1 else f"rng_state_{rank}.pth"


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
    quant_state = getattr(tensor, "quant_state", None)
    if quant_state is not None:
        quant_state.to(data.device)
