"""The figures of a comparison: those that each cell writes, and all of them together, which the report reads."""

from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from axolotl_layersel.common.files import read_versioned, refuse, write_atomically

SCHEMA_VERSION: Final = 1
FIGURES = "figures.json"  # in the folder of a cell that has ended well
FAILURE = "failure.json"  # in the folder of a cell that has failed
COMPARISON = "comparison.json"  # in the folder of a comparison, with all of its cells
LORA = "lora"  # the arm that the others are compared with
RANDOM = "random"  # the arm that a choice is compared with as well
WAY_OUT = "Delete the folder that it lies in, and start `axolotl layersel compare` again."

R = TypeVar("R", bound="Record")


class Record(BaseModel):
    """A part of the files of a comparison."""

    model_config = ConfigDict(extra="forbid")


class CurvePoint(Record):
    """An evaluation within a cell's training.

    Attributes:
        step: the optimizer steps before it; 0 is before training.
        seconds: of training before it, without evaluations and without choosing layers.
        validation_loss: the loss on the validation rows.
    """

    step: int
    seconds: FiniteFloat
    validation_loss: FiniteFloat


class Result(Record):
    """What a cell leaves, with what tells it from the other cells.

    Attributes:
        arm: the name of the arm.
        rate: the learning rate.
        seed: the seed of the run.
        steps: the optimizer steps of the cell, which may be fewer than those of the comparison.
        config_digest: of the cell's YAML file; see ``cells.find_digest``.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    arm: str
    rate: FiniteFloat
    seed: int
    steps: int
    config_digest: str


class Figures(Result):
    """What a cell has measured; see ``measuring.MeasuringPlugin``.

    Attributes:
        real_steps: the optimizer steps of the user's whole run.
        train_rows: the rows that train, after Axolotl's preparation.
        validation_rows: the held-out rows that decide the rate.
        test_rows: the held-out rows that decide between arms.
        rows_digest: of the tokens of all three, in their order; the same in all cells.
        validation_loss: after training.
        test_loss: after training.
        base_test_loss: before training.
        trainable_parameters: at the end of training.
        seconds_choosing: spent on the choice of layers before training; 0 without one.
        seconds_per_step: the median without the first steps and without evaluations.
        seconds_training: of all steps, without evaluations.
        peak_memory_bytes: the largest of all processes.
        memory_of: what ``peak_memory_bytes`` counts: memory of the accelerator, or of the process.
        adapter_bytes: of the adapter's weights as written.
        curve: the evaluations in training, by step, with the first before and the last after training.
        general_before: the loss on the general text before training; None without such text.
        general_after: the same after training.
        metrics: what Axolotl's evaluation of the test rows returned besides the loss.
        ranks: the rank of each module in the written adapter.
        selected: the number of layers with LoRA, and of all candidates, if layers were chosen.
        engine: the engine of the run, as in ``layersel/plan.json``.
        processes: the number of processes.
    """

    real_steps: int
    train_rows: int
    validation_rows: int
    test_rows: int
    rows_digest: str = ""
    validation_loss: FiniteFloat
    test_loss: FiniteFloat
    base_test_loss: FiniteFloat
    trainable_parameters: int
    seconds_choosing: FiniteFloat
    seconds_per_step: FiniteFloat
    seconds_training: FiniteFloat
    peak_memory_bytes: int
    memory_of: Literal["device", "process"]
    adapter_bytes: int
    curve: list[CurvePoint]
    general_before: FiniteFloat | None = None
    general_after: FiniteFloat | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    ranks: dict[str, int] = Field(default_factory=dict)
    selected: tuple[int, int] | None = None
    engine: str
    processes: int


class Failure(Result):
    """A cell that did not end well.

    Attributes:
        sentence: what ended it, in one line.
        log: the path of its whole output.
    """

    sentence: str
    log: str


class ArmSettings(Record):
    """An arm as the comparison trains it.

    Attributes:
        keys: the keys of the YAML file that the arm sets; None removes a key.
        choosing: whether it chooses layers by the data, and so is compared with a random choice as well.
    """

    keys: dict[str, Any]
    choosing: bool


class Settings(Record):
    """What a comparison compares.

    Attributes:
        yaml: the path of the user's YAML file.
        folder: the folder of the comparison, with a folder for each arm.
        arms: the arms by name; the first is ``lora``.
        rates: the learning rates that each arm starts with, in ascending order.
        seeds: the seeds; the first one decides the rates.
        steps: the optimizer steps of the cells that decide between arms.
        held_out: where validation and test rows come from, as the object of a sentence.
        general: the file of general text, if there is one.
        halving: whether only the better half of the rates is trained in full.
        widen: the most rates that an arm tries outside ``rates``, while its best one lies at the edge.
        refine: whether an arm also tries the rates between its best one and the neighbours of that.
        lora_r: the rank of the user's YAML file.
        launch: the arguments of ``axolotl train`` after the file.
    """

    yaml: str
    folder: str
    arms: dict[str, ArmSettings]
    rates: list[FiniteFloat]
    seeds: list[int]
    steps: int
    held_out: str
    general: str | None = None
    halving: bool = True
    widen: int = 3
    refine: bool = True
    lora_r: int
    launch: list[str] = Field(default_factory=list)


class Comparison(Record):
    """A comparison with the cells that have ended.

    Attributes:
        cells: in the order in which they were planned.
        best_rates: the rate at which each arm has the lowest validation loss; no entry if every cell of it failed.
        notes: sentences about the course that the reader must know, such as a best rate at the edge of the grid.
        planned: the number of cells of the whole comparison; more than ``len(cells)`` if it was stopped.
        asked: the options of the command, from which ``settings`` differ where the run is shorter or time is limited.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    settings: Settings
    cells: list[Figures | Failure]
    best_rates: dict[str, FiniteFloat] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)
    planned: int
    asked: dict[str, Any] = Field(default_factory=dict)

    @property
    def figures(self) -> list[Figures]:
        """The cells that ended well."""
        return [cell for cell in self.cells if isinstance(cell, Figures)]

    @property
    def failures(self) -> list[Failure]:
        """The cells that failed."""
        return [cell for cell in self.cells if isinstance(cell, Failure)]

    @property
    def real_steps(self) -> int | None:
        """The optimizer steps of the user's whole run; None until a cell has ended well."""
        return next((cell.real_steps for cell in self.figures), None)

    def list_final(self, arm: str) -> dict[int, Figures]:
        """Return the cells of an arm at its best rate and at full length, by seed."""
        rate = self.best_rates.get(arm)
        return {
            cell.seed: cell
            for cell in self.figures
            if cell.arm == arm and cell.rate == rate and cell.steps == self.settings.steps
        }


def read_record(kind: type[R], path: Path) -> R:
    """Return the record in a JSON file.

    Raises:
        LayerselError: if the file is missing, damaged, or of another version of this package.
    """
    content = read_versioned("compare", path, SCHEMA_VERSION, WAY_OUT, WAY_OUT)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise refuse("compare", path, f"is damaged ({where}: {first['msg']})", WAY_OUT) from error


def write_record(record: Record, path: Path) -> None:
    """Write a record to a JSON file atomically."""
    write_atomically(path, (record.model_dump_json(indent=2) + "\n").encode("utf-8"))
