"""Reading and writing files: a write is complete or leaves nothing, and every failure is one clear error."""

import contextlib
import csv
import errno
import io
import json
import math
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.paths import FOLDER

LONGEST_PATH = 200  # characters; messages cut longer paths in the middle

T = TypeVar("T")


# --- Writing ------------------------------------------------------------------------------------------------------


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write ``content`` to ``path``, which appears at once and complete.

    Raises:
        LayerselError: if it cannot be written.
    """
    with replace_atomically(path, len(content)) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def replace_atomically(path: str | Path, size: int) -> Iterator[Path]:
    """Yield a temporary file in the folder of ``path``, then flush it and rename it to ``path``; on failure remove it.

    Args:
        path: the file; its folder is created if necessary.
        size: the number of bytes that will be written, for the message.

    Raises:
        LayerselError: if it cannot be written.
    """
    path = Path(path)
    with writing(path, size):
        path.parent.mkdir(parents=True, exist_ok=True)
        name = path.parent / f".{path.name}.{secrets.token_hex(4)}"
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # less what the user's umask takes away
        try:
            yield name
            flush(name)
            os.replace(name, path)
        except BaseException:
            name.unlink(missing_ok=True)
            raise


def flush(path: str | Path) -> None:
    """Return when the file ``path`` is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def writing(path: Path, size: int) -> Iterator[None]:
    """Turn an error within the block into a LayerselError that says why ``path``, of about ``size`` bytes, failed."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise LayerselError(describe_write_failure(path, size, error)) from error


def describe_write_failure(path: Path, size: int, error: OSError | SafetensorError) -> str:
    code = find_error_number(error)
    blocked = next((parent for parent in path.parents if os.path.exists(parent) and not parent.is_dir()), None)
    if blocked is not None:
        return f"{path} cannot be written: {blocked} is a file, where a folder is needed. Move it, or set another one."
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = shutil.disk_usage(next(parent for parent in path.absolute().parents if os.path.exists(parent))).free
        return (
            f"{path} cannot be written ({os.strerror(code)}): it takes {size:,} bytes, and {free:,} are free there. "
            "Free some space, or raise your quota or limit."
        )
    reason = os.strerror(code) if code else str(error)
    return f"{path} cannot be written ({reason}). Let this process write there, or set `output_dir` to another folder."


def find_error_number(error: OSError | SafetensorError) -> int | None:
    """Return the ``errno`` of an error, which safetensors has only in its text."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None


def check_output(folder: str | Path, names: Iterable[str]) -> None:
    """Check that a run can write the files ``names`` of this package, and leave no trace.

    Args:
        folder: the folder of the run, which need not exist.
        names: the names of the files.

    Raises:
        LayerselError: naming what is in the way.
    """
    target = Path(folder).absolute() / FOLDER
    existing = find_existing(target)
    if not existing.is_dir():
        raise LayerselError(
            f"output_dir: {existing} is a file, where a folder is needed. Move it, or set another output_dir."
        )
    occupied = next((target / name for name in names if (target / name).is_dir()), None)
    if occupied is not None:
        raise LayerselError(
            f"output_dir: {occupied} is a folder, where a file is needed. Move it, or set another output_dir."
        )
    try:
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".layersel-") as file:
            file.write(b"\0")
            file.flush()
    except OSError as error:
        raise LayerselError(
            f"output_dir: nothing can be written into {existing} ({error.strerror}). Let this process write there, "
            "free some space, or set another output_dir."
        ) from error


def find_existing(target: Path) -> Path:
    """Return ``target`` or its nearest parent that exists.

    Raises:
        LayerselError: if the folder cannot be created there, because of its name or of a link in its path.
    """
    for place in (target, *target.parents):
        try:
            os.stat(place)
        except (FileNotFoundError, NotADirectoryError):
            if not place.is_symlink():
                continue
            fault = f"the link {place} is broken"
        except (OSError, ValueError) as error:  # a null character in a name is a ValueError
            fault = getattr(error, "strerror", None) or str(error)
        else:
            return place
        folder = str(target if place == target else target.parent)
        if len(folder) > LONGEST_PATH:
            folder = f"{folder[: LONGEST_PATH // 2]}…{folder[-LONGEST_PATH // 2 :]}"
        raise LayerselError(f"output_dir: {folder} cannot be made ({fault}). Set another output_dir.")
    raise AssertionError("the root of a file system exists")


# --- Reading ------------------------------------------------------------------------------------------------------


def refuse(key: str, path: str | Path, fault: str, way_out: str) -> LayerselError:
    """Return the error for a faulty file.

    Args:
        key: the YAML key, or the argument of a command, that named the file.
        path: the path of the file.
        fault: the rest of the sentence that begins with the path.
        way_out: a sentence that says what to do.
    """
    return LayerselError(f"{key}: {path} {fault}. {way_out}")


@contextlib.contextmanager
def reading(key: str, path: str | Path, way_out: str) -> Iterator[None]:
    """Turn an error within the block into a LayerselError that says why ``path`` cannot be read; see ``refuse``."""
    try:
        yield
    except LayerselError:
        raise
    except OSError as error:
        raise refuse(key, path, f"cannot be read ({error.strerror or error})", way_out) from error
    except RecursionError as error:
        raise refuse(key, path, "is damaged (it is nested too deeply)", way_out) from error
    except (ValueError, TypeError, LookupError, RuntimeError, csv.Error, SafetensorError) as error:
        raise refuse(key, path, f"is damaged ({type(error).__name__}: {error})", way_out) from error


def read_parsed(key: str, path: str | Path, way_out: str, parse: Callable[[str], T]) -> T:
    """Return ``parse(text)`` for the text of a UTF-8 file; see ``reading``."""
    with reading(key, path, way_out):
        return parse(Path(path).read_bytes().decode("utf-8"))


def read_json(key: str, path: str | Path, way_out: str) -> Any:
    """Return the content of a JSON file; see ``reading`` and ``parse_json``."""
    text = read_parsed(key, path, way_out, str)
    try:
        return parse_json(text)
    except RecursionError as error:
        raise refuse(key, path, "is not valid JSON (it is nested too deeply)", way_out) from error
    except ValueError as error:
        raise refuse(key, path, f"is not valid JSON, truncated or damaged ({error})", way_out) from error


def read_versioned(key: str, path: str | Path, version: int, way_out: str, other_version: str) -> Any:
    """Return the content of a JSON file whose ``schema_version`` is ``version``; see ``read_json``.

    ``other_version``: what to do about a file of another version.
    """
    content = read_json(key, path, way_out)
    found = content.get("schema_version") if isinstance(content, dict) else None
    if found != version:
        raise LayerselError(
            f"{key}: {path} has schema_version {found!r}, and this version of axolotl-layersel reads {version}. "
            f"{other_version}"
        )
    return content


def parse_json(text: str) -> Any:
    """Return the content of JSON.

    Raises:
        ValueError: also for duplicate keys, numbers that are not finite, and text that is not Unicode.
        RecursionError: if it is nested too deeply.
    """
    content = json.loads(text, object_pairs_hook=join_pairs, parse_constant=parse_number, parse_float=parse_number)
    json.dumps(content, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair cannot be printed
    return content


def join_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON. Raise ValueError for a duplicate key."""
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"the key {name!r} occurs twice")
        content[name] = value
    return content


def parse_number(text: str) -> float:
    """Return a finite number. Raise ValueError for any other text."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number


def parse_csv(text: str) -> list[list[str]]:
    """Return the rows of CSV. Raise ValueError if there is none, and csv.Error for damage."""
    rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    if not rows:
        raise ValueError("it is empty")
    return rows


def format_csv(rows: Iterable[Iterable[Any]]) -> str:
    """Return rows as CSV, which ``parse_csv`` reads."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def parse_count(text: str) -> int:
    """Return a whole number of at least 0. Raise ValueError for other text and for more than 15 digits."""
    if not re.fullmatch(r"[0-9]{1,15}", text):
        raise ValueError(f"{text[:40]!r} is not a whole number of at least 0")
    return int(text)
