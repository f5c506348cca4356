"""The checkpoint that a run resumes from: it has every file that resuming reads, all from one step of one run."""

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
from axolotl_layersel.common.terminal import enumerate_words
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
ARCHIVES = (".pt", ".pth", ".bin", ".distcp")  # zip files of torch.save, whose directory is at the end
ZIP_END, ZIP_END_SIZE = b"PK\x05\x06", 22


# --- Which checkpoint is resumed from -----------------------------------------------------------------------------


def find_resumed_checkpoint(
    settings: LayerselConfig, output_dir: str | Path, explicit: str | None, automatic: bool
) -> str | None:
    """Return the checkpoint that the run resumes from, or None; a collective call.

    Every process examines the files that it will read, so that each node may have its own disk.

    Args:
        settings: the ``layersel`` block.
        output_dir: the folder of the run.
        explicit: the checkpoint that the YAML file names.
        automatic: whether to use the newest complete checkpoint of ``output_dir`` if the file names none. Incomplete
            ones, which a killed run leaves, are skipped.

    Raises:
        LayerselError: on every process, if the named checkpoint is not complete; if a node lacks files that another
            one has; if the engine cannot resume with this number of processes; or if every checkpoint lacks files
            although some were written to the end.
    """
    kind = find_launched_class()
    if explicit:
        check_resumable(explicit, settings, kind)
        return explicit
    # A node that was replaced has none of the checkpoints that the others have.
    names = collectives.gather_union(list_checkpoints(output_dir) if automatic else [])
    faults = {}
    for name in sort_checkpoints(names):
        checkpoint = Path(output_dir) / name
        what, fault = "incomplete", find_fault_anywhere(checkpoint, settings, kind)
        if fault is None:
            what, fault = "not of one step of one run", find_mixture_anywhere(checkpoint, settings, kind)
        if fault is None:
            return str(checkpoint)
        faults[name] = fault
        if collectives.get_rank() == 0:
            LOG.warning("layersel: %s is %s and is not resumed from: %s", checkpoint, what, fault)
    ended = [name for name in faults if read_trainer_state(Path(output_dir) / name) is not None]
    written = collectives.gather_union(ended)
    if written:
        newest = sort_checkpoints(written)[0]
        raise LayerselError(
            f"auto_resume_from_checkpoints: {output_dir} has no complete checkpoint, and {newest} would be lost: "
            f"{faults[newest]}. Restore that, or move the checkpoints away to start anew."
        )
    return None


def check_resumable(checkpoint: str, settings: LayerselConfig, kind: type[Engine]) -> None:
    """Raise LayerselError, on every process, unless a run on an engine of ``kind`` can resume; a collective call."""
    fault = find_fault_anywhere(Path(checkpoint), settings, kind)
    fault = fault or find_mixture_anywhere(Path(checkpoint), settings, kind)
    if fault:
        raise LayerselError(
            f"resume_from_checkpoint: {checkpoint} cannot be resumed from: {fault}. Resume another checkpoint, or "
            "start without resuming."
        )


def check_best(checkpoint: str, settings: LayerselConfig, kind: type[Engine]) -> None:
    """Raise LayerselError, on every process, unless the files of the best checkpoint belong together.

    A collective call. A checkpoint without files of this package is of a plain run that this one continues, and passes.
    """
    is_own = collectives.decide_on_rank_zero(lambda: os.path.lexists(Path(checkpoint) / FOLDER))
    # Process 0 reads the files that a node lacks, see ``trainers.restore_best_model_by``.
    fault = find_mixture_anywhere(Path(checkpoint), settings, kind, needs_all=False) if is_own else None
    if fault:
        raise LayerselError(
            f"load_best_model_at_end: {checkpoint} cannot be loaded: {fault}. The checkpoints stay as they are: use "
            "the adapter of another one, or resume with `load_best_model_at_end: false`."
        )


def list_checkpoints(output_dir: str | Path) -> list[str]:
    """Return the names of a run's checkpoints, the newest first."""
    return sort_checkpoints(os.listdir(output_dir) if os.path.isdir(output_dir) else [])


def sort_checkpoints(names: Iterable[str]) -> list[str]:
    """Return the names of checkpoints among ``names``, the newest first."""
    steps = {name: name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-") for name in names}
    return sorted(
        (name for name, step in steps.items() if step != name and step.isdecimal()), key=lambda name: -int(steps[name])
    )


# --- Faults on any process ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """A checkpoint as one process on ``host`` sees it; see ``find_faults`` and ``read_progress``."""

    host: str
    faults: dict[str, str]
    progress: dict[str, Any] | None


def find_fault_anywhere(checkpoint: Path, settings: LayerselConfig, kind: type[Engine]) -> str | None:
    """Return why the lowest process that cannot read ``checkpoint`` cannot, or None; a collective call.

    Raises:
        LayerselError: on every process, if the checkpoint itself is not at fault: if a node lacks files that another
            one has, if nodes have checkpoints of different runs, or if the engine needs the number of processes that
            wrote it.
    """
    others = wrote_others(checkpoint, kind)
    # Process 0 lists the files of all processes, because another node may lack the file that names the others.
    world = collectives.count_ranks()
    needed = collectives.decide_on_rank_zero(
        lambda: [list_needed_files(checkpoint, settings, kind, process, world, others) for process in range(world)]
    )
    try:
        faults = find_faults(checkpoint, settings, needed[collectives.get_rank()])
    except OSError as error:  # the other processes must not wait for this one
        faults = {"": f"it cannot be read ({error})"}
    views = collectives.gather_from_all(View(socket.gethostname(), faults, read_progress(checkpoint)))
    check_nodes(checkpoint, views)
    return find_first([next(iter(view.faults.values()), None) for view in views], [view.host for view in views])


def find_mixture_anywhere(
    checkpoint: Path, settings: LayerselConfig, kind: type[Engine], needs_all: bool = True
) -> str | None:
    """Return why the files of a complete ``checkpoint`` are not of one step of one run, or None; a collective call.

    Process 0 reads the record, and each process compares the files that it reads itself with it.

    Args:
        checkpoint: the folder.
        settings: the ``layersel`` block.
        kind: the class of the run's engine.
        needs_all: whether the other processes must have all of their files, which nodes without a shared disk may lack.
    """
    record, fault = collectives.decide_on_rank_zero(lambda: examine_record(checkpoint))
    if record is not None:
        process = collectives.get_rank()
        names = list_own_files(settings, process, kind) if process else list_recorded()
        try:
            if process and not needs_all:
                names = [name for name in names if (checkpoint / name).exists()]
            fault = fault or find_other_file(checkpoint, record, names)
        except OSError as error:  # the other processes must not wait for this one
            fault = f"it cannot be read ({error})"
    found = collectives.gather_from_all((fault, socket.gethostname()))
    return find_first([fault for fault, _ in found], [host for _, host in found])


def find_first(faults: list[str | None], hosts: list[str]) -> str | None:
    """Return the first fault of any process, and where it is if not on process 0; None without any."""
    process = next((process for process, fault in enumerate(faults) if fault), None)
    if process is None:
        return None
    return f"{faults[process]} ({name_process(process, hosts)})" if process else faults[process]


def name_process(process: int, hosts: list[str]) -> str:
    """Return the name of a process in messages, with its host if there are several."""
    return f"process {process} on {hosts[process]}" if len(set(hosts)) > 1 else f"process {process}"


def examine_record(checkpoint: Path) -> tuple[Record | None, str | None]:
    """Return the record of a checkpoint, if it can be read, and the fault that it shows."""
    try:
        return read_record(checkpoint), find_mixture(checkpoint)
    except OSError as error:
        name = os.path.relpath(error.filename, checkpoint) if error.filename else checkpoint.name
        return None, f"{name} cannot be read ({error.strerror or error})"
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, SafetensorError) as error:
        return None, f"its files are damaged ({type(error).__name__}: {error})"


def check_nodes(checkpoint: Path, views: list[View]) -> None:
    """Raise LayerselError, on every process, if a node lacks files that another has, or has another run's.

    A collective call. A file that no node has is a fault of the checkpoint itself, and raises nothing.
    """
    lacking = sorted({name for view in views for name in view.faults})
    holders = collectives.gather_from_all([name for name in lacking if is_sound(checkpoint, name)])
    if lacking and all(any(name in names for names in holders) for name in lacking):
        raise LayerselError(describe_copies(checkpoint, views, holders))
    ours, hosts = views[0].progress, [view.host for view in views]
    for process, theirs in enumerate(view.progress for view in views):
        if ours is not None and theirs is not None and ours != theirs:
            key = next(key for key in ours if ours[key] != theirs[key])
            raise LayerselError(
                f"output_dir: {checkpoint} of {name_process(process, hosts)} is another run's than that of "
                f"{name_process(0, hosts)}: their {key} in {TRAINER_STATE_NAME} differ. Every node must have the "
                "checkpoint of the same run: move the wrong one away, and copy the other there."
            )


def describe_copies(checkpoint: Path, views: list[View], holders: list[list[str]]) -> str:
    """Return the message for nodes that lack files. ``holders``: the lacking files that each process has."""
    # Containers may have the same host name and different files.
    disks: dict[tuple, list[int]] = {}
    for process, view in enumerate(views):
        if view.faults:
            disks.setdefault((view.host, *holders[process]), []).append(process)
    parts = []
    for processes in disks.values():
        sources: dict[int, list[str]] = {}
        for name in sorted({name for process in processes for name in views[process].faults}):
            sources.setdefault(next(process for process, held in enumerate(holders) if name in held), []).append(name)
        plural = "es" if len(processes) > 1 else ""
        who = f"process{plural} {enumerate_words(map(str, processes))} on {views[processes[0]].host}"
        for source, files in sources.items():
            held = f"which process {source} on {views[source].host} has"
            parts.append(f"{who} cannot read {enumerate_words(files)}, {held}")
    return (
        f"resume_from_checkpoint: of {checkpoint} {'; '.join(parts)}. Every node reads its own disk: copy these files "
        "there, to the same place, or put output_dir on a disk that all nodes share."
    )


def wrote_others(checkpoint: Path, kind: type[Engine]) -> bool:
    """Return whether another number of processes than this run's wrote ``checkpoint``; a collective call.

    Raises:
        LayerselError: on every process, if the engine cannot resume then.
    """
    world, writers = collectives.count_ranks(), count_writers(checkpoint)
    if writers is None or writers == world:
        return False
    said = f"{checkpoint} was written by {'one process' if writers == 1 else f'{writers} processes'}, and this run has"
    if not kind.resumes_with_others:
        raise LayerselError(
            f"resume_from_checkpoint: {said} {world}. Under {kind.title} a run resumes with as many processes as it "
            "had: start that many, or begin a new run from the adapter in it with lora_model_dir."
        )
    if collectives.get_rank() == 0:
        LOG.warning("layersel: %s %d: random streams, such as dropout's, begin anew", said, world)
    return True


def count_writers(checkpoint: Path) -> int | None:
    """Return how many processes wrote a checkpoint, by the files of random states on all nodes; a collective call.

    None if there are no such files.
    """
    names = collectives.gather_union(path.name for path in checkpoint.glob("rng_state*.pth"))
    numbers = [int(match[1]) for name in names if (match := re.fullmatch(r"rng_state_(\d+)\.pth", name))]
    if numbers:
        return max(*numbers, 1) + 1  # a single process does not number its file
    return 1 if "rng_state.pth" in names else None


def read_trainer_state(checkpoint: Path) -> dict[str, Any] | None:
    """Return the Trainer's state, which is written last; None if the checkpoint was not written to the end."""
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return state if isinstance(state, dict) else None


def read_progress(checkpoint: Path) -> dict[str, Any] | None:
    """Return values of the Trainer's state that differ between runs; None if they cannot be read."""
    state = read_trainer_state(checkpoint) or {}
    try:
        # As text, because NaN differs from itself.
        losses = [str(entry["loss"]) for entry in state["log_history"] if "loss" in entry]
        return {"global_step": state["global_step"], "max_steps": state["max_steps"], "losses": losses}
    except (LookupError, TypeError):
        return None


# --- The files that a process reads -------------------------------------------------------------------------------


def list_needed_files(
    checkpoint: Path, settings: LayerselConfig, kind: type[Engine], process: int, world: int, others: bool
) -> list[str]:
    """Return the files that ``process`` of ``world`` reads to resume, as patterns in ``checkpoint``.

    ``others``: whether other processes wrote it, so that their random states are useless.
    """
    state = kind.list_state_files(checkpoint, process, world)
    state = [name for name in state if not others or name != name_random_state(process, world)]
    return [TRAINER_STATE_NAME, *state, *list_own_files(settings, process, kind)]


def list_own_files(settings: LayerselConfig, process: int, kind: type[Engine]) -> list[str]:
    """Return the files of a checkpoint that ``process`` reads for this package: the adapter, plan, ranks and record.

    Process 0 decides for all. Where weights are whole, every process loads them itself.
    """
    needed = [Path(ADAPTER)] if process == 0 or kind.loads_adapter else []
    if settings.l1ra and needed:
        needed.append(state_path(""))
    if process == 0:
        needed += [plan_path("")] if settings.selection else []
        needed += [ranks_path("")] if settings.l1ra else []
        needed += [record_path(""), Path(CONFIG_NAME)]
    return [str(path) for path in needed]


def is_resumable(checkpoint: Path, settings: LayerselConfig, kind: type[Engine]) -> bool:
    """Return whether this process's disk has every file of ``checkpoint`` that it would read to resume.

    Checkpoints of another number of processes count too: their random states are ignored.
    """
    process, world = collectives.get_rank(), collectives.count_ranks()
    return not find_faults(
        checkpoint, settings, list_needed_files(checkpoint, settings, kind, process, world, others=True)
    )


def holds(checkpoint: Path, engine: Engine) -> bool:
    """Return whether this process's disk has every file of a checkpoint that ``engine`` and PEFT read."""
    state = engine.list_state_files(checkpoint, collectives.get_rank(), collectives.count_ranks())
    return all(any(checkpoint.glob(pattern)) for pattern in (ADAPTER, *state))


def find_faults(checkpoint: Path, settings: LayerselConfig, needed: list[str]) -> dict[str, str]:
    """Return the faults of the ``needed`` files of a checkpoint, by file or pattern."""
    faults: dict[str, str | None] = {}
    for pattern in needed:
        names = list_matches(checkpoint, pattern)
        if not checkpoint.is_dir():
            faults[pattern] = "there is no such folder"
        elif not names:
            faults[pattern] = f"{pattern} is missing{explain_missing(checkpoint, pattern, needed, settings)}"
        else:
            faults[pattern] = find_first_fault(checkpoint, names)
    for name in OPTIONAL_STATE_FILES:
        faults[name] = find_file_fault(checkpoint, name) if (checkpoint / name).exists() else None
    return {name: fault for name, fault in faults.items() if fault}


def list_matches(checkpoint: Path, pattern: str) -> list[str]:
    """Return the files of a checkpoint that match ``pattern``, as sorted paths in it."""
    return sorted(str(path.relative_to(checkpoint)) for path in checkpoint.glob(pattern))


def is_sound(checkpoint: Path, pattern: str) -> bool:
    """Return whether a checkpoint has files that match ``pattern``, and all can be read."""
    try:
        names = list_matches(checkpoint, pattern) if pattern else []
        return bool(names) and find_first_fault(checkpoint, names) is None
    except OSError:
        return False


def find_first_fault(checkpoint: Path, names: list[str]) -> str | None:
    return next((fault for name in names if (fault := find_file_fault(checkpoint, name))), None)


def explain_missing(checkpoint: Path, pattern: str, needed: list[str], settings: LayerselConfig) -> str:
    """Return the rest of the sentence that says that a file is missing: the reason, if it is known.

    ``needed``: the files that are read; the second one is the engine's first.
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
    """Return why a file cannot be read, or None. Nothing is unpickled."""
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

    A file of a distributed checkpoint holds several archives, and a truncated one may still have an earlier directory.
    """
    with open(path, "rb") as file:
        file.seek(-min(ZIP_END_SIZE, path.stat().st_size), os.SEEK_END)
        if not file.read().startswith(ZIP_END):
            raise zipfile.BadZipFile("it does not end as an archive does")
        zipfile.ZipFile(file).close()
