"""Measure how time and memory of scoring grow with the layers of a model, and with long rows and a large vocabulary.

Every method that reads rows scores the same rows in models of 12 to 96 layers of the same size, each in a process of
its own. Time is CPU time, which other programs disturb less than wall time. Its exponent is the slope of a line through
the logarithms. Memory in addition to the weights is compared with the tensors that a pass must keep: the hidden states
between the layers of a micro-batch for ``fisher``, and also the sketches for ``gradient``. ``cka``, ``cosine`` and
``relative`` keep nothing.

Then each method scores one long row with a large vocabulary, whose logits would take gigabytes.
"""

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace

from measuring import (
    MIB,
    Goal,
    PeakMemory,
    Setup,
    Stopwatch,
    add_setup_arguments,
    check_peak_memory,
    draw_rows,
    make_model,
    make_trainer,
    read_setup,
    report_goals,
    run_alone,
    write_json,
)
from rich import box
from rich.console import Console
from rich.table import Table

from axolotl_layersel.config.methods import METHODS
from axolotl_layersel.config.selection import SelectionConfig
from axolotl_layersel.lora.layers import find_layer_stack
from axolotl_layersel.lora.run import Run
from axolotl_layersel.selection.methods.gradient import OVERSAMPLING
from axolotl_layersel.selection.types import Selection

SCORING = ("cka", "cosine", "relative", "fisher", "gradient")
EXPONENT_GOAL = 1.2
# The limit of extra memory per layer, as a share of the hidden states after one layer.
FLAT_GOAL = 0.25
# The logits of a long row, with their loss and gradient, take three times as much.
LONG_ROW_GOAL = 0.25


@dataclass(frozen=True)
class Cost:
    """The cost of a method: CPU seconds, and peak memory in addition to the weights in bytes."""

    seconds: float
    peak: int


def make_pass(setup: Setup, folder: str, method: str, tokens: int, count: int) -> Callable[[], object]:
    """Return a function that scores ``count`` rows with ``method``, warmed up with two short rows."""
    # Recomputed in the backward pass, as training with checkpointing does.
    rows, short = draw_rows(setup, tokens, count), draw_rows(setup, 16, 4)
    trainer = make_trainer(setup, make_model(setup), folder, rows, gradient_checkpointing=True)

    def score(rows: list[dict[str, list[int]]]) -> object:
        trainer.train_dataset = rows
        settings = SelectionConfig(method=method, num_samples=len(rows), ratio=0.5).resolve(run_seed=0)
        return METHODS[method].load()(Selection.of(Run.of(trainer), find_layer_stack(trainer.model), settings))

    score(short)
    return lambda: score(rows)


def measure_seconds(setup: Setup, method: str, tokens: int, count: int, repeats: int) -> float:
    """Return the median CPU time of a pass in seconds."""
    stopwatch, seconds = Stopwatch(setup.device), []
    with tempfile.TemporaryDirectory() as folder:
        score = make_pass(setup, folder, method, tokens, count)
        for _ in range(repeats):
            stopwatch.start()
            score()
            seconds.append(stopwatch.stop()[1])
    return statistics.median(seconds)


def measure_peak(setup: Setup, method: str, tokens: int, count: int) -> int:
    """Return the peak memory of a pass in addition to the weights, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        score = make_pass(setup, folder, method, tokens, count)
        check_peak_memory(setup.device)
        with PeakMemory(setup.device) as peak:
            score()
    return peak.bytes


def count_kept_bytes(setup: Setup, method: str, tokens: int) -> int:
    """Return the bytes that a pass must keep per layer of a model in fp32; see the head of this file."""
    hidden = setup.batch_size * tokens * setup.hidden_size * 4
    if method == "fisher":
        return hidden
    if method == "gradient":
        outputs = 5 * setup.hidden_size + 2 * setup.intermediate_size
        return hidden + 8 * (setup.rank * 4 + OVERSAMPLING) * outputs
    return 0


def find_exponent(sizes: list[int], values: list[float]) -> float:
    """Return the slope of the line through the logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    return statistics.linear_regression(x, y).slope


def main() -> None:
    """Measure, print the tables and check the goals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_setup_arguments(parser, hidden_size=128, layers=2, vocabulary=1024, batch_size=2)
    parser.add_argument("--depths", type=int, nargs="+", default=[12, 24, 48, 96], help="layers of the models")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each row")
    parser.add_argument("--samples", type=int, default=8, help="rows of a pass")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--long-tokens", type=int, default=8192, help="tokens of the long row")
    parser.add_argument(
        "--long-vocabulary", type=int, default=131072, help="vocabulary size of its model, which has --layers layers"
    )
    arguments = parser.parse_args()
    setup, console = read_setup(arguments), Console()
    tokens, count, depths = arguments.tokens, arguments.samples, arguments.depths
    goals, costs = [], {}
    table = Table(title=f"{count} rows of {tokens} tokens: {setup.describe()}", title_justify="left", box=box.SIMPLE)
    for heading in ("method", *(f"{depth} layers" for depth in depths), "exponent", "kept MiB a layer", "rest"):
        table.add_column(heading, justify="right")
    for method in SCORING:
        found = costs[method] = [
            Cost(
                run_alone(measure_seconds, replace(setup, layers=depth), method, tokens, count, arguments.repeats),
                run_alone(measure_peak, replace(setup, layers=depth), method, tokens, count),
            )
            for depth in depths
        ]
        exponent = find_exponent(depths, [cost.seconds for cost in found])
        kept = count_kept_bytes(setup, method, tokens)
        rest = [cost.peak - kept * depth for cost, depth in zip(found, depths)]
        growth = (rest[-1] - rest[0]) / (depths[-1] - depths[0]) / (setup.batch_size * tokens * setup.hidden_size * 4)
        cells = (f"{cost.seconds:.2f} s, {cost.peak / MIB:.0f} MiB" for cost in found)
        table.add_row(method, *cells, f"{exponent:.2f}", f"{kept / MIB:.2f}", " ".join(f"{r / MIB:.0f}" for r in rest))
        goals += [
            Goal(f"{method}: exponent of the time by layers", exponent, EXPONENT_GOAL),
            Goal(f"{method}: growth of the rest by layer, of a layer's hidden states", growth, FLAT_GOAL),
        ]
    console.print(table)

    long = replace(setup, vocabulary=arguments.long_vocabulary, batch_size=1)
    logits = arguments.long_tokens * arguments.long_vocabulary * 4
    console.print(f"Logits of a row of {arguments.long_tokens} tokens in fp32: {logits / MIB:.0f} MiB")
    peaks = {}
    for method in SCORING:
        peaks[method] = run_alone(measure_peak, long, method, arguments.long_tokens, 3)
        console.print(f"{method:>9}: {peaks[method] / MIB:.0f} MiB in addition to the weights")
        goals.append(
            Goal(f"{method}: memory of a long row, relative to its logits", peaks[method] / logits, LONG_ROW_GOAL)
        )
    report_goals(console, goals)
    raw = {method: [vars(cost) for cost in found] for method, found in costs.items()}
    write_json(arguments.json, "scaling", setup, goals, depths=depths, costs=raw, long_peaks=peaks)


if __name__ == "__main__":
    main()
