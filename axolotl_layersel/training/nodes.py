"""Several nodes: what the first process has written comes to every disk, and a process that is gone is told of.

Relied on in torch 2.13.0: gloo's errors are a RuntimeError whose text names it, those of other libraries a DistError.
"""

import functools
import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from transformers import Trainer

from axolotl_layersel.common.digests import hash_file
from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.files import write_atomically
from axolotl_layersel.engines import collectives
from axolotl_layersel.lora.run import Run

LOG = logging.getLogger("axolotl.layersel")

PIECE = 2**24  # bytes that are sent at once, so that a large adapter takes no room on a device


def make_folder(folder: Path) -> None:
    """Make ``folder`` on every node; every rank must call this.

    Raises:
        LayerselError: on every rank, if one cannot.
    """
    fault = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        rank = collectives.get_rank()
        fault = f"output_dir: process {rank} cannot make {folder} ({error.strerror or error}). Let it write there."
    refuse_any(fault)


def share_files(run: Run, folder: Path, names: list[str]) -> None:
    """Let the first process of every node write what rank 0 has in ``folder``; every rank must call this.

    Where a node has the same files already, as on a shared disk, nothing is sent. Files that rank 0 does not have are
    left out.

    Args:
        run: whose files they are.
        folder: the same on all nodes; each file appears in it at once and complete.
        names: of the files, below ``folder``.

    Raises:
        LayerselError: on every rank, if one cannot be read or written.
    """
    if not collectives.is_distributed():
        return
    contents = collectives.decide_on_rank_zero(
        lambda: {name: hash_file(folder / name) for name in names if (folder / name).is_file()}
    )
    writes = run.trainer.args.local_process_index == 0 and collectives.get_rank() != 0
    mine = [name for name, content in contents.items() if writes and not is_same(folder / name, content)]
    for name in sorted(collectives.gather_union(mine)):
        share_file(run, folder / name, name in mine)


def is_same(path: Path, content: str) -> bool:
    """Return whether there is a file with the SHA-256 ``content``."""
    try:
        return hash_file(path) == content
    except OSError:
        return False


def share_file(run: Run, path: Path, writes: bool) -> None:
    """Send ``path`` from rank 0 to all ranks, of which those write it that say so; a collective call."""
    held = [b""]

    def read() -> int:
        held[0] = path.read_bytes()
        return len(held[0])

    size = collectives.decide_on_rank_zero(read)
    received = bytearray()
    for start in range(0, size, PIECE):
        piece = torch.empty(min(PIECE, size - start), dtype=torch.uint8)
        if collectives.get_rank() == 0:
            piece = torch.frombuffer(bytearray(held[0][start : start + PIECE]), dtype=torch.uint8)
        piece = piece.to(run.device)
        collectives.broadcast(piece)
        if writes:
            received += piece.cpu().numpy().tobytes()
    fault = None
    if writes:
        try:
            write_atomically(path, bytes(received))
        except LayerselError as error:  # the others must learn of it
            fault = str(error)
    refuse_any(fault)


def refuse_any(fault: str | None) -> None:
    """Raise LayerselError, on every rank, with the first ``fault`` of any; a collective call."""
    first = next((other for other in collectives.gather_from_all(fault) if other), None)
    if first:
        raise LayerselError(first)


def explain_lost_processes(trainer: Trainer) -> None:
    """Let ``trainer.train`` say in one line, in front of the communication library's error, that a process is gone."""
    upstream = trainer.train

    @functools.wraps(upstream)
    def train(*args: Any, **options: Any) -> Any:
        try:
            return upstream(*args, **options)
        except RuntimeError as error:
            if isinstance(error, torch.distributed.DistError) or "gloo" in str(error):
                LOG.error(
                    "layersel: process %d cannot reach another process of the run: that has ended, or has not answered "
                    "for ddp_timeout: %d seconds. Look into its log. The run resumes from its last checkpoint.",
                    collectives.get_rank(),
                    trainer.args.ddp_timeout,
                )
            raise

    trainer.train = train  # type: ignore[method-assign]  # of this trainer alone
