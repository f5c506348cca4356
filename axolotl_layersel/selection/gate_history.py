"""What a search saw: gates.csv, the losses and gates after every optimizer step."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from axolotl_layersel.common.files import (
    format_csv,
    parse_count,
    parse_csv,
    parse_number,
    read_parsed,
    write_atomically,
)
from axolotl_layersel.common.paths import gates_path

FILE = "gates.csv"
HIGHEST_GATE = 1e30  # larger numbers than a plot can show are of no search
LEADING = ["step", "train_loss", "validation_loss"]


@dataclass
class GateHistory:
    """The course of a search, an entry for each optimizer step.

    Attributes:
        names: of the gates: layers' numbers, or modules' names.
        train_losses: of the training batches.
        validation_losses: what the gate step after the optimizer step saw; None where there was none.
        gates: α of every gate after it, in the order of ``names``.
    """

    names: list[str]
    train_losses: list[float] = field(default_factory=list)
    validation_losses: list[float | None] = field(default_factory=list)
    gates: list[list[float]] = field(default_factory=list)

    @property
    def final(self) -> dict[str, float]:
        """The gates at the end, by name; empty before the first step."""
        return dict(zip(self.names, self.gates[-1])) if self.gates else {}

    def add(self, train_loss: float, validation_loss: float | None, gates: Iterable[float]) -> None:
        """Add the next optimizer step."""
        self.train_losses.append(train_loss)
        self.validation_losses.append(validation_loss)
        self.gates.append(list(gates))

    def to_csv(self) -> str:
        """Return a row for each step: its number from 1, both losses, and a column for each gate."""
        steps = zip(self.train_losses, self.validation_losses, self.gates)
        rows = (
            [step, train_loss, "" if validation_loss is None else validation_loss, *gates]
            for step, (train_loss, validation_loss, gates) in enumerate(steps, start=1)
        )
        return format_csv([[*LEADING, *self.names], *rows])

    @classmethod
    def from_csv(cls, text: str) -> "GateHistory":
        """Return the history that ``to_csv`` wrote.

        Raises:
            ValueError: saying what is wrong with the text, csv.Error too.
        """
        header, *rows = parse_csv(text)
        history = cls(header[len(LEADING) :])
        if header[: len(LEADING)] != LEADING or not history.names or len(set(history.names)) != len(history.names):
            raise ValueError(f"its first line is not {','.join(LEADING)} and the names of different gates")
        if not rows:
            raise ValueError("it has no step below its first line")
        for step, row in enumerate(rows, start=1):
            if len(row) != len(header) or parse_count(row[0]) != step:
                raise ValueError(f"line {step + 1} is not that of step {step} with {len(header)} fields")
            _, train_loss, validation_loss, *gates = row
            # A search that is over can have met a loss that is not finite, but no such gate.
            seen = parse_number(validation_loss) if validation_loss else None
            values = list(map(parse_number, gates))
            if max(map(abs, values)) > HIGHEST_GATE:
                raise ValueError(f"line {step + 1} has a gate of {max(map(abs, values))}, which no search comes to")
            history.add(float(train_loss), seen, values)
        return history

    @classmethod
    def read(cls, folder: str | Path, key: str = "PATH") -> "GateHistory":
        """Return the history in gates.csv of the run in ``folder``.

        Raises:
            LayerselError: naming ``key`` if the file is missing or damaged.
        """
        return read_parsed(key, gates_path(folder), "Remove it, or make a new plan.", cls.from_csv)

    def write(self, folder: str | Path) -> None:
        """Write gates.csv for the run in ``folder``; it appears at once and complete."""
        write_atomically(gates_path(folder), self.to_csv().encode())
