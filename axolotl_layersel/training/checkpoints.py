"""Which checkpoint a run resumes from: one that holds everything that resuming reads, all of one step of one run."""

import json
import logging
import os
import re
import socket
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME
from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.paths import FOLDER, plan_path, ranks_path, state_path
from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.engines import collectives, find_launched_class, list_classes
from axolotl_layersel.engines.base import Engine, name_random_state
from axolotl_layersel.engines.trainers import OPTIONAL_STATE_FILES, find_state_fault
from axolotl_layersel.selection.plan_file import read_plan
from axolotl_layersel.training.contents import (
    Record,
    find_mixture,
    find_other_file,
    list_recorded,
    read_record,
    record_path,
)

LOG = logging.getLogger("axolotl.layersel")

ADAPTER = "adapter_model.safetensors"
ARCHIVES = (".pt", ".pth", ".bin", ".distcp")  # what torch.save writes: zip, whose directory stands at the end
ZIP_END, ZIP_END_SIZE = b"PK\x05\x06", 22


def find_resumed_checkpoint(
    settings: LayerselConfig, output_dir: str | Path, explicit: str | None, automatic: bool
) -> str | None:
    """Return the checkpoint that the run resumes from, or None; every rank must call this.

    Every rank looks at what it will read itself, so that each node may have a disk of its own.

    Args:
        settings: the ``layersel`` block.
        output_dir: of the run.
        explicit: the checkpoint that the YAML file names.
        automatic: whether to take the newest complete one of ``output_dir`` where none is named. A run that was
            killed while it wrote a checkpoint has left an incomplete one, which is passed over.

    Raises:
        LayerselError: on every rank, if the one that is named is not complete; if a node lacks what another one has;
            if the engine cannot resume with this number of processes; or if all lack something although they were
            written to the end.
    """
    kind = find_launched_class()
    if explicit:
        check_resumable(explicit, settings, kind)
        return explicit
    # A node that was replaced has none of those that the others have.
    names = collectives.gather_union(list_checkpoints(output_dir) if automatic else [])
    faults = {}
    for name in sort_checkpoints(names):
        checkpoint = Path(output_dir) / name
        faults[name] = find_fault_anywhere(checkpoint, settings, kind)
        what = "incomplete"
        if faults[name] is None:
            faults[name] = find_mixture_anywhere(checkpoint, settings, kind)
            what = "not of one step of one run"
        if faults[name] is None:
            return str(checkpoint)
        if collectives.get_rank() == 0:
            LOG.warning("layersel: %s is %s and is not resumed from: %s", checkpoint, what, faults[name])
    ended = [name for name in faults if was_ended(Path(output_dir) / name)]
    written = collectives.gather_union(ended)
    if written:
        newest = sort_checkpoints(written)[0]
        raise LayerselError(
            f"auto_resume_from_checkpoints: {output_dir} has no complete checkpoint, and {newest} would be lost: "
            f"{faults[newest]}. Restore that, or move the checkpoints away to start anew."
        )
    return None


def check_resumable(checkpoint: str, settings: LayerselConfig, kind: type[Engine]) -> None:
    """Raise LayerselError, on every rank, unless a run on an engine of ``kind`` can resume from a checkpoint.

    A collective call.
    """
    fault = find_fault_anywhere(Path(checkpoint), settings, kind)
    fault = fault or find_mixture_anywhere(Path(checkpoint), settings, kind)
    if fault:
        raise LayerselError(
            f"resume_from_checkpoint: {checkpoint} cannot be resumed from: {fault}. Resume another checkpoint, or "
            "start without resuming."
        )


def list_checkpoints(output_dir: str | Path) -> list[str]:
    """Return the names of a run's checkpoints, the newest first."""
    entries = os.listdir(output_dir) if os.path.isdir(output_dir) else []
    return sort_checkpoints(entries)


def sort_checkpoints(names: Iterable[str]) -> list[str]:
    """Return those of ``names`` that are a checkpoint's, the newest first."""
    steps = {name: name.rpartition("-") for name in names}
    found = {name: step for name, (prefix, _, step) in steps.items() if prefix == PREFIX_CHECKPOINT_DIR}
    return sorted((name for name in found if found[name].isdecimal()), key=lambda name: -int(found[name]))


def find_fault_anywhere(checkpoint: Path, settings: LayerselConfig, kind: type[Engine]) -> str | None:
    """Return what of ``checkpoint`` a rank lacks, of several the lowest one, or None; a collective call.

    ``kind``: the class of the run's engine.

    Raises:
        LayerselError: on every rank, where that is no fault of the checkpoint: if a node lacks what another one has,
            if nodes have checkpoints of different runs, or if the engine needs as many processes as wrote it.
    """
    others = wrote_others(checkpoint, kind)
    # Rank 0 tells what each rank reads: another node may lack the file that names the others.
    world = collectives.count_ranks()
    needed = collectives.decide_on_rank_zero(
        lambda: [list_needed_files(checkpoint, settings, kind, rank, world, others) for rank in range(world)]
    )
    try:
        faults = find_faults(checkpoint, settings, needed[collectives.get_rank()])
    except OSError as error:  # one rank's disk must not leave the others waiting
        faults = {"": f"it cannot be read ({error})"}
    views = collectives.gather_from_all(View(socket.gethostname(), faults, read_progress(checkpoint)))
    check_nodes(checkpoint, views)
    for rank, view in enumerate(views):
        for fault in view.faults.values():
            return f"{fault} ({name_process(rank, views)})" if rank else fault
    return None


def find_mixture_anywhere(
    checkpoint: Path, settings: LayerselConfig, kind: type[Engine], needs_all: bool = True
) -> str | None:
    """Return why the files of a complete ``checkpoint`` are not of one step of one run, or None; a collective call.

    Process 0 has the record of what belongs together, and each process compares the files that it reads itself.

    ``needs_all``: whether other processes must have all of these files, which nodes without a shared disk may lack.
    """
    record, fault = collectives.decide_on_rank_zero(lambda: look_at_record(checkpoint))
    if record is not None:
        rank = collectives.get_rank()
        names = list_recorded() if rank == 0 else list_own_files(settings, rank, kind)
        try:
            if rank and not needs_all:
                names = [name for name in names if (checkpoint / name).exists()]
            fault = fault or find_other_file(checkpoint, record, names)
        except OSError as error:  # one rank's disk must not leave the others waiting
            fault = f"it cannot be read ({error})"
    faults = collectives.gather_from_all((socket.gethostname(), fault))
    several = len({host for host, _ in faults}) > 1
    for rank, (host, found) in enumerate(faults):
        if found:
            where = f" (process {rank}{f' on {host}' if several else ''})"
            return f"{found}{where if rank else ''}"
    return None


def look_at_record(checkpoint: Path) -> tuple[Record | None, str | None]:
    """Return the record of a checkpoint, and what contradicts it; without a record only that."""
    try:
        return read_record(checkpoint), find_mixture(checkpoint)
    except OSError as error:
        name = os.path.relpath(error.filename, checkpoint) if error.filename else checkpoint.name
        return None, f"{name} cannot be read ({error.strerror or error})"
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, SafetensorError) as error:
        return None, f"its files are damaged ({type(error).__name__}: {error})"


def check_best(checkpoint: str, settings: LayerselConfig, kind: type[Engine]) -> None:
    """Raise LayerselError, on every rank, unless the files of the best checkpoint belong together; a collective call.

    One that has nothing of this package's is a plain run's, which this one has taken up, and says nothing.

    ``kind``: the class of the run's engine.
    """
    is_own = collectives.decide_on_rank_zero(lambda: os.path.lexists(Path(checkpoint) / FOLDER))
    # What a node lacks is read by process 0, see ``trainers.restore_best_model_by``.
    fault = find_mixture_anywhere(Path(checkpoint), settings, kind, needs_all=False) if is_own else None
    if fault:
        raise LayerselError(
            f"load_best_model_at_end: {checkpoint} cannot be loaded: {fault}. The checkpoints stay as they are: use "
            "the adapter of another one, or resume with `load_best_model_at_end: false`."
        )


def was_ended(checkpoint: Path) -> bool:
    """Return whether a checkpoint was written to its end: the Trainer's own state, which comes last, is JSON."""
    try:
        return isinstance(json.loads((checkpoint / TRAINER_STATE_NAME).read_bytes()), dict)
    except (OSError, ValueError, RecursionError):
        return False


@dataclass(frozen=True)
class View:
    """What a rank sees of a checkpoint.

    Attributes:
        host: the rank's.
        faults: see ``find_faults``.
        progress: see ``read_progress``.
    """

    host: str
    faults: dict[str, str]
    progress: dict[str, Any] | None


def name_process(rank: int, views: list[View]) -> str:
    """Return what a rank is called in messages: with its host, where there are several."""
    several = len({view.host for view in views}) > 1
    return f"process {rank} on {views[rank].host}" if several else f"process {rank}"


def check_nodes(checkpoint: Path, views: list[View]) -> None:
    """Raise LayerselError, on every rank, if a node lacks what another has, or has another run's; a collective call.

    Nothing is raised where a file is on no node: then the checkpoint itself is incomplete.
    """
    lacking = sorted({name for view in views for name in view.faults})
    held = [name for name in lacking if is_sound(checkpoint, name)]
    holders = collectives.gather_from_all(held)
    if lacking and all(any(name in names for names in holders) for name in lacking):
        raise LayerselError(describe_copies(checkpoint, views, holders))
    for rank, view in enumerate(views):
        if view.progress is not None and views[0].progress is not None and view.progress != views[0].progress:
            raise LayerselError(
                f"output_dir: {checkpoint} of {name_process(rank, views)} is another run's than that of "
                f"{name_process(0, views)}: {describe_difference(views[0].progress, view.progress)}. Every node must "
                "have the checkpoint of the same run: move the wrong one away, and copy the other there."
            )


def describe_copies(checkpoint: Path, views: list[View], holders: list[list[str]]) -> str:
    """Return the message for nodes that lack files which others have. ``holders``: the files that each rank has."""
    # Containers may share their host's name, and then have other files.
    disks: dict[tuple, list[int]] = {}
    for rank, view in enumerate(views):
        if view.faults:
            disks.setdefault((view.host, *holders[rank]), []).append(rank)
    parts = []
    for ranks in disks.values():
        names = sorted({name for rank in ranks for name in views[rank].faults})
        sources: dict[int, list[str]] = {}
        for name in names:
            sources.setdefault(next(rank for rank, held in enumerate(holders) if name in held), []).append(name)
        who = f"process{'es' if len(ranks) > 1 else ''} {join(map(str, ranks))} on {views[ranks[0]].host}"
        for source, files in sources.items():
            parts.append(f"{who} cannot read {join(files)}, which process {source} on {views[source].host} has")
    return (
        f"resume_from_checkpoint: of {checkpoint} {'; '.join(parts)}. Every node reads its own disk: copy these files "
        "there, to the same place, or put output_dir on a disk that all nodes share."
    )


def join(words: Iterable[str]) -> str:
    """Return a list in words: ``a, b and c``."""
    words = list(words)
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def wrote_others(checkpoint: Path, kind: type[Engine]) -> bool:
    """Return whether ``checkpoint`` was written by another number of processes than this run has; a collective call.

    The files of the random states say how many there were, together on all nodes.

    Raises:
        LayerselError: on every rank, if the engine cannot resume from it then.
    """
    world = collectives.count_ranks()
    writers = count_writers(checkpoint)
    if writers is None or writers == world:
        return False
    if not kind.resumes_with_others:
        raise LayerselError(
            f"resume_from_checkpoint: {checkpoint} was written by {describe_count(writers)}, and this run has {world}. "
            f"Under {kind.title} a run resumes with as many processes as it had: start that many, or begin a new run "
            "from the adapter in it with lora_model_dir."
        )
    if collectives.get_rank() == 0:
        LOG.warning(
            "layersel: %s was written by %s, and this run has %d: random streams, such as dropout's, begin anew",
            checkpoint,
            describe_count(writers),
            world,
        )
    return True


def describe_count(writers: int) -> str:
    """Return a number of processes in words."""
    return "one process" if writers == 1 else f"{writers} processes"


def count_writers(checkpoint: Path) -> int | None:
    """Return how many processes wrote a checkpoint, as far as it shows; None where it does not. A collective call."""
    names = collectives.gather_union(path.name for path in checkpoint.glob("rng_state*.pth"))
    numbers = [int(match[1]) for name in names if (match := re.fullmatch(r"rng_state_(\d+)\.pth", name))]
    if numbers:
        return max(*numbers, 1) + 1  # one process alone would not number it
    return 1 if "rng_state.pth" in names else None


def read_progress(checkpoint: Path) -> dict[str, Any] | None:
    """Return what tells a checkpoint of one run from that of another; None where it cannot be read."""
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_bytes())
        # As text, since what is not a number differs from itself.
        losses = [str(entry["loss"]) for entry in state["log_history"] if "loss" in entry]
        return {"global_step": state["global_step"], "max_steps": state["max_steps"], "losses": losses}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def describe_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Return in which value two runs' progress differs."""
    key = next(key for key in ours if ours[key] != theirs[key])
    return f"their {key} in {TRAINER_STATE_NAME} differ"


def list_needed_files(
    checkpoint: Path, settings: LayerselConfig, kind: type[Engine], rank: int, world: int, others: bool
) -> list[str]:
    """Return what ``rank`` of ``world`` reads to resume from ``checkpoint``, as patterns in its folder.

    ``kind``: the class of its engine; ``others``: whether other processes wrote it, so that their random states are of
    no use.
    """
    state = kind.list_state_files(checkpoint, rank, world)
    state = [name for name in state if not others or name != name_random_state(rank, world)]
    return [TRAINER_STATE_NAME, *state, *list_own_files(settings, rank, kind)]


def find_fault(checkpoint: Path, settings: LayerselConfig, rank: int, world: int) -> str | None:
    """Return why ``rank`` of ``world`` cannot resume from ``checkpoint``, or None if all that it reads is there."""
    needed = list_needed_files(checkpoint, settings, find_launched_class(), rank, world, others=False)
    return next(iter(find_faults(checkpoint, settings, needed).values()), None)


def is_resumable(checkpoint: Path, settings: LayerselConfig, kind: type[Engine]) -> bool:
    """Return whether this rank's disk has all of ``checkpoint`` that it would read to resume on an engine of a kind.

    Checkpoints that other processes wrote count too: their random states are not looked for.
    """
    rank, world = collectives.get_rank(), collectives.count_ranks()
    needed = list_needed_files(checkpoint, settings, kind, rank, world, others=True)
    return not find_faults(checkpoint, settings, needed)


def find_faults(checkpoint: Path, settings: LayerselConfig, needed: list[str]) -> dict[str, str]:
    """Return what is wrong with the files of a checkpoint that are ``needed``, by file or pattern."""
    faults = {}
    for pattern in needed:
        names = sorted(str(path.relative_to(checkpoint)) for path in checkpoint.glob(pattern))
        fault = find_first_fault(checkpoint, names)
        if not names:
            fault = f"{pattern} is missing{explain_missing(checkpoint, pattern, needed, settings)}"
        if not checkpoint.is_dir():
            fault = "there is no such folder"
        if fault:
            faults[pattern] = fault
    for name in OPTIONAL_STATE_FILES:
        fault = find_file_fault(checkpoint, name) if (checkpoint / name).exists() else None
        if fault:
            faults[name] = fault
    return faults


def is_sound(checkpoint: Path, pattern: str) -> bool:
    """Return whether there are files of ``pattern`` in a checkpoint, and all can be read."""
    try:
        names = [str(path.relative_to(checkpoint)) for path in checkpoint.glob(pattern)] if pattern else []
        return bool(names) and find_first_fault(checkpoint, names) is None
    except OSError:
        return False


def holds(checkpoint: Path, engine: Engine) -> bool:
    """Return whether this rank's disk has all of a checkpoint that ``engine`` and PEFT read."""
    state = engine.list_state_files(checkpoint, collectives.get_rank(), collectives.count_ranks())
    return all(any(checkpoint.glob(pattern)) for pattern in (ADAPTER, *state))


def find_first_fault(checkpoint: Path, names: list[str]) -> str | None:
    """Return the fault of the first file of ``names`` that cannot be read, or None."""
    return next((fault for fault in (find_file_fault(checkpoint, name) for name in names) if fault), None)


def list_own_files(settings: LayerselConfig, rank: int, kind: type[Engine]) -> list[str]:
    """Return the files of a checkpoint that ``rank`` reads for this package: the adapter, and what the settings need.

    The first process decides and tells the others. Where weights are whole, every rank loads them itself.
    """
    needed = [Path(ADAPTER)] if rank == 0 or kind.loads_adapter else []
    if settings.l1ra and needed:
        needed.append(state_path(""))
    if rank == 0:
        needed += [plan_path("")] if settings.selection else []
        needed += [ranks_path("")] if settings.l1ra else []
        needed += [record_path(""), Path(CONFIG_NAME)]
    return [str(path) for path in needed]


def explain_missing(checkpoint: Path, pattern: str, needed: list[str], settings: LayerselConfig) -> str:
    """Return the rest of a sentence, where it can be told why a file is not there.

    ``needed``: what is read, of which the engine's first file comes second.
    """
    if pattern == str(record_path("")):
        return ", which says what belongs together: it was lost, or an earlier axolotl-layersel wrote the checkpoint"
    if pattern.startswith(FOLDER):
        if settings.l1ra is None and state_path(checkpoint).exists():
            return "; the checkpoint is of a run with layersel.l1ra, without which its adapter does not fit"
        return ", so it is not of a run with this `layersel` block"
    if pattern != needed[1]:
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
        elif path == record_path(checkpoint):
            read_record(checkpoint)
        elif path.name == TRAINER_STATE_NAME:
            fault = find_state_fault(json.loads(path.read_bytes()))
            if fault:
                return f"{name} is damaged ({fault})"
            TrainerState.load_from_json(str(path))
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
