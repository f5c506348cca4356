"""Text for a terminal or a log: it holds nothing that steers a terminal, and only what its encoding knows."""

import sys
from typing import IO, Any, TextIO, cast

from rich.console import Console


def clean(text: str) -> str:
    """Return ``text`` on one line, control characters written out: files that are read could hold any."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in text
    )


def make_encodable(text: str, encoding: str | None) -> str:
    """Return ``text`` with what ``encoding`` does not know written out, such as a bar on an ASCII terminal."""
    encoding = encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


class EncodableFile:
    """A text file that writes out what its encoding does not know, where the file itself would raise."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def write(self, text: str) -> int:
        return self.file.write(make_encodable(text, self.file.encoding))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def make_console(file: TextIO | None = None, width: int | None = None) -> Console:
    """Return what prints tables to ``file``, by default standard output: text as it is, no markup and no emoji."""
    encodable = cast(IO[str], EncodableFile(file or sys.stdout))
    return Console(file=encodable, width=width, markup=False, emoji=False, highlight=False)


def say(text: str) -> None:
    """Print one line of text."""
    EncodableFile(sys.stdout).write(f"{clean(text)}\n")
