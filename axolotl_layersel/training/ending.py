"""How a command of Axolotl's ends that was refused something: with one sentence, last on the terminal.

The process that the user's shell waits for collects what it and the processes that it starts refuse, and prints that
once, when all else is said. Errors that are not this package's look as ever, and so do signals.

Relied on, as seen in these versions (``tests/unit/training/test_ending.py`` fails when one of them changes):

* axolotl 0.19.0: ``axolotl.utils.tee.file_only_stream`` writes to the run's debug.log, and drops what comes earlier.
* accelerate 1.13.0, torch 2.13.0: a launcher whose process has failed ends in ``subprocess.CalledProcessError`` or in
  ``torch.distributed.elastic.multiprocessing.errors.ChildFailedError``, and gives its environment to what it starts.
"""

import atexit
import contextlib
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from types import TracebackType

from pydantic import ValidationError

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.terminal import clean, report_errors
from axolotl_layersel.config.strict_block import quote

# The environment names the process that collects, its host, and the file in which the others tell it their sentences.
COLLECTOR = "AXOLOTL_LAYERSEL_COLLECTOR"
SEPARATOR = ":"
LOG_MODULE = "axolotl.utils.tee"
LAUNCHER_FAILURE = "ChildFailedError"


# --- What is told ---------------------------------------------------------------------------------------------------


def find_sentences(error: BaseException | None) -> list[str]:
    """Return the sentences of an error of this package's, or of a validation that found one; for others none."""
    if isinstance(error, LayerselError):
        return [str(error)]
    if isinstance(error, ValidationError) and any(map(is_ours, error.errors())):
        return describe_error(error).splitlines()
    return []


def is_ours(problem: object) -> bool:
    """Return whether one of pydantic's problems with a YAML file is about what this package reads."""
    assert isinstance(problem, dict), "pydantic describes each problem by a dictionary"
    cause = problem.get("ctx", {}).get("error")
    return isinstance(cause, LayerselError) or problem["loc"][:1] == ("layersel",)


def describe_error(error: Exception) -> str:
    """Return an error as sentences for a person: ours as they are, pydantic's with the key and the value."""
    if not isinstance(error, ValidationError):
        return str(error)
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] not in ("value_error", "missing"):
            message = f"{quote(problem['input'])} is refused. {message}"
        lines.append(clean(message if problem["type"] == "value_error" or not where else f"{where}: {message}"))
    return "\n".join(dict.fromkeys(lines))


def tell(sentences: list[str]) -> None:
    """Give sentences to the process that collects them, or print them here where none does."""
    path = find_collection()
    if path is None:
        show(sentences)
        return
    text = "".join(f"{clean(sentence)}\n" for sentence in sentences)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(handle, text.encode("utf-8", "backslashreplace"))  # at once, so that processes mix no lines
        finally:
            os.close(handle)
    except OSError:  # no room for temporary files
        show(sentences)


def show(sentences: list[str]) -> None:
    """Print sentences to standard error, below all that standard output holds."""
    # Standard output may be closed, as in `axolotl train … | head`.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
    report_errors(sentences)


# --- Who collects ---------------------------------------------------------------------------------------------------


def collect() -> None:
    """Let this process print at its end what it and the processes that it starts refuse, unless another one does."""
    # Without a folder for temporary files each process prints its own sentences.
    with contextlib.suppress(OSError):
        if find_collection() is None:
            path = Path(tempfile.gettempdir()) / f"axolotl-layersel-{secrets.token_hex(8)}"
            os.environ[COLLECTOR] = SEPARATOR.join((str(os.getpid()), socket.gethostname(), str(path)))
    end_in_sentences()


def read_collector() -> tuple[int, Path] | None:
    """Return the process of this machine that collects and the file for it; None where there is none."""
    process, _, rest = os.environ.get(COLLECTOR, "").partition(SEPARATOR)
    host, _, path = rest.partition(SEPARATOR)
    if not (process.isdecimal() and path and host == socket.gethostname()):
        return None
    return int(process), Path(path)


def find_collection() -> Path | None:
    """Return the file of the process that collects, or None where none does (any longer)."""
    found = read_collector()
    if found is None:
        return None
    try:
        os.kill(found[0], 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # somebody else's
        return None
    return found[1]


def owns_collection() -> bool:
    """Return whether this process collects; a command that takes a process's place by ``exec`` collects on."""
    found = read_collector()
    return found is not None and found[0] == os.getpid()


def read_collection() -> list[str]:
    """Return the sentences that were collected, each once, in the order in which they came."""
    path = find_collection()
    try:
        text = "" if path is None else path.read_text("utf-8")
    except OSError:  # nothing was written to it, or it cannot be read any longer
        text = ""
    return list(dict.fromkeys(text.splitlines()))


# --- The end of a process -------------------------------------------------------------------------------------------


class Ending:
    """The end of this process: what it refuses is told in sentences, and whatever else it raises is shown as ever."""

    def __init__(self) -> None:
        self.previous = sys.excepthook
        self.told: BaseException | None = None

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Take the place of ``sys.excepthook``."""
        if self.end_in_sentences(error):
            return
        # A process of the run may end by a program of its own, which is another error.
        if is_launcher_failure(error) and "RANK" not in os.environ and read_collection():
            write_traceback(error)
            return
        self.previous(kind, error, trace)

    def end_in_sentences(self, error: BaseException | None) -> bool:
        """Tell what ``error`` refuses, and return whether it refuses anything."""
        sentences = find_sentences(error)
        if sentences and error is not None:
            self.told = error
            write_traceback(error)
            tell(sentences)
        return bool(sentences)

    def finish(self) -> None:
        """Print what was collected. Python calls it when the process ends."""
        # A tracker may have put a hook of its own over this one; Python keeps the error that ended the process.
        last = getattr(sys, "last_value", None)
        if last is not None and last is not self.told:
            self.end_in_sentences(last)
        if owns_collection():
            sentences = read_collection()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(str(find_collection()))
            show(sentences)


def end_in_sentences() -> None:
    """Let this process end as ``Ending`` says; once."""
    if not any(isinstance(hook, Ending) for hook in INSTALLED):
        ending = Ending()
        INSTALLED.append(ending)
        sys.excepthook = ending
        atexit.register(ending.finish)


INSTALLED: list[Ending] = []


def is_launcher_failure(error: BaseException) -> bool:
    """Return whether a launcher only says that a process of its own has failed."""
    return isinstance(error, subprocess.CalledProcessError) or type(error).__name__ == LAUNCHER_FAILURE


def write_traceback(error: BaseException) -> None:
    """Write where an error came from to the debug.log of Axolotl's run, where there is one yet."""
    stream = getattr(sys.modules.get(LOG_MODULE), "file_only_stream", None)
    if stream is not None:
        traceback.print_exception(error, file=stream)
        stream.flush()
