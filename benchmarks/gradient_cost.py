"""Compare the cost of a pass of ``method: gradient`` with training's forward and backward passes over the same rows.

Both run the same model with LoRA on the same rows in the same micro-batches. The plain way is a training step without
the optimizer. Time: both alternate in one process. Peak memory in addition to the weights: each runs in a process of
its own, ours over all rows, and the plain way over one micro-batch with the gradients of LoRA.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

from measuring import (
    MIB,
    Goal,
    PeakMemory,
    Setup,
    add_setup_arguments,
    check_peak_memory,
    draw_rows,
    make_model,
    make_trainer,
    median_ratio,
    read_setup,
    report_goals,
    run_alone,
    synchronize,
    write_json,
)
from rich.console import Console
from transformers import Trainer

from axolotl_layersel.config.selection import SelectionConfig
from axolotl_layersel.lora.layers import find_layer_stack
from axolotl_layersel.lora.run import Run
from axolotl_layersel.selection.data.calibration import read_samples
from axolotl_layersel.selection.methods import gradient
from axolotl_layersel.selection.types import Selection

PLAIN, OURS = "plain", "gradient"
WAYS = (PLAIN, OURS)


def run_plainly(trainer: Trainer, rows: list[dict[str, list[int]]]) -> None:
    """Run rows forward and backward in micro-batches, as training does."""
    model, size = trainer.model, trainer.args.per_device_train_batch_size
    assert model is not None
    model.train()
    for start in range(0, len(rows), size):
        inputs = trainer._prepare_inputs(trainer.data_collator(rows[start : start + size]))
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, inputs)
        loss.backward()
        model.zero_grad(set_to_none=True)


def make_ways(setup: Setup, folder: str, tokens: int, count: int) -> dict[str, Callable[[], object]]:
    """Return both ways to run ``count`` rows, warmed up."""
    rows = draw_rows(setup, tokens, count)
    trainer = make_trainer(setup, make_model(setup), folder, rows)
    settings = SelectionConfig(method="gradient", num_samples=count).resolve(run_seed=0)
    selection = Selection.of(Run.of(trainer), find_layer_stack(trainer.model), settings)
    samples = read_samples(rows, count, 0)
    modules = selection.stack.list_modules(selection.candidates)
    width = selection.highest_rank + gradient.OVERSAMPLING
    short = draw_rows(setup, 16, 2)
    run_plainly(trainer, short)
    gradient.measure_sketches(selection, read_samples(short, 2, 0), modules, width)
    return {
        PLAIN: lambda: run_plainly(trainer, rows),
        OURS: lambda: gradient.measure_sketches(selection, samples, modules, width),
    }


def time_ways(setup: Setup, tokens: int, count: int, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each repeat by way; the ways take turns to go first."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        ways = make_ways(setup, folder, tokens, count)
        for repeat in range(repeats):
            for way in WAYS if repeat % 2 else reversed(WAYS):
                synchronize(setup.device)
                started = time.perf_counter()
                ways[way]()
                synchronize(setup.device)
                seconds[way].append(time.perf_counter() - started)
    return seconds


def measure_peak(setup: Setup, tokens: int, count: int, way: str) -> int:
    """Return the peak memory of a way in addition to the weights, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        ways = make_ways(setup, folder, tokens, count)
        check_peak_memory(setup.device)
        with PeakMemory(setup.device) as peak:
            ways[way]()
    return peak.bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_setup_arguments(parser, hidden_size=1024, layers=8, vocabulary=1024, batch_size=2)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of each row")
    parser.add_argument("--samples", type=int, default=8, help="rows of a pass")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    setup, console = read_setup(arguments), Console()
    seconds = run_alone(time_ways, setup, arguments.tokens, arguments.samples, arguments.repeats)
    counts = {PLAIN: setup.batch_size, OURS: arguments.samples}
    peaks = {way: run_alone(measure_peak, setup, arguments.tokens, count, way) for way, count in counts.items()}
    console.print(setup.describe(), soft_wrap=True)
    for way in WAYS:
        console.print(f"{way:>9}: {statistics.median(seconds[way]):.2f} s, {peaks[way] / MIB:.0f} MiB")
    goals = [
        Goal(
            "time of a pass, of the plain passes over the same rows", median_ratio(seconds[OURS], seconds[PLAIN]), 1.15
        ),
        Goal("peak memory over the weights, of one training micro-batch", peaks[OURS] / peaks[PLAIN], 1.0),
    ]
    report_goals(console, goals)
    write_json(arguments.json, "gradient_cost", setup, goals, seconds=seconds, peak_bytes=peaks)


if __name__ == "__main__":
    main()
