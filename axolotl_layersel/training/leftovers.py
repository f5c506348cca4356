"""Leftovers of a killed run: partly written files, and checkpoints beyond ``save_total_limit``."""

import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from peft.utils import WEIGHTS_NAME

from axolotl_layersel.common.paths import FOLDER, gates_path, list_pictures
from axolotl_layersel.engines import collectives
from axolotl_layersel.lora.run import Run
from axolotl_layersel.training.checkpoints import list_checkpoints
from axolotl_layersel.training.contents import list_recorded, record_path

LOG = logging.getLogger("axolotl.layersel")

RANDOM = "[a-z0-9_]{8}"  # the suffix of files.replace_atomically, and of the standard library's tempfile
TRIAL = re.compile(rf"\.layersel-{RANDOM}")  # written by files.check_output and layouts.write_adapter


def find_leftovers(output_dir: Path) -> list[Path]:
    """Return the partly written files of a killed run, in its folder and in those of its checkpoints.

    Files count if they have a name that this package gives, and folders if they hold only an adapter's files. Links
    are not followed.
    """
    names = [*list_recorded(), *map(str, (gates_path(""), record_path(""), *list_pictures("")))]
    places = [output_dir, *(output_dir / name for name in list_checkpoints(output_dir))]
    found = []
    for folder in [place for place in places if place == output_dir or not place.is_symlink()]:
        for place in (folder, folder / FOLDER):
            if place.is_dir() and (place == folder or not place.is_symlink()):
                own = [Path(name).name for name in names if (folder / name).parent == place]
                found += find_in_folder(place, own)
    return found


def find_in_folder(folder: Path, own: list[str]) -> list[Path]:
    """Return the partly written files in a folder; none, with a warning, if it cannot be read."""
    try:
        return [Path(entry.path) for entry in scan(folder) if is_leftover(entry, own)]
    except FileNotFoundError:  # another node of the same disk was faster
        return []
    except OSError as error:
        LOG.warning("layersel: %s cannot be searched for leftovers (%s)", folder, error.strerror or error)
        return []


def remove_leftovers(run: Run) -> None:
    """Remove the partly written files of a killed run, on every node; a collective call.

    Call it before the trainer resumes, which would load an adapter in such a folder as a further one.
    """
    for path in find_leftovers(run.output_dir) if run.trainer.args.local_process_index == 0 else []:
        remove(path, "was being written when a run was killed")
    collectives.wait_for_everyone()


def scan(folder: Path) -> Iterator[os.DirEntry]:
    """Yield the entries of a folder by name."""
    with os.scandir(folder) as entries:
        yield from sorted(entries, key=lambda entry: entry.name)


def is_leftover(entry: os.DirEntry, own: list[str]) -> bool:
    """Return whether ``entry`` is partly written. ``own``: the files that this package writes to that folder."""
    if entry.is_dir(follow_symlinks=False):
        names = {WEIGHTS_NAME, *(Path(name).name for name in list_recorded() if not name.startswith(FOLDER))}
        inside = list(scan(Path(entry.path))) if TRIAL.fullmatch(entry.name) else None
        return inside is not None and all(
            e.name in names if e.is_file(follow_symlinks=False) else is_leftover(e, own) for e in inside
        )
    pattern = "|".join(rf"\.{re.escape(name)}\.{RANDOM}" for name in own)
    named = TRIAL.fullmatch(entry.name) or (own and re.fullmatch(pattern, entry.name))
    return bool(named) and entry.is_file(follow_symlinks=False)


def find_surplus(
    output_dir: Path, limit: int | None, protected: set[str], is_complete: Callable[[Path], bool]
) -> list[Path]:
    """Return the checkpoints beyond ``limit``: incomplete ones first, then the oldest.

    The Trainer deletes none before it writes the next one, and then may keep a half deleted one as the newest.

    Args:
        output_dir: the folder of the run.
        limit: ``save_total_limit``; None or 0 for no limit.
        protected: the names of the checkpoints to keep.
        is_complete: returns whether a checkpoint can be resumed from.
    """
    names = list_checkpoints(output_dir)[::-1]
    surplus = len(names) - max(limit, len(protected & set(names))) if limit and limit > 0 else 0
    if surplus <= 0:
        return []
    paths = [output_dir / name for name in names if name not in protected]
    deletable = [path for path in paths if path.is_dir() and not path.is_symlink()]
    return sorted(deletable, key=is_complete)[:surplus]


def remove(path: Path, reason: str) -> None:
    """Remove a file or a folder and log the reason, or a warning if it cannot be removed."""
    parent, times = path.parent, os.stat(path.parent)
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        # The Trainer sorts checkpoints by this time.
        os.utime(parent, ns=(times.st_atime_ns, times.st_mtime_ns))
    except FileNotFoundError:  # another node of the same disk was faster
        return
    except OSError as error:
        LOG.warning("layersel: %s %s, but cannot be removed (%s)", path, reason, error.strerror or error)
        return
    LOG.info("layersel: %s %s, and is removed", path, reason)
