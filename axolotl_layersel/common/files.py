"""This package's files: written complete or not at all, and read with one clear error."""

import contextlib
import csv
import errno
import io
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.paths import FOLDER

# Longer paths are cut in the message for one that cannot be made.
LONG = 200

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
    """Yield a temporary file beside ``path``, then flush it to disk and rename it to ``path``; on failure remove it.

    Args:
        path: the file; its folder is made where it does not exist.
        size: bytes that will be written, for the message.

    Raises:
        LayerselError: if it cannot be written.
    """
    path = Path(path)
    with writing(path, size):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        try:
            yield Path(name)
            flush(name)
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise


def flush(path: str | Path) -> None:
    """Return when the file ``path`` lies on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def writing(path: Path, size: int) -> Iterator[None]:
    """Say in one sentence why ``path``, of about ``size`` bytes, cannot be written within the block.

    Raises:
        LayerselError: naming the path, and where the disk is full the bytes.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise LayerselError(describe_write_failure(path, size, error)) from error


def describe_write_failure(path: Path, size: int, error: OSError | SafetensorError) -> str:
    """Return the message for a file that cannot be written."""
    code = find_code(error)
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


def find_code(error: OSError | SafetensorError) -> int | None:
    """Return the operating system's number of an error; safetensors has it in its text only."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None


def check_output(folder: str | Path, names: Iterable[str]) -> None:
    """Check that files of this package can be written for the run in ``folder``, and leave no trace.

    Args:
        folder: of the run; it need not exist.
        names: of the files.

    Raises:
        LayerselError: naming what is in the way.
    """
    target = Path(folder).absolute() / FOLDER
    existing = find_existing(target)
    if not existing.is_dir():
        raise LayerselError(
            f"output_dir: {existing} is a file, where a folder is needed. Move it, or set another output_dir."
        )
    for name in names:
        if (target / name).is_dir():
            raise LayerselError(
                f"output_dir: {target / name} is a folder, where a file is to be written. Move it, or set another "
                "output_dir."
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
    """Return the lowest of a folder and its parents that exists.

    Raises:
        LayerselError: if the folder cannot be made below that, because of its name or of a link in its path.
    """
    for place in (target, *target.parents):
        try:
            os.stat(place)
        except (FileNotFoundError, NotADirectoryError):
            if not place.is_symlink():
                continue
            fault = f"the link {place} leads to nothing that is there"
        except (OSError, ValueError) as error:  # a null character in a name is a ValueError
            fault = (error.strerror if isinstance(error, OSError) else str(error)) or "it cannot be looked at"
        else:
            return place
        folder = target if place == target else target.parent
        raise LayerselError(f"output_dir: {shorten(folder)} cannot be made ({fault}). Set another output_dir.")
    raise AssertionError("the root of a file system exists")


def shorten(path: Path) -> str:
    """Return a path as it may stand in a message: of a long one its ends."""
    text = str(path)
    return text if len(text) <= LONG else f"{text[: LONG // 2]}…{text[-LONG // 2 :]}"


# --- Reading ------------------------------------------------------------------------------------------------------


def refuse(key: str, path: str | Path, fault: str, way_out: str) -> LayerselError:
    """Return the error for a file with a fault.

    Args:
        key: the YAML key, or the argument of a command, by which the file was given.
        path: of the file.
        fault: ends the sentence that begins with the path.
        way_out: a sentence.
    """
    return LayerselError(f"{key}: {path} {fault}. {way_out}")


@contextlib.contextmanager
def reading(key: str, path: str | Path, way_out: str) -> Iterator[None]:
    """Say in one sentence why ``path`` cannot be read within the block; see ``refuse`` for the arguments.

    Raises:
        LayerselError: if it is missing, no file, or its content is damaged.
    """
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


def read_text(key: str, path: str | Path, way_out: str) -> str:
    """Return the text of a UTF-8 file; see ``reading``."""
    with reading(key, path, way_out):
        return Path(path).read_bytes().decode("utf-8")


def read_parsed(key: str, path: str | Path, way_out: str, parse: Callable[[str], T]) -> T:
    """Return what ``parse`` makes of the text of a UTF-8 file; see ``reading``."""
    text = read_text(key, path, way_out)
    with reading(key, path, way_out):
        return parse(text)


def read_json(key: str, path: str | Path, way_out: str) -> Any:
    """Return the content of a JSON file; see ``reading``. Keys that come twice, NaN and infinities are damage."""
    text = read_text(key, path, way_out)
    try:
        return parse_json(text)
    except RecursionError as error:
        raise refuse(key, path, "is not valid JSON (it is nested too deeply)", way_out) from error
    except ValueError as error:
        raise refuse(key, path, f"is not valid JSON, truncated or damaged ({error})", way_out) from error


def parse_json(text: str) -> Any:
    """Return the content of JSON.

    Raises:
        ValueError: also for keys that come twice, numbers that are not finite, and text that is not Unicode.
        RecursionError: if it is nested too deeply.
    """
    content = json.loads(text, object_pairs_hook=take_pairs, parse_constant=refuse_number, parse_float=parse_number)
    json.dumps(content, ensure_ascii=False).encode("utf-8")  # a lone half of a surrogate pair cannot be printed
    return content


def take_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON."""
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return content


def parse_number(text: str) -> float:
    """Return a finite number.

    Raises:
        ValueError: if ``text`` is none.
    """
    number = float(text)
    return number if math.isfinite(number) else refuse_number(text)


def refuse_number(text: str) -> float:
    """Raise ValueError for a number that is not finite."""
    raise ValueError(f"{text} is no finite number")


def parse_csv(text: str) -> list[list[str]]:
    """Return the rows of CSV.

    Raises:
        ValueError: if there are none.
        csv.Error: if it is not CSV.
    """
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
    """Return a whole number from 0.

    Raises:
        ValueError: if ``text`` is none, or one that no file of this package can hold.
    """
    if not re.fullmatch(r"[0-9]{1,15}", text):
        raise ValueError(f"{text[:40]!r} is no whole number from 0")
    return int(text)
