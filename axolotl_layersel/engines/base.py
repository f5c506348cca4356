"""The operations of an engine, as implemented for one process and DDP.

Relied on beyond documented interfaces (``tests/unit/engines/test_base.py`` fails when it changes): in transformers
5.16.1 one process and DDP resume from ``optimizer.pt``, ``scheduler.pt`` and the random state of each rank.
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
from axolotl_layersel.engines.moments import Moment, find_moments, release_pages, unwrap_optimizer


class Engine:
    """One process or DDP: every rank always holds all weights whole. Other engines override what differs.

    Attributes:
        trainer: the trainer of the run.
        name: the engine's name in plans and messages.
        is_streamed: whether layers are loaded onto the device one at a time, so that the model need not fit on it.
        runs_in_lockstep: whether a forward pass communicates, so that all ranks must run the same number of them.
        title: the kind of engine in messages.
        restores_lora: whether the trainer itself restores LoRA weights when it resumes.
        loads_adapter: whether every rank reads the adapter of the checkpoint that it resumes from.
        keeps_gradients: whether averaged gradients exist between the backward pass and the optimizer step.
        resumes_with_others: whether a run can resume with a different number of processes.
        settling_steps: how many steps after a change of the backward pass are slower than those that follow.
        state_writers: engines by the pattern of a file that only they write to checkpoints.
    """

    is_streamed: ClassVar[bool] = False
    runs_in_lockstep: ClassVar[bool] = False
    title: ClassVar[str] = "DDP"
    restores_lora: ClassVar[bool] = True
    loads_adapter: ClassVar[bool] = True
    keeps_gradients: ClassVar[bool] = True
    resumes_with_others: ClassVar[bool] = True
    settling_steps: ClassVar[int] = 0
    state_writers: ClassVar[dict[str, str]] = {"optimizer.pt": "one process or DDP"}

    def __init__(self, trainer: Trainer, name: str) -> None:
        self.trainer = trainer
        self.name = name

    # --- Before the engine runs ---------------------------------------------------------------------------------------

    @staticmethod
    def list_state_files(checkpoint: Path, rank: int, world: int) -> list[str]:
        """Return patterns of the files that ``rank`` of ``world`` reads from a checkpoint's folder to resume."""
        return ["optimizer.pt", "scheduler.pt", name_random_state(rank, world)]

    def list_ranks_with_weights(self) -> list[int]:
        """Return the ranks that can run the model before the engine is built."""
        return list(range(count_ranks()))

    def has_weights(self) -> bool:
        """Return whether this rank can run the model before the engine is built."""
        return get_rank() in self.list_ranks_with_weights()

    @contextlib.contextmanager
    def materialize(self, tensors: list[torch.Tensor]) -> Iterator[None]:
        """Make parameters and buffers whole on the trainer's device within the block."""
        with move(tensors, self.trainer.args.device):
            yield

    @contextlib.contextmanager
    def keep_config(self) -> Iterator[None]:
        """Let the engine's own schedule follow the run's steps in the block; restore its configuration afterwards."""
        yield

    def take_over_checkpointing(self) -> None:
        """Replace the engine's activation checkpointing, if it was asked for, by that of transformers."""

    def check_storage(self, writes: bool) -> None:
        """Raise LayerselError if weights, or with ``writes`` also optimizer states, are out of reach."""

    def check_optimizer(self) -> None:
        """Raise LayerselError if the engine's own settings choose an optimizer with which rank cannot move."""

    def writes_whole_state(self) -> bool:
        """Return whether checkpoints hold the gathered state of an optimizer that the engine shards."""
        return False

    def find_shape(self, parameter: torch.Tensor) -> torch.Size:
        return parameter.shape

    def holds_whole(self, parameter: torch.Tensor) -> bool:
        """Return whether this rank holds the whole parameter before the engine is built."""
        return True

    # --- Trial training -----------------------------------------------------------------------------------------------

    def copy_trained(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Return copies of the trained parameters for ``restore_trained``, by name, before the engine is built."""
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if self.is_streamed:
            return self.gather_parameters(trained)  # only rank 0 holds the copies
        return {name: parameter.detach().clone().cpu() for name, parameter in trained.items()}

    @torch.no_grad()
    def restore_trained(self, model: nn.Module, values: dict[str, torch.Tensor]) -> None:
        """Write ``values`` into the live engine's parameters, not its optimizer; every rank must call this."""
        self.reshard()
        parameters = dict(model.named_parameters())
        for name in decide_on_rank_zero(lambda: list(values)):
            self.write_parameter(parameters[name], values.get(name))

    def release(self, model: nn.Module) -> None:
        """Release an engine that has trained, so that another can be built; every rank must call this."""
        for parameter in model.parameters():
            parameter.grad = None
        release_pages(self.trainer.optimizer)
        self.trainer.accelerator.free_memory()

    # --- Weights of the live engine -----------------------------------------------------------------------------------

    def reshard(self) -> None:
        """Drop whole weights that a forward pass without a backward pass has left behind."""

    def gather_parameter(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return the whole parameter on the CPU, detached; every rank must call this."""
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
        """Return the dot product of each row of the matrices with its averaged gradient, (rows,), fp32.

        A missing gradient counts as zero. Requires ``keeps_gradients``. Every rank must call this, between the backward
        pass and the optimizer step.
        """
        return torch.cat([multiply_rows(matrix, matrix.grad) for matrix in matrices])

    def find_shard(self, parameter: torch.Tensor) -> tuple[torch.Tensor, int] | None:
        """Return this rank's flat part of a parameter and its offset in the whole, or None for a replica.

        The parts of all ranks cover the whole exactly once. Every rank must call this, after ``reshard``.
        """
        return (parameter.detach().flatten(), 0) if get_rank() == 0 else None

    @torch.no_grad()
    def edit_parameter(self, parameter: torch.Tensor, edit: Edit) -> None:
        """Edit a trained parameter and its fp32 master, if any, between two optimizer steps.

        Every rank must call this and edits its own part, without communication. Other elements stay bit for bit.
        """
        self.edit_weight(parameter, edit)

    @torch.no_grad()
    def edit_weight(self, parameter: torch.Tensor, edit: Edit) -> None:
        """Edit a parameter, but not its fp32 master; every rank must call this."""
        self.edit_held(parameter, edit)

    @torch.no_grad()
    def zero_moments(self, parameter: torch.Tensor, components: torch.Tensor, dim: int) -> None:
        """Zero Adam's moments of some rows or columns of a matrix; every rank must call this.

        Other moments, and the scales of 8-bit ones, stay bit for bit.

        Args:
            parameter: the matrix.
            components: indices of rows or columns, (count,), int64.
            dim: 0 for rows, 1 for columns.

        Raises:
            LayerselError: if the optimizer keeps moments in an unknown way.
        """
        for moment in self.list_moments(parameter):
            self.edit_moment(parameter, moment, fill(components, dim, moment.zero))

    @torch.no_grad()
    def scale_moments(self, parameter: torch.Tensor, factor: float) -> None:
        """Change Adam's moments of a parameter to those of gradients ``factor`` times as large.

        Moments of 8 bits keep their codes, and the scales of their blocks change. Under ZeRO, whose blocks can be of
        two parameters, the codes change to the nearest ones. Every rank must call this.

        Raises:
            LayerselError: if the optimizer keeps moments in an unknown way.
        """
        for moment in self.list_moments(parameter):
            if moment.scales is None:
                self.edit_moment(parameter, moment, moment.scale(factor))
            else:
                moment.scales.mul_(factor**moment.order)

    def list_moments(self, parameter: torch.Tensor) -> list[Moment]:
        """Return Adam's moments of a parameter on this rank.

        Raises:
            LayerselError: if the optimizer keeps moments in an unknown way.
        """
        optimizer = unwrap_optimizer(self.trainer.optimizer)
        state = optimizer.state.get(parameter, {})
        if not state and any(optimizer.state.values()):
            return []  # it has had no gradient yet, so it has no moments
        return find_moments(state, type(optimizer).__name__)

    def edit_moment(self, parameter: torch.Tensor, moment: Moment, edit: Edit) -> None:
        """Edit this rank's part of a moment of a parameter."""
        self.edit_held(moment.whole, edit, moment.values)

    def edit_held(self, tensor: torch.Tensor, edit: Edit, part: torch.Tensor | None = None) -> None:
        """Edit this rank's part of a tensor; ``part``: where it is, default: the tensor's own data."""
        edit_data(tensor.data if part is None else part, 0, tensor.shape, edit)


def multiply_rows(matrix: torch.Tensor, other: torch.Tensor | None) -> torch.Tensor:
    """Return the dot products of rows of two matrices, (rows,), fp32; None is a matrix of zeros."""
    if other is None:
        return torch.zeros(len(matrix), device=matrix.device)
    return torch.linalg.vecdot(matrix.float(), other.float())


def name_random_state(rank: int, world: int) -> str:
    """Return the name of the checkpoint file with the random state of a rank."""
    return "rng_state.pth" if world == 1 else f"rng_state_{rank}.pth"


@contextlib.contextmanager
def move(tensors: list[torch.Tensor], device: torch.device) -> Iterator[None]:
    """Move ``tensors`` to ``device`` within the block, and restore their own data afterwards."""
    origins = [(tensor, tensor.data) for tensor in tensors if tensor.device != device]
    for tensor, data in origins:
        move_tensor(tensor, data.to(device))
    try:
        yield
    finally:
        for tensor, data in origins:
            move_tensor(tensor, data)


def move_tensor(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """Set the data of ``tensor``, and move a 4-bit weight's quantisation state to its device."""
    tensor.data = data
    quant_state = getattr(tensor, "quant_state", None)
    if quant_state is not None:
        quant_state.to(data.device)
