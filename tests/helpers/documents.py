"""The README and the pages of docs/: their blocks of code, tables and links."""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

from helpers.places import ROOT

README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
# Inside of tabs a block is indented.
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w+)\n(?P<text>.*?)^(?P=indent)```$", flags=re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True)
class Block:
    """A block of code in a document, and the line that it begins in."""

    document: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.document.name}:{self.line}"


def find_blocks(document: Path, language: str) -> list[Block]:
    """Return the blocks of one language in a document."""
    text = document.read_text()
    return [
        Block(document, text[: match.start()].count("\n") + 1, textwrap.dedent(match["text"]))
        for match in FENCE.finditer(text)
        if match["language"] == language
    ]


def list_blocks(language: str) -> list[Block]:
    """Return the blocks of one language in the README and on all pages."""
    return [block for document in (README, *PAGES) for block in find_blocks(document, language)]


def find_section(page: str, heading: str) -> str:
    """Return the text below a heading of the second level on a page of docs/, up to the next one."""
    return (ROOT / "docs" / page).read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]


def remove_blocks(text: str) -> str:
    """Return a text without its blocks of code."""
    return FENCE.sub("", text)
