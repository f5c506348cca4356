"""Test whether the gain that ``method: gradient`` measures before training predicts the losses after it.

    python benchmarks/gain.py measure BASE TRAIN.jsonl results/runs.csv gains.csv --longest 256 --held-out 128
    python benchmarks/gain.py report gains.csv

To first order, the gain of ranks r_m in modules m is Σ_m Σ_{i ≤ r_m} g_mi, where g_mi is the i-th singular value of the
module's gradient above noise (``gradient.find_gains``). ``measure`` computes it for the ranks of every arm of
``quality.py`` whose ranks are known before training, for uniform rank at equal parameters, and for LoRA's rank and
twice that rank. The rows are those that the arm's run drew, by the same seed. ``report`` compares the ratios with the
losses on held-out rows.
"""

import argparse
import csv
import itertools
import math
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from scipy.stats import pearsonr, spearmanr
from transformers import AutoTokenizer, Trainer, TrainingArguments, logging

from axolotl_layersel.config.selection import SelectionConfig
from axolotl_layersel.lora.layers import find_layer_stack
from axolotl_layersel.lora.run import Run
from axolotl_layersel.selection.choosing import draw_samples
from axolotl_layersel.selection.methods import gradient
from axolotl_layersel.selection.passes.backward import GradientRecorder, measure_gradients
from axolotl_layersel.selection.passes.forward import find_share
from axolotl_layersel.selection.ranks import allocate_ranks
from axolotl_layersel.selection.types import Choice, Selection

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.held_out.arms import ARMS, Arm
from benchmarks.held_out.rates import choose_rates
from benchmarks.held_out.rows import collate, read_rows
from benchmarks.held_out.runs import append_lines, read_runs
from benchmarks.held_out.training import make_model

Spectra = Mapping[str, Sequence[float]]
RATIOS = ["chosen_over_uniform", "chosen_over_uniform_squared", "double_over_single", "double_over_single_squared"]
COLUMNS = ["runs", "arm", "rank", "seed", "parameters", *RATIOS]


def find_gain(spectra: Spectra, ranks: Mapping[str, float], power: int = 1) -> float:
    """Return the first-order gain of ``ranks``; of a fraction of a rank, this fraction of its gain.

    Args:
        spectra: the gain of the 1st, 2nd, … rank of every module. A gain above the one before it counts as that one.
        ranks: by module.
        power: 2 adds up squares: the gain of one step of gradient descent on B whose A has the best directions.
    """
    total = 0.0
    for name, rank in ranks.items():
        falling = [*itertools.accumulate(spectra[name], min)]
        whole = math.floor(rank)
        total += sum(gain**power for gain in falling[:whole])
        total += (rank - whole) * sum(gain**power for gain in falling[whole : whole + 1])
    return total


# --- Measure ------------------------------------------------------------------------------------------------------


def find_ratios(spectra: Spectra, ranks: Mapping[str, int], uniform: float, lora_r: int) -> dict[str, float]:
    """Return the ratios of gains: of ``ranks`` and of ``uniform`` rank, and of twice ``lora_r`` and ``lora_r``."""
    ratios = {}
    for power, suffix in ((1, ""), (2, "_squared")):
        chosen = find_gain(spectra, ranks, power)
        of = {rank: find_gain(spectra, dict.fromkeys(spectra, rank), power) for rank in (uniform, lora_r, 2 * lora_r)}
        ratios[f"chosen_over_uniform{suffix}"] = chosen / of[uniform]
        ratios[f"double_over_single{suffix}"] = of[2 * lora_r] / of[lora_r]
    return ratios


class Widths(GradientRecorder):
    """Passes the gradients of one pass on to sketches of several widths."""

    def __init__(self, recorders: Sequence[GradientRecorder]) -> None:
        super().__init__(recorders[0].modules)
        self.recorders = recorders

    def begin(self, indices: list[int]) -> None:
        for recorder in self.recorders:
            recorder.begin(indices)

    def record(self, place: int, given: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
        for recorder in self.recorders:
            recorder.record(place, given, gradients)

    def end(self) -> list[torch.Tensor]:
        return self.recorders[0].end()


def measure_spectra(selections: Mapping[int, Selection]) -> dict[int, Spectra]:
    """Return the gains of the components of every module, as a plan of each rank would measure them, by one pass."""
    selection = next(iter(selections.values()))
    run, seed, samples = selection.run, selection.settings.seed, draw_samples(selection)
    names = selection.stack.list_modules(selection.candidates)
    modules, share = [run.lora_modules[name] for name in names], find_share(run, len(samples))
    recorders = [
        gradient.Sketches(modules, each.highest_rank + gradient.OVERSAMPLING, seed, share, run.device)
        for each in selections.values()
    ]
    measure_gradients(selection, samples, Widths(recorders), keeps_activations=True)
    return {
        rank: {name: gradient.find_gains(sketch).tolist() for name, sketch in zip(names, recorder.values)}
        for rank, recorder in zip(selections, recorders)
    }


def choose(selection: Selection, spectra: Spectra) -> Choice:
    """Return the choice of a method; that of ``gradient`` by spectra that are already known."""
    if selection.settings.method != "gradient":
        return selection.method.load()(selection)
    gains = {
        unit.name: gradient.add_up([torch.tensor(spectra[name]) for name in unit.modules]).tolist()
        for unit in selection.units
    }
    return Choice([name for unit in selection.units for name in unit.modules], [], gains=gains)


def measure_arms(
    arguments: argparse.Namespace, arms: Mapping[int, list[str]], seed: int, rows: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the line of each arm. ``arms``: by rank."""
    torch.manual_seed(seed)
    # The rank of LoRA changes nothing in the passes, because its B is 0.
    model = make_model(arguments.base, arguments.train.suffix == ".tsv", Arm("lora"), 1, rows)
    with tempfile.TemporaryDirectory() as folder:
        values = TrainingArguments(output_dir=folder, seed=seed, use_cpu=True, report_to=[], disable_tqdm=True)
        trainer = Trainer(model, values, train_dataset=Dataset.from_list(rows), data_collator=collate)
    run, stack = Run.of(trainer), find_layer_stack(model)

    def begin(arm: str, rank: int) -> Selection:
        block = ARMS[arm]
        assert block is not None, "arms without a selection are left out"
        settings = SelectionConfig.model_validate(block["selection"]).resolve(seed)
        return Selection.of(run, stack, settings, lora_r=rank)

    spectra = measure_spectra({rank: begin("gradient", rank) for rank in arms})
    choices: dict[str, Choice] = {}
    lines = []
    for rank, names in arms.items():
        for arm in names:
            selection = begin(arm, rank)
            if arm.startswith("gradient") or arm not in choices:
                choices[arm] = choose(selection, spectra[rank])
            ranks, budget = allocate_ranks(selection, choices[arm])
            assert budget is not None, "arms without a budget are left out"
            ratios = find_ratios(spectra[rank], ranks, budget.spent * rank / budget.lora, rank)
            lines.append(
                {"runs": arguments.runs.stem, "arm": arm, "rank": rank, "seed": seed, "parameters": budget.spent}
                | {name: round(ratios[name], 5) for name in RATIOS}
            )
    return lines


def has_known_ranks(arm: str) -> bool:
    """Return whether the ranks of an arm are given before training, by a budget."""
    block = ARMS.get(arm) or {}
    return list(block) == ["selection"] and "rank_allocation" in block["selection"]


def measure(arguments: argparse.Namespace) -> None:
    """Append the gains of the arms in a file of runs to the output."""
    logging.set_verbosity_error()
    runs = read_runs(arguments.runs)
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    rows = read_rows(arguments.train, tokenizer, arguments.longest)[arguments.held_out :][: arguments.train_rows]
    known = {(line["runs"], line["seed"]) for line in read_gains(arguments.output)}
    arms: dict[int, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if has_known_ranks(run["arm"]) and run["arm"] not in arms[run["seed"]][run["rank"]]:
            arms[run["seed"]][run["rank"]].append(run["arm"])
    for seed in sorted(arms):
        if (arguments.runs.stem, seed) in known:
            continue
        lines = measure_arms(arguments, arms[seed], seed, rows)
        append_lines(arguments.output, COLUMNS, lines)
        for line in lines:
            print(line, flush=True)


def read_gains(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of gains; an empty list if it does not exist."""
    if not path.exists():
        return []
    kinds = {"runs": str, "arm": str, "rank": int, "seed": int, "parameters": int}
    with path.open(newline="", encoding="utf-8") as file:
        return [{key: kinds.get(key, float)(value) for key, value in row.items()} for row in csv.DictReader(file)]


# --- Report -------------------------------------------------------------------------------------------------------


def join(lines: list[dict[str, Any]], folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the lines with measured differences of loss, relative to LoRA's: of arms, and of twice the rank.

    Attributes that are added: ``change``, of the arm to LoRA of the same rank and seed, each at its best rate.
    """
    arms, doubles = [], []
    for name in dict.fromkeys(line["runs"] for line in lines):
        runs = read_runs(folder / f"{name}.csv")
        rates = choose_rates(runs)
        best = {(r["arm"], r["rank"], r["seed"]): r["test"] for r in runs if rates[r["arm"], r["rank"]] == r["rate"]}
        seen = set()
        for line in (line for line in lines if line["runs"] == name):
            rank, seed = line["rank"], line["seed"]
            lora, trained, double = (
                best.get(key) for key in (("lora", rank, seed), (line["arm"], rank, seed), ("lora", 2 * rank, seed))
            )
            if lora is not None and trained is not None:
                arms.append(line | {"change": trained / lora - 1})
            if lora is not None and double is not None and (rank, seed) not in seen:
                seen.add((rank, seed))
                doubles.append(line | {"arm": "lora", "change": double / lora - 1})
    return arms, doubles


def average(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the means over seeds."""
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        groups[line["runs"], line["arm"], line["rank"]].append(line)
    names = [*RATIOS, "change"]
    return [
        {"runs": runs, "arm": arm, "rank": rank, "seeds": len(group)}
        | {name: statistics.mean(line[name] for line in group) for name in names}
        for (runs, arm, rank), group in groups.items()
    ]


def describe(title: str, lines: list[dict[str, Any]], ratio: str) -> list[str]:
    """Return the cells of a row: how a ratio of gains agrees with the changes of loss."""
    predicted, measured = [math.log(line[ratio]) for line in lines], [-line["change"] for line in lines]
    right = sum((a > 0) == (b > 0) for a, b in zip(predicted, measured))
    cells = [title, ratio, f"{right} of {len(lines)}"]
    varied = len(lines) > 2 and len(set(predicted)) > 1
    return [*cells, *(f"{float(f(predicted, measured)[0]):+.2f}" if varied else "" for f in (pearsonr, spearmanr))]


def report(arguments: argparse.Namespace) -> None:
    """Print how well gains predict the losses of all arms, of each file of runs, and of the arms that use gains."""
    arms, doubles = join([line for path in arguments.gains for line in read_gains(path)], arguments.results)
    console = Console(width=150)
    table = Table("runs", "arm", "rank", "seeds", *RATIOS[:3:2], "change of loss")
    for line in [*average(arms), *average(doubles)]:
        ratios = [f"{line[name]:.3f}" for name in RATIOS[:3:2]]
        table.add_row(
            line["runs"], line["arm"], str(line["rank"]), str(line["seeds"]), *ratios, f"{line['change']:+.2%}"
        )
    console.print(table)
    table = Table("comparisons", "ratio", "right sign", "Pearson", "Spearman")
    by_gain = [line for line in arms if line["arm"].startswith("gradient")]
    for title, lines in {
        "all arms, by seed": arms,
        "all arms, means": average(arms),
        **{name: [line for line in arms if line["runs"] == name] for name in dict.fromkeys(a["runs"] for a in arms)},
        "gradient, by seed": by_gain,
        "gradient, means": average(by_gain),
        **{
            f"gradient, {name}": [line for line in by_gain if line["runs"] == name]
            for name in dict.fromkeys(a["runs"] for a in arms)
        },
    }.items():
        for ratio in RATIOS[:2]:
            table.add_row(*describe(title, lines, ratio))
    for title, lines in {"lora at 2r, by seed": doubles, "lora at 2r, means": average(doubles)}.items():
        for ratio in RATIOS[2:]:
            table.add_row(*describe(title, lines, ratio))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    measuring = commands.add_parser("measure", help="append the gains of the arms in a file of runs")
    measuring.set_defaults(function=measure)
    for name in ("base", "train", "runs", "output"):
        measuring.add_argument(name, type=Path)
    measuring.add_argument("--longest", type=int, default=512, help="as the runs had it, like the options below")
    measuring.add_argument("--train-rows", type=int, default=2000)
    measuring.add_argument("--held-out", type=int, default=200)
    reporting = commands.add_parser("report", help="print the tables")
    reporting.set_defaults(function=report)
    reporting.add_argument("gains", type=Path, nargs="+")
    reporting.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder of the runs")
    arguments = parser.parse_args()
    arguments.function(arguments)


if __name__ == "__main__":
    main()
