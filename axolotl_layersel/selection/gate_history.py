"""The course of a search: gates.csv, the losses and gates after every optimizer step."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from axolotl_layersel.common.csv_record import CsvRecord
from axolotl_layersel.common.files import parse_count, parse_number
from axolotl_layersel.common.paths import gates_path

FILE = "gates.csv"
HIGHEST_GATE = 1e30  # no search reaches it, and no plot can show it
LEADING = ["step", "train_loss", "validation_loss"]


@dataclass
class GateHistory(CsvRecord):
    """The course of a search, with an entry for each optimizer step.

    Attributes:
        names: the names of the gates: numbers of layers, or names of modules.
        train_losses: the losses of the training batches.
        validation_losses: the losses in the gate step after the optimizer step; None without one.
        gates: α of every gate afterwards, in the order of ``names``.
    """

    locate = staticmethod(gates_path)
    way_out = "Remove it, or make a new plan."

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

    def to_rows(self) -> Iterable[list[Any]]:
        """Return a row for each step: its number from 1, both losses, and a column for each gate."""
        yield [*LEADING, *self.names]
        steps = zip(self.train_losses, self.validation_losses, self.gates)
        for step, (train_loss, validation_loss, gates) in enumerate(steps, start=1):
            yield [step, train_loss, "" if validation_loss is None else validation_loss, *gates]

    @classmethod
    def from_rows(cls, heading: list[str], rows: list[list[str]]) -> "GateHistory":
        """Return the history of ``to_rows``."""
        history = cls(heading[len(LEADING) :])
        if heading[: len(LEADING)] != LEADING or not history.names or len(set(history.names)) != len(history.names):
            raise ValueError(f"its first line is not {','.join(LEADING)} and the names of different gates")
        if not rows:
            raise ValueError("it has no step below its first line")
        for step, row in enumerate(rows, start=1):
            number, train_loss, validation_loss, *gates = row
            if parse_count(number) != step:
                raise ValueError(f"line {step + 1} is not that of step {step}")
            # The training loss of a finished search can be infinite or NaN, but no gate or validation loss can.
            seen = parse_number(validation_loss) if validation_loss else None
            values = list(map(parse_number, gates))
            if max(map(abs, values)) > HIGHEST_GATE:
                raise ValueError(f"line {step + 1} has a gate of {max(map(abs, values))}, which no search reaches")
            history.add(float(train_loss), seen, values)
        return history
