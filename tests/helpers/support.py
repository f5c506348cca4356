"""The tables of docs/support.md: tests record each cell, docs/support.json stores it, docs/support.md shows it."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft import PeftModel

from axolotl_layersel import L1RAConfig, LayerselConfig, LayerselError, SelectionConfig, prepare_trainer
from axolotl_layersel.config.layer_names import find_layer
from axolotl_layersel.config.methods import METHODS
from axolotl_layersel.l1ra.records import RankHistory
from axolotl_layersel.lora.modules import find_lora_modules
from axolotl_layersel.lora.run import Run

FILE = Path(__file__).parents[2] / "docs" / "support.json"
L1RA = "l1ra"
COLUMNS = [*METHODS, L1RA]
TABLES = ("model", "trainer", "adapter")
SURVEY = "architecture"
# Layers whose output the model does not read, and modules outside the layers.
IDLE = {"vision.3", None}


class Support:
    """The results of a test for the tables.

    Attributes:
        entries: by table and row, the columns that were tested, and those that were refused, with their messages.
        surveys: results for architectures, see ``survey``.
    """

    def __init__(self) -> None:
        self.entries: dict[tuple[str, str], tuple[list[str], dict[str, str]]] = {}
        self.surveys: list[dict] = []

    def find(self, table: str, row: str) -> tuple[list[str], dict[str, str]]:
        if table not in TABLES:
            raise KeyError(f"there is no table {table}")
        return self.entries.setdefault((table, row), ([], {}))

    def tested(self, table: str, row: str, *columns: str) -> None:
        assert set(columns) <= set(COLUMNS)
        self.find(table, row)[0].extend(columns)

    def refused(self, table: str, row: str, column: str, message: str) -> None:
        assert column in COLUMNS and message
        self.find(table, row)[1][column] = message

    def survey(self, row: str, found: int, refused: dict[str, str], unbuilt: dict[str, str]) -> None:
        """Record the number of classes of a kind in which layers were found, and why not in the others."""
        self.surveys.append(
            {"table": SURVEY, "row": row, "found": found, "refused": refused, "unbuilt": dict(sorted(unbuilt.items()))}
        )

    def describe(self) -> list[dict]:
        """Return the results in the format of docs/support.json."""
        return [
            {"table": table, "row": row, "tested": sorted(set(tested), key=COLUMNS.index), "refused": refused}
            for (table, row), (tested, refused) in self.entries.items()
        ] + self.surveys


def read_file() -> dict[str, list[dict]]:
    """Return the results of every test by its name."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def write_file(shown: dict[str, list[dict]]) -> None:
    lines = [f"{json.dumps(test)}: {json.dumps(entries)}" for test, entries in sorted(shown.items()) if entries]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


# --- Trying a model, or a kind of adapter, with every method ----------------------------------------------------------


def make_selection_config(method: str, layers: list, **settings) -> SelectionConfig:
    """Return settings with which ``method`` chooses a half; ``layers`` are the choice of ``explicit``."""
    values: dict = {"ratio": 0.5}
    if METHODS[method].draws_rows:
        values["num_samples"] = 8
    elif method == "explicit":
        values = {"layers": layers}
    elif method == "flexora":
        values["flexora"] = {"steps": 2, "val_samples": 4}
    return SelectionConfig(method=method, **values, **settings)


def try_every_method(
    support: Support,
    table: str,
    row: str,
    make: Callable,
    make_base: Callable,
    folder: Path,
    batch: dict,
    refused: dict[str, str] | None = None,
    layers: Sequence[int | str] = (1,),
    **settings,
) -> None:
    """Choose with every method, and move rank, in a new trainer each time, and record what works.

    Args:
        support: the record of the results.
        table: the table that the results belong to.
        row: the row of the table.
        make: returns a new trainer that writes to a folder, from arguments of the Trainer.
        make_base: returns a new model without LoRA, into which stock PEFT loads the adapter.
        folder: the folder for all runs.
        batch: inputs to compute the logits of the model from.
        refused: by method, a part of the message that refuses it.
        layers: the choice of ``explicit``.
        settings: other keys of the ``selection`` block.
    """
    refused = refused or {}
    for column in COLUMNS:
        place = folder / column
        trainer = make(place, max_steps=6, save_strategy="no", disable_tqdm=True)
        if column == L1RA:
            config = LayerselConfig(l1ra=L1RAConfig(update_ratio=0.16, move_ratio=0.3))
        else:
            config = LayerselConfig(selection=make_selection_config(column, list(layers), **settings))
        if column in refused:
            message = find_refusal(trainer, config)
            assert refused[column] in message, (column, message)
            support.refused(table, row, column, message)
        elif column == L1RA:
            check_rank_moves(trainer, config, make_base(), place, batch)
            support.tested(table, row, column)
        else:
            check_choice(trainer, config, column)
            support.tested(table, row, column)


def find_refusal(trainer, config: LayerselConfig) -> str:
    """Return the message that refuses a trainer."""
    try:
        prepare_trainer(trainer, config)
    except LayerselError as error:
        return str(error)
    raise AssertionError("it was not refused")


def check_choice(trainer, config: LayerselConfig, method: str) -> None:
    """Check that LoRA remains only in the units that a method has chosen, and that each layer with LoRA has a score."""
    before = list(find_lora_modules(Run.of(trainer).base))
    plan = prepare_trainer(trainer, config)
    scores = {choice.layer: choice.score for choice in plan.layers if choice.score is not None}
    if METHODS[method].needs_data:
        assert set(scores) >= {find_layer(plan.stack, module) for module in before} - IDLE
        assert torch.tensor(list(scores.values())).isfinite().all()
        assert len(set(scores.values())) > 1, f"{method} tells no layers apart"
    kept = set(find_lora_modules(Run.of(trainer).base))
    assert kept == {*plan.modules, *(name for tower in plan.outside for name in tower.modules)}
    assert plan.selected and (method == "gradient" or len(plan.selected) < len(plan.layers))
    if method == "explicit":
        assert plan.selected == config.selection.layers


def check_rank_moves(trainer, config: LayerselConfig, base, folder: Path, batch: dict) -> None:
    """Check that rank moves in training, and that stock PEFT computes the same logits with the adapter."""
    prepare_trainer(trainer, config)
    trainer.train()
    trainer.save_model()
    history = RankHistory.read(folder).ranks
    assert len({tuple(ranks.values()) for ranks in history.values()}) > 1, "no rank moved"
    rebuilt = PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        expected, plain = trainer.model.eval()(**batch).logits, base.eval()
        # l1ra folds the scaling into B, so that rounding differs.
        torch.testing.assert_close(rebuilt(**batch).logits, expected, atol=1e-4, rtol=1e-4)
        with rebuilt.disable_adapter():
            assert (plain(**batch).logits - expected).abs().max() > 1e-4
