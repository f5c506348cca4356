"""Which checkpoint a run resumes from: one that holds everything that resuming reads."""

import json
import logging
import os
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from axolotl_layersel.args import LayerselBlock
from axolotl_layersel.engines import collectives, find_launched_class, list_classes
from axolotl_layersel.errors import LayerselError
from axolotl_layersel.files import FOLDER
from axolotl_layersel.l1ra.records import ranks_path
from axolotl_layersel.l1ra.state import state_path
from axolotl_layersel.plan import plan_path, read_plan
from axolotl_layersel.trainers import OPTIONAL_STATE_FILES

LOG = logging.getLogger("axolotl.layersel")

ADAPTER = "adapter_model.safetensors"
ARCHIVES = (".pt", ".pth", ".bin", ".distcp")  # what torch.save writes: zip, whose directory stands at the end
ZIP_END, ZIP_END_SIZE = b"PK\x05\x06", 22


def find_resumed_checkpoint(
    settings: LayerselBlock, output_dir: str | Path, explicit: str | None, automatic: bool
) -> str | None:
    """Return the checkpoint that the run resumes from, or None; every rank must call this.

    Every rank looks at what it will read itself, so that its shards may lie on a disk of its own.

    Args:
        settings: the ``layersel`` block.
        output_dir: of the run.
        explicit: the checkpoint that the YAML file names.
        automatic: whether to take the newest complete one of ``output_dir`` where none is named. A run that was
            killed while it wrote a checkpoint has left an incomplete one, which is passed over.

    Raises:
        LayerselError: on every rank, if the one that is named is not complete, or all lack something although they
            were written to the end.
    """
    if explicit:
        fault = find_fault_anywhere(Path(explicit), settings)
        if fault:
            raise LayerselError(
                f"resume_from_checkpoint: {explicit} cannot be resumed from: {fault}. Resume another checkpoint, or "
                "start without resuming."
            )
        return explicit
    faults = {}
    for name in collectives.decide_on_rank_zero(lambda: list_checkpoints(output_dir) if automatic else []):
        checkpoint = Path(output_dir) / name
        faults[name] = find_fault_anywhere(checkpoint, settings)
        if faults[name] is None:
            return str(checkpoint)
        if collectives.get_rank() == 0:
            LOG.warning("layersel: %s is incomplete and is not resumed from: %s", checkpoint, faults[name])
    written = collectives.decide_on_rank_zero(
        lambda: [name for name in faults if find_file_fault(Path(output_dir) / name, TRAINER_STATE_NAME) is None]
    )
    if written:  # the Trainer's own state comes last
        raise LayerselError(
            f"auto_resume_from_checkpoints: {output_dir} has no complete checkpoint, and {written[0]} would be lost: "
            f"{faults[written[0]]}. Restore that, or move the checkpoints away to start anew."
        )
    return None


def list_checkpoints(output_dir: str | Path) -> list[str]:
    """Return the names of a run's checkpoints, the newest first."""
    entries = os.listdir(output_dir) if os.path.isdir(output_dir) else []
    steps = {entry: entry.rpartition("-") for entry in entries}
    found = {entry: step for entry, (name, _, step) in steps.items() if name == PREFIX_CHECKPOINT_DIR}
    return sorted((entry for entry in found if found[entry].isdecimal()), key=lambda entry: -int(found[entry]))


def find_fault_anywhere(checkpoint: Path, settings: LayerselBlock) -> str | None:
    """Return what of ``checkpoint`` a rank lacks, of several the lowest one, or None; a collective call.

    Raises:
        LayerselError: if another node cannot see a checkpoint that is complete for the first one.
    """
    seen = collectives.gather_from_all(os.path.exists(checkpoint / TRAINER_STATE_NAME))
    if seen[0] and not all(seen):
        raise LayerselError(
            f"resume_from_checkpoint: process {seen.index(False)} does not see {checkpoint / TRAINER_STATE_NAME}, and "
            "process 0 does. Every node reads the checkpoint: put output_dir on a disk that all of them share."
        )
    try:
        fault = find_fault(checkpoint, settings, collectives.get_rank(), collectives.count_ranks())
    except OSError as error:  # one rank's disk must not leave the others waiting
        fault = f"it cannot be read ({error})"
    faults = collectives.gather_from_all(fault)
    return next((f"{fault} (process {rank})" if rank else fault for rank, fault in enumerate(faults) if fault), None)


def find_fault(checkpoint: Path, settings: LayerselBlock, rank: int, world: int) -> str | None:
    """Return why ``rank`` of ``world`` cannot resume from ``checkpoint``, or None if all that it reads is there."""
    if not checkpoint.is_dir():
        return "there is no such folder"
    state = find_launched_class().list_state_files(checkpoint, rank, world)
    for pattern in (TRAINER_STATE_NAME, *state, *(list_own_files(settings) if rank == 0 else ())):
        names = sorted(str(path.relative_to(checkpoint)) for path in checkpoint.glob(pattern))
        if not names:
            return f"{pattern} is missing{explain_missing(checkpoint, pattern, state, settings)}"
        fault = find_first_fault(checkpoint, names)
        if fault:
            return fault
    return find_first_fault(checkpoint, [name for name in OPTIONAL_STATE_FILES if (checkpoint / name).exists()])


def find_first_fault(checkpoint: Path, names: list[str]) -> str | None:
    """Return the fault of the first file of ``names`` that cannot be read, or None."""
    return next((fault for fault in (find_file_fault(checkpoint, name) for name in names) if fault), None)


def list_own_files(settings: LayerselBlock) -> list[str]:
    """Return the files of a checkpoint that rank 0 reads for this package: the adapter, and what the settings need."""
    needed = [Path(ADAPTER)]
    if settings.selection:
        needed.append(plan_path(""))
    if settings.l1ra:
        needed += [state_path(""), ranks_path("")]
    return [str(path) for path in needed]


def explain_missing(checkpoint: Path, pattern: str, state: list[str], settings: LayerselBlock) -> str:
    """Return the rest of a sentence, where it can be told why a file is not there. ``state``: what the engine reads."""
    if pattern.startswith(FOLDER):
        if settings.l1ra is None and state_path(checkpoint).exists():
            return "; the checkpoint is of a run with layersel.l1ra, without which its adapter does not fit"
        return ", so it is not of a run with this `layersel` block"
    if pattern.startswith("rng_state"):
        return "; a run resumes with as many processes as it had"
    if pattern != state[0]:
        return ""
    writers = {pattern: name for kind in list_classes() for pattern, name in kind.state_writers.items()}
    writer = next((name for pattern, name in writers.items() if any(checkpoint.glob(pattern))), None)
    if writer is None:
        return ", as is all state of the optimizer, which `save_only_model: true` leaves out"
    return f"; the checkpoint was written by {writer}"


def find_file_fault(checkpoint: Path, name: str) -> str | None:
    """Return what keeps a file from being read, or None; nothing is unpickled."""
    path = checkpoint / name
    try:
        if path.stat().st_size == 0:
            return f"{name} is empty"
        if path == plan_path(checkpoint):
            read_plan(path, "resume_from_checkpoint")
        elif path.name == TRAINER_STATE_NAME:
            step = TrainerState.load_from_json(str(path)).global_step
            if not isinstance(step, int) or isinstance(step, bool) or step < 1:
                return f"{name} is damaged (its global_step is {step!r})"
        elif path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="numpy"):
                pass
        elif path.suffix in ARCHIVES:
            check_archive(path)
    except OSError as error:
        return f"{name} cannot be read ({error.strerror or error})"
    except (ValueError, TypeError, RecursionError, zipfile.BadZipFile, SafetensorError) as error:
        return f"{name} is truncated or damaged ({error})"
    return None


def check_archive(path: Path) -> None:
    """Raise BadZipFile unless the file ends with the directory of an archive.

    A file of a distributed checkpoint holds several archives. The end of an earlier one must not be taken for its own.
    """
    with open(path, "rb") as file:
        file.seek(-min(ZIP_END_SIZE, path.stat().st_size), os.SEEK_END)
        if not file.read().startswith(ZIP_END):
            raise zipfile.BadZipFile("it does not end as an archive does")
        zipfile.ZipFile(file).close()
