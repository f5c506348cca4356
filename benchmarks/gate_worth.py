"""Ask whether the gates of a search follow what LoRA in each layer is worth: one row for each layer.

    python benchmarks/gate_worth.py BASE TRAIN.jsonl gate_worth.csv --rows 96 --steps 60

Three measures of a layer's worth stand next to its gate, all on the same held-out rows:

- without: how much the loss rises if LoRA in all layers is trained and then left out of this layer;
- only: how much the loss falls if LoRA is trained in this layer only;
- gain: what `method: gradient` promises for it before training.

Below the table are the rank correlations (Spearman) of the gate, and of the number of the layer, with each of them.
"""

import argparse
import contextlib
import csv
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from peft.tuners.lora import LoraLayer
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from transformers import AutoTokenizer, logging

from axolotl_layersel.config.layer_names import LayerName
from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.selection.plan import Plan
from axolotl_layersel.training.prepare import prepare_trainer
from benchmarks.held_out.arms import Arm
from benchmarks.held_out.rows import draw_rows, read_rows
from benchmarks.held_out.training import BATCH, Settings, load_base, make_model, make_trainer, measure

WORTHS = ("without", "only", "gain")


def train(
    settings: Settings, arguments: argparse.Namespace, rows: list[dict[str, Any]], block: dict[str, Any], steps: int
) -> tuple[Any, Plan]:
    """Return a model that was trained for ``steps`` with the ``selection`` block, and its plan."""
    torch.manual_seed(arguments.seed)
    model = make_model(settings.base, False, Arm("lora"), arguments.rank, rows)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(settings, model, arguments.seed, arguments.rate, rows, folder)
        plan = prepare_trainer(trainer, LayerselConfig.model_validate({"selection": block}))
        assert plan is not None, "the block has a selection"
        if steps:
            trainer.train()
    return model, plan


@contextlib.contextmanager
def left_out(model: Any, layer: LayerName) -> Iterator[None]:
    """Leave LoRA out of a layer within the block."""
    modules = [
        module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and f".layers.{layer}." in name
    ]
    scalings = [module.scaling["default"] for module in modules]
    for module in modules:
        module.scaling["default"] = 0.0
    try:
        yield
    finally:
        for module, scaling in zip(modules, scalings):
            module.scaling["default"] = scaling


def read_scores(plan: Plan) -> dict[LayerName, float]:
    """Return the score of each layer."""
    return {choice.layer: choice.score for choice in plan.layers if choice.score is not None}


def measure_layers(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each layer: its gate, and what it is worth by each measure."""
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    rows = read_rows(arguments.train, tokenizer, arguments.longest)
    held_out, rows = rows[: arguments.held_out], rows[arguments.held_out :]
    rows = draw_rows(rows, arguments.rows, arguments.seed, drawn=True)
    settings = Settings(arguments.base, False, arguments.steps, arguments.batch_size, 1)
    search = {"method": "flexora", "ratio": 0.5, "flexora": {"steps": arguments.search_steps}}
    scored = {"method": "gradient", "granularity": "layer", "num_samples": min(128, len(rows))}
    gates, gains = (read_scores(train(settings, arguments, rows, block, 0)[1]) for block in (search, scored))
    start = measure(load_base(arguments.base, False), held_out, BATCH)[0]
    model, plan = train(settings, arguments, rows, {"method": "first", "ratio": 1.0}, arguments.steps)
    end = measure(model, held_out, BATCH)[0]
    found = []
    for layer in plan.selected:
        with left_out(model, layer):
            without = measure(model, held_out, BATCH)[0] - end
        alone = train(settings, arguments, rows, {"method": "explicit", "layers": [layer]}, arguments.steps)[0]
        only = start - measure(alone, held_out, BATCH)[0]
        row = {"layer": layer, "gate": gates[layer], "without": without, "only": only, "gain": gains[layer]}
        print(row, flush=True)
        found.append(row)
    return found


def describe(layers: list[dict[str, Any]]) -> None:
    """Print the table of the layers and the rank correlations."""
    table = Table("layer", "gate", *WORTHS)
    for row in layers:
        table.add_row(str(row["layer"]), *(f"{row[name]:.4f}" for name in ("gate", *WORTHS)))
    Console().print(table)
    for name in ("gate", "layer"):
        parts = [f"{worth} {find_correlation(layers, name, worth):+.2f}" for worth in WORTHS]
        print(f"rank correlation of the {name} with: {', '.join(parts)}")
    print(f"rank correlation of the gate with the layer: {find_correlation(layers, 'gate', 'layer'):+.2f}")


def find_correlation(layers: list[dict[str, Any]], one: str, other: str) -> float:
    """Return Spearman's rank correlation of two columns."""
    return float(spearmanr([row[one] for row in layers], [row[other] for row in layers]).statistic)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("train", type=Path)
    parser.add_argument("output", type=Path, help="CSV file to write the rows to")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rate", type=float, default=8e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of training")
    parser.add_argument("--search-steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--longest", type=int, default=256, help="tokens after which rows are cut")
    arguments = parser.parse_args()
    layers = measure_layers(arguments)
    with arguments.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["layer", "gate", *WORTHS])
        writer.writeheader()
        writer.writerows(layers)
    describe(layers)


if __name__ == "__main__":
    main()
