"""Runs on several nodes: copy the files of process 0 to every disk, and explain the loss of a process.

Relied on in torch 2.13.0: gloo raises a RuntimeError whose text names it, other libraries raise a DistError.
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

PIECE = 2**24  # bytes that are sent at once, so that a large adapter needs little memory on a device


def make_folder(folder: Path) -> None:
    """Create ``folder`` on every node. Raise LayerselError, on every process, if one cannot; a collective call."""
    fault = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        process = collectives.get_rank()
        fault = f"output_dir: process {process} cannot make {folder} ({error.strerror or error}). Let it write there."
    refuse_any(fault)


def share_files(run: Run, folder: Path, names: list[str]) -> None:
    """Copy the files that process 0 has in ``folder`` to all nodes; a collective call.

    The first process of each node writes them, unless the node has the same files already, as on a shared disk.

    Args:
        run: the run whose files they are.
        folder: a folder with the same path on all nodes; each file appears in it at once and complete.
        names: the paths of the files in ``folder``; missing ones are skipped.

    Raises:
        LayerselError: on every process, if a file cannot be read or written.
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
    """Return whether ``path`` is a file with the SHA-256 ``content``."""
    try:
        return hash_file(path) == content
    except OSError:
        return False


def share_file(run: Run, path: Path, writes: bool) -> None:
    """Send the file ``path`` from process 0 to the processes with ``writes``, which write it; a collective call."""
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
        except LayerselError as error:  # raised on all processes below
            fault = str(error)
    refuse_any(fault)


def refuse_any(fault: str | None) -> None:
    """Raise LayerselError, on every process, with the first ``fault`` of any; a collective call."""
    first = next((other for other in collectives.gather_from_all(fault) if other), None)
    if first:
        raise LayerselError(first)


def explain_lost_processes(trainer: Trainer) -> None:
    """Make ``trainer.train`` log that a process is lost, before the communication library's error."""
    upstream = trainer.train

    @functools.wraps(upstream)
    def train(*args: Any, **options: Any) -> Any:
        try:
            return upstream(*args, **options)
        except RuntimeError as error:
            if isinstance(error, torch.distributed.DistError) or "gloo" in str(error):
                LOG.error(
                    "layersel: process %d cannot reach another process of the run: that has ended, or has not answered "
                    "for ddp_timeout: %d seconds. Read its log. The run resumes from its last checkpoint.",
                    collectives.get_rank(),
                    trainer.args.ddp_timeout,
                )
            raise

    trainer.train = train  # type: ignore[method-assign]  # of this trainer only
