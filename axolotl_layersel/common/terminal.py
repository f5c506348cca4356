"""Text for a terminal or a log: free of control characters, and escaped where the encoding lacks a character."""

import os
import sys
from collections.abc import Iterable
from typing import IO, Any, TextIO, cast

from rich.console import Console

LOG_WIDTH = 80
SENTENCE = "axolotl-layersel: "  # the begin of a line that tells an error


def is_first_process() -> bool:
    """Return whether this is process 0 by its launcher's count, which is known before processes are connected."""
    return os.environ.get("RANK", "0") == "0"


def clean(text: str) -> str:
    """Return ``text`` on one line with control characters escaped, because files may hold any."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in text
    )


def make_encodable(text: str, encoding: str | None) -> str:
    """Return ``text`` with the characters escaped that ``encoding`` lacks, such as a bar on an ASCII terminal."""
    encoding = encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def enumerate_words(words: Iterable[str]) -> str:
    """Return ``a, b and c``."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


class EncodableFile:
    """A text file that escapes the characters that its encoding lacks, instead of raising an error.

    ``reconfigure(errors="backslashreplace")`` would do, but Axolotl's copy of standard output does not have it.
    """

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def write(self, text: str) -> int:
        return self.file.write(make_encodable(text, self.file.encoding))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def make_console(file: TextIO | None = None, width: int | None = None) -> Console:
    """Return a console that prints tables to ``file``, by default standard output, without markup and emoji.

    ``width``: in characters; by default that of the terminal, or in a log ``COLUMNS`` or 80. rich would take the width
    of a terminal that only standard input is connected to.
    """
    if width is None and not (file or sys.stdout).isatty():
        columns = os.environ.get("COLUMNS", "")
        width = int(columns) if columns.isdecimal() and int(columns) else LOG_WIDTH
    encodable = cast(IO[str], EncodableFile(file or sys.stdout))
    return Console(file=encodable, width=width, markup=False, emoji=False, highlight=False)


def say(text: str) -> None:
    """Print one line to standard output."""
    EncodableFile(sys.stdout).write(f"{clean(text)}\n")


def report_errors(lines: list[str]) -> None:
    """Print lines to standard error, which escapes by default what its encoding lacks."""
    for line in lines:
        print(f"{SENTENCE}{clean(line)}", file=sys.stderr, flush=True)
