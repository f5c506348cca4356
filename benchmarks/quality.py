"""Compare held-out loss by trainable parameters: LoRA in all layers, and the ways to choose layers and ranks.

    python benchmarks/quality.py train BASE TRAIN.jsonl TEST.jsonl runs.csv --ranks 1 2 4 8 --seeds 0 1 2
    python benchmarks/quality.py report runs.csv --against lora --picture curves.svg
    python benchmarks/quality.py regimes runs.csv

Rows of a JSONL file have a ``question`` and an ``answer``; the loss is over the tokens of the answers. A TSV file has
the columns ``sentence`` and ``label``, for an encoder. Every arm has at most as many trainable parameters as LoRA of
the same rank in all layers. The learning rate of an arm is the one of ``--rates`` with the lowest mean loss on
validation rows, which are neither trained nor tested on. ``--widen`` adds rates while the best one is at the edge of
those that were tried, ``--refine`` those between it and its neighbours, and ``--seeds-at best`` spares the other
seeds the other rates. With ``--epochs`` each seed draws rows of its own to train on; otherwise all seeds share the
first ones. ``--general`` measures the loss on texts before and after training, see general_text.py. A GPU is used if
there is one, in TF32. Time is CPU time, so that other work on the machine does not count. Each run appends a line to
the CSV file. A run whose line exists is skipped, so that a benchmark can be resumed.

An arm may have further words: ``gradient p0.5`` scales a module of rank r_i by s · (r / r_i)^0.5, ``lora loraplus4``
has LoRA+'s rate for B, and ``random draw2`` another draw. ``lora half rank`` is LoRA at half of the rank.
"""

import argparse
import itertools
import math
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.held_out.arms import DEFAULT_ARMS, HALF_RANK, check_name, find_stored, parse_arm
from benchmarks.held_out.rates import choose_rate, find_neighbours, find_next_rate
from benchmarks.held_out.runs import REGIME, append_run, check_appendable, find_regime, is_done, read_runs
from benchmarks.held_out.tables import RIVALS, describe_regimes, draw_regimes, print_table


def train(arguments: argparse.Namespace) -> None:
    """Run the arms that the command line asks for and that the CSV file does not have."""
    check_appendable(arguments.output)
    runner = Runner(arguments)
    for key in list_runs(arguments):
        append_run(arguments.output, runner.run(key))


def list_runs(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield what tells each missing run from the others; the CSV file has the run before the next is taken."""
    wanted = itertools.product(arguments.seeds, list_regimes(arguments), arguments.ranks, arguments.arms)
    # The runs of LoRA at half of the rank may be those of another rank.
    cells = dict.fromkeys((seed, *regime, *find_stored(arm, rank)) for seed, regime, rank, arm in wanted)
    for seed, rows, epochs, arm, rank in cells:
        regime = describe_regime(arguments, rows, epochs)
        for rate in iterate_rates(arguments, regime, arm, rank, seed):
            key = {**regime, "arm": arm, "rank": rank, "seed": seed, "rate": rate}
            if not is_done(key, read_runs(arguments.output)):
                yield key


def list_regimes(arguments: argparse.Namespace) -> list[tuple[int, int | None]]:
    """Return the numbers of rows and epochs that the command line asks for; None for a number of steps."""
    return [*itertools.product(arguments.train_rows, arguments.epochs or [None])]


def iterate_rates(
    arguments: argparse.Namespace, regime: dict[str, Any], arm: str, rank: int, seed: int
) -> Iterator[float]:
    """Yield the rates to run an arm with, in turn; the CSV file has the run with each before the next is taken.

    The first seed takes all rates of the grid and those that widen or refine it, the others those of ``--seeds-at``.
    """
    # LoRA+ multiplies the rate of B, so that the best rate of A is lower.
    grid = [rate / (parse_arm(arm).ratio or 1) ** 0.5 for rate in arguments.rates]
    first = arguments.seeds[0]
    if seed == first:
        rate: float | None = grid[0]
        while rate is not None:
            yield rate
            losses = read_losses(arguments.output, regime, arm, rank)
            by_rate = {rate: by_seed[first] for rate, by_seed in losses.items() if first in by_seed}
            rate = find_next_rate(by_rate, grid, arguments.widen, arguments.refine)
        return
    losses = read_losses(arguments.output, regime, arm, rank)
    tried = [rate for rate, by_seed in losses.items() if first in by_seed]
    if arguments.seeds_at == "all":
        yield from tried
        return
    best = choose_rate({rate: {first: losses[rate][first]} for rate in tried})
    yield best
    if arguments.seeds_at == "neighbours":
        yield from find_neighbours(best, tried)


def read_losses(path: Path, regime: dict[str, Any], arm: str, rank: int) -> dict[float, dict[int, float]]:
    """Return the validation losses of an arm, by rate and seed."""
    losses: dict[float, dict[int, float]] = defaultdict(dict)
    for run in read_runs(path):
        if find_regime(run) == find_regime(regime) and (run["arm"], run["rank"]) == (arm, rank):
            losses[run["rate"]][run["seed"]] = run["validation"]
    return losses


def describe_regime(arguments: argparse.Namespace, rows: int, epochs: int | None) -> dict[str, Any]:
    """Return the columns that say what a run is trained and tested on."""
    values = {
        "base": arguments.base.name,
        "task": arguments.train.stem,
        "rows": rows,
        "epochs": epochs,
        "steps": epochs * math.ceil(rows / arguments.batch_size) if epochs else arguments.steps,
        "batch_size": arguments.batch_size,
        "longest": arguments.longest,
        "held_out": arguments.held_out,
        "test_rows": arguments.test_rows,
    }
    return {name: values[name] for name in REGIME}


class Runner:
    """Trains arms on rows that are read once. What it needs is imported when the first arm runs."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.read: tuple[Any, ...] | None = None

    def run(self, key: dict[str, Any]) -> dict[str, Any]:
        """Train one arm, print its figures, and return its line of the CSV file."""
        from benchmarks.held_out.rows import draw_rows
        from benchmarks.held_out.training import Data, Settings, find_package, run_arm

        if self.read is None:
            self.read = self.read_data()
        rows, test, texts, before = self.read
        arguments, held_out = self.arguments, self.arguments.held_out
        data = Data(
            train=draw_rows(rows[held_out:], key["rows"], key["seed"], drawn=key["epochs"] is not None),
            validation=rows[:held_out],
            test=test,
            general=texts,
        )
        settings = Settings(
            base=arguments.base,
            is_encoder=arguments.train.suffix == ".tsv",
            steps=key["steps"],
            batch_size=arguments.batch_size,
            evaluations=arguments.evaluations,
        )
        figures = run_arm(settings, key["arm"], key["rank"], key["seed"], key["rate"], data, before)
        line = {**key, **figures, "package": find_package()}
        shown = ["arm", "rank", "seed", "rate", *figures]
        print({name: line[name] for name in shown if name not in ("chosen", "curve")}, flush=True)
        return line

    def read_data(self) -> tuple[Any, ...]:
        """Return the rows to train and validate on, those to test on, the texts, and the base's loss on them."""
        from transformers import AutoTokenizer, logging

        from benchmarks.held_out.rows import read_rows, read_text
        from benchmarks.held_out.training import load_base, measure_texts

        arguments = self.arguments
        logging.set_verbosity_error()
        tokenizer = AutoTokenizer.from_pretrained(arguments.base)
        rows = read_rows(arguments.train, tokenizer, arguments.longest)
        test = read_rows(arguments.test, tokenizer, arguments.longest)[: arguments.test_rows]
        texts = {
            path.stem: read_text(path, tokenizer, arguments.longest, arguments.general_rows)
            for path in arguments.general
        }
        before = measure_texts(load_base(arguments.base, is_encoder=False), texts) if texts else {}
        return rows, test, texts, before


def read_all(paths: list[Path]) -> list[dict[str, Any]]:
    """Return the runs of several CSV files."""
    return [run for path in paths for run in read_runs(path)]


def report(arguments: argparse.Namespace) -> None:
    """Print each arm's mean test loss and accuracy, and their paired differences to another arm's."""
    print_table(read_all(arguments.runs), arguments.against, arguments.picture)


def regimes(arguments: argparse.Namespace) -> None:
    """Print a section with tables for each regime and rank, and draw its picture."""
    runs = read_all(arguments.runs)
    print("\n".join(describe_regimes(runs, arguments.rivals, arguments.pictures)))
    if arguments.pictures:
        draw_regimes(runs, Path(arguments.pictures))


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train", help="run the arms that the CSV file does not have yet")
    training.set_defaults(function=train)
    for name in ("base", "train", "test", "output"):
        training.add_argument(name, type=Path)
    training.add_argument("--arms", nargs="+", type=read_arm, default=DEFAULT_ARMS)
    training.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    training.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    training.add_argument("--rates", nargs="+", type=float, default=[1e-3, 2e-3], help="rates that are tried first")
    training.add_argument("--widen", type=int, default=0, help="rates to add while the best is at the edge of the grid")
    training.add_argument("--refine", action="store_true", help="try the rates between the best one and its neighbours")
    training.add_argument(
        "--seeds-at",
        choices=("all", "best", "neighbours"),
        default="all",
        help="rates of the seeds after the first: all that it tried, its best, or its best with the two around it",
    )
    training.add_argument("--steps", type=int, default=120)
    training.add_argument("--epochs", nargs="+", type=int, help="epochs instead of steps")
    training.add_argument("--rows", "--train-rows", dest="train_rows", nargs="+", type=int, default=[2000])
    training.add_argument("--batch-size", type=int, default=8)
    training.add_argument("--longest", type=int, default=512, help="tokens after which rows are cut")
    training.add_argument("--held-out", type=int, default=200, help="rows to validate on")
    training.add_argument("--test-rows", type=int, default=200)
    training.add_argument("--evaluations", type=int, default=1, help="evaluations in a run, the last one at its end")
    training.add_argument("--general", nargs="+", type=Path, default=[], help="texts on which forgetting is measured")
    training.add_argument("--general-rows", type=int, default=32, help="pieces of each text")
    reporting = commands.add_parser("report", help="print the table")
    reporting.set_defaults(function=report)
    reporting.add_argument("runs", type=Path, nargs="+")
    reporting.add_argument("--against", type=read_arm, default="lora", help="the arm that the others are compared with")
    reporting.add_argument("--picture", type=Path, help="file to draw the curves into")
    sections = commands.add_parser("regimes", help="print tables for each regime and rank, as Markdown")
    sections.set_defaults(function=regimes)
    sections.add_argument("runs", type=Path, nargs="+")
    sections.add_argument(
        "--rivals",
        nargs="+",
        type=read_arm,
        default=RIVALS,
        help="the arms that the others are compared with; draws of one are averaged",
    )
    sections.add_argument("--pictures", help="folder to draw a picture of each section into")
    return parser


def read_arm(name: str) -> str:
    """Return the name of an arm from the command line."""
    try:
        return check_name(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def check_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Exit with a message for values that contradict each other."""
    if arguments.function is not train:
        return
    if arguments.general and arguments.train.suffix == ".tsv":
        parser.error("--general: an encoder with a classifier has no loss on texts. Leave the texts out.")
    odd = [rank for rank in arguments.ranks if rank % 2]
    if odd and HALF_RANK in arguments.arms:
        parser.error(f"--ranks: {odd[0]} has no half, which {HALF_RANK!r} needs. Use even ranks.")


def main() -> None:
    parser = make_parser()
    arguments = parser.parse_args()
    check_arguments(parser, arguments)
    arguments.function(arguments)


if __name__ == "__main__":
    main()
