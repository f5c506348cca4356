"""End a refused command of Axolotl's with one sentence, and a finished run with its closing block; both come last.

The process that the user's shell waits for collects the sentences of its own and of the processes that it starts, and
prints each once at its end. Errors of other packages, and signals, look as usual. It collects the closing block of a
finished run in the same way, and prints it after everything else, unless the command fails.

Relied on, as seen in these versions (``tests/unit/training/test_ending.py`` fails when one of them changes):

* axolotl 0.19.0: ``axolotl.utils.tee.file_only_stream`` writes to the run's debug.log, and drops earlier text.
* accelerate 1.13.0, torch 2.13.0: a launcher whose process has failed ends in ``subprocess.CalledProcessError`` or in
  ``torch.distributed.elastic.multiprocessing.errors.ChildFailedError``, and passes its environment on.
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
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from pydantic import ValidationError

from axolotl_layersel.common.errors import LayerselError, warning_instead
from axolotl_layersel.common.terminal import clean, report_errors, say
from axolotl_layersel.config.faults import list_faults
from axolotl_layersel.config.strict_block import describe_problem
from axolotl_layersel.config.textual import read_yaml

# The variable that holds the process that collects, its host, and the file that the others write their sentences to.
COLLECTOR = "AXOLOTL_LAYERSEL_COLLECTOR"
SEPARATOR = ":"
LOG_MODULE = "axolotl.utils.tee"
LAUNCHER_FAILURE = "ChildFailedError"
CLOSING = ".closing"  # what the file of closing blocks has after the name of the file of sentences


# --- Sentences ------------------------------------------------------------------------------------------------------


def find_sentences(error: BaseException | None) -> list[str]:
    """Return the sentences of an error of this package, or of a validation that found one; else an empty list."""
    if isinstance(error, LayerselError):
        return [str(error)]
    if isinstance(error, ValidationError) and any(map(is_ours, error.errors())):
        return describe_error(error).splitlines()
    return []


def is_ours(problem: object) -> bool:
    """Return whether one of pydantic's problems with a YAML file concerns this package."""
    assert isinstance(problem, dict), "pydantic describes each problem by a dictionary"
    cause = problem.get("ctx", {}).get("error")
    return isinstance(cause, LayerselError) or problem["loc"][:1] == ("layersel",)


def describe_error(error: Exception) -> str:
    """Return an error as sentences: this package's unchanged, pydantic's with the key and the value."""
    if not isinstance(error, ValidationError):
        return str(error)
    return "\n".join(dict.fromkeys(describe_problem(problem) for problem in error.errors()))


def tell(sentences: list[str]) -> None:
    """Pass sentences to the process that collects them, or print them if there is none."""
    if not pass_on(sentences, ""):
        show(sentences)


def pass_on(lines: list[str], suffix: str) -> bool:
    """Append lines to a file of the process that collects, and return whether there is one.

    ``suffix``: what the name of the file has after that of the file of sentences.
    """
    path = find_collection()
    if path is None:
        return False
    text = "".join(f"{clean(line)}\n" for line in lines)
    try:
        with open(f"{path}{suffix}", "ab", buffering=0, opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(text.encode("utf-8", "backslashreplace"))  # one write, so that processes mix no lines
    except OSError:  # no room for temporary files
        return False
    return True


def show(sentences: list[str]) -> None:
    """Print sentences to standard error, after the pending text of standard output."""
    # Standard output may be closed, as in `axolotl train … | head`.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
    report_errors(sentences)


# --- The closing block -----------------------------------------------------------------------------------------------


def close(describe: Callable[[], list[str]]) -> None:
    """Print the closing block of a finished run, at the end of the command if a process collects, otherwise at once.

    A block that cannot be made is reported in one warning, because the run is complete.

    Args:
        describe: returns the block, line by line.
    """
    with warning_instead("the closing summary cannot be made", "The run is complete."):
        lines = describe()
        if not pass_on(lines, CLOSING):
            show_closing(lines)


def show_closing(lines: list[str]) -> None:
    """Print a closing block to standard output, after the pending text of standard error."""
    # Both may be closed, as in `axolotl train … | head`.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.flush()
        for line in lines:
            say(line)
        sys.stdout.flush()


# --- The process that collects --------------------------------------------------------------------------------------


def collect() -> None:
    """Make this process collect and print the sentences of its own and of those that it starts, unless another does."""
    # Without a folder for temporary files, each process prints its own sentences.
    with contextlib.suppress(OSError):
        if find_collection() is None:
            path = Path(tempfile.gettempdir()) / f"axolotl-layersel-{secrets.token_hex(8)}"
            os.environ[COLLECTOR] = SEPARATOR.join((str(os.getpid()), socket.gethostname(), str(path)))
    end_in_sentences()


def read_collector() -> tuple[int, Path] | None:
    """Return the process on this machine that collects, and its file; None without one."""
    process, _, rest = os.environ.get(COLLECTOR, "").partition(SEPARATOR)
    host, _, path = rest.partition(SEPARATOR)
    if not (process.isdecimal() and path and host == socket.gethostname()):
        return None
    return int(process), Path(path)


def find_collection() -> Path | None:
    """Return the file of the process that collects, or None if there is none or it has ended."""
    found = read_collector()
    if found is None:
        return None
    try:
        os.kill(found[0], 0)
    except (ProcessLookupError, PermissionError):  # it has ended, and its id may be another user's
        return None
    return found[1]


def owns_collection() -> bool:
    """Return whether this process collects. A command that replaces the process by ``exec`` continues to."""
    found = read_collector()
    return found is not None and found[0] == os.getpid()


def read_collection() -> list[str]:
    """Return the collected sentences, each once, in their order."""
    return list(dict.fromkeys(read_lines("")))


def read_lines(suffix: str) -> list[str]:
    """Return the lines of a collected file; see ``pass_on``."""
    path = find_collection()
    try:
        return [] if path is None else Path(f"{path}{suffix}").read_text("utf-8").splitlines()
    except OSError:  # nothing was written, or the file cannot be read any longer
        return []


# --- The end of a process -------------------------------------------------------------------------------------------


class Ending:
    """The end of this process: it tells refusals in sentences, and shows other errors as usual."""

    def __init__(self) -> None:
        self.previous = sys.excepthook
        self.told: BaseException | None = None
        self.file: Path | None = None  # the YAML file of the command
        self.with_folder = True  # whether its output folder is the run's

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Handle an uncaught error, as ``sys.excepthook``."""
        if self.end_in_sentences(error):
            return
        # In a process of the run, the launcher may be a program of the user's, whose error is another one.
        if is_launcher_failure(error) and "RANK" not in os.environ and read_collection():
            write_traceback(error)
            return
        self.previous(kind, error, trace)

    def end_in_sentences(self, error: BaseException | None) -> bool:
        """Tell the sentences of ``error``, and return whether it has any."""
        sentences = find_sentences(error)
        if sentences and error is not None:
            self.told = error
            write_traceback(error)
            tell(sentences)
        return bool(sentences)

    def finish(self) -> None:
        """Print the collected sentences at the exit of the process."""
        # A tracker may have replaced this hook; Python keeps the error that ended the process.
        last = getattr(sys, "last_value", None)
        if last is not None and last is not self.told:
            self.end_in_sentences(last)
        if owns_collection():
            sentences, closing = read_collection(), read_lines(CLOSING)
            for suffix in ("", CLOSING):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"{find_collection()}{suffix}")
            show(self.add_advice(sentences))
            # Process 0 may have ended well where another one, and so the command, has failed.
            if last is None and not sentences:
                show_closing(closing)

    def add_advice(self, sentences: list[str]) -> list[str]:
        """Return the sentences; the last one goes on with the way to see all faults of the file, if there are more."""
        count = 0
        if sentences and self.file is not None:
            with warning_instead("the faults of the file cannot be counted", "The first one is told below."):
                count = len(list_faults(read_yaml(self.file) or {}, self.with_folder)[1])
        if count <= len(sentences):
            return sentences
        return [*sentences[:-1], f"{sentences[-1]} `axolotl-layersel doctor {self.file}` lists all {count} faults."]


def point_to(file: Path, with_folder: bool) -> None:
    """Make the sentences at the end of this process name the command that lists all faults of a YAML file.

    ``with_folder``: whether the run will write to its output folder.
    """
    for ending in INSTALLED:
        ending.file, ending.with_folder = file, with_folder


def end_in_sentences() -> None:
    """Make this process end as ``Ending`` does. Further calls change nothing."""
    if not any(isinstance(hook, Ending) for hook in INSTALLED):
        ending = Ending()
        INSTALLED.append(ending)
        sys.excepthook = ending
        atexit.register(ending.finish)


INSTALLED: list[Ending] = []


def is_launcher_failure(error: BaseException) -> bool:
    """Return whether an error of a launcher only reports that a process failed."""
    return isinstance(error, subprocess.CalledProcessError) or type(error).__name__ == LAUNCHER_FAILURE


def write_traceback(error: BaseException) -> None:
    """Write the traceback of an error to the debug.log of Axolotl's run, if there is one."""
    stream = getattr(sys.modules.get(LOG_MODULE), "file_only_stream", None)
    if stream is not None:
        traceback.print_exception(error, file=stream)
        stream.flush()
