"""The course of a run as a CSV file: a heading, and a row for each event."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from axolotl_layersel.common.files import format_csv, parse_csv, read_parsed, write_atomically

T = TypeVar("T", bound="CsvRecord")


class CsvRecord(ABC):
    """A record with a CSV file of its own.

    Attributes:
        way_out: a sentence for the error of a damaged file.
    """

    way_out: ClassVar[str]

    @staticmethod
    @abstractmethod
    def locate(folder: str | Path) -> Path:
        """Return the path of the file of the run or checkpoint in ``folder``."""

    @abstractmethod
    def to_rows(self) -> Iterable[list[Any]]:
        """Return the heading and the rows of the file."""

    @classmethod
    @abstractmethod
    def from_rows(cls: type[T], heading: list[str], rows: list[list[str]]) -> T:
        """Return the record that ``to_rows`` describes; every row is as long as the heading.

        Raises:
            ValueError: saying what is wrong with the rows.
        """

    @classmethod
    def read(cls: type[T], folder: str | Path, key: str = "PATH") -> T:
        """Return the record of the run or checkpoint in ``folder``.

        Raises:
            LayerselError: naming ``key`` if the file is missing or damaged.
        """

        def parse(text: str) -> T:
            heading, *rows = parse_csv(text)
            for line, row in enumerate(rows, start=2):
                if len(row) != len(heading):
                    raise ValueError(f"line {line} has {len(row)} fields, not {len(heading)}")
            return cls.from_rows(heading, rows)

        return read_parsed(key, cls.locate(folder), cls.way_out, parse)

    def to_csv(self) -> str:
        """Return the text of the file."""
        return format_csv(self.to_rows())

    def write(self, folder: str | Path) -> None:
        """Write the file of the run or checkpoint in ``folder`` atomically."""
        write_atomically(type(self).locate(folder), self.to_csv().encode())
