"""Compare the cost of scoring layers by CKA with that of the plain way.

Ours is the package's pass over the calibration sample, called as in a run, and its scoring. The plain way runs the
model with ``output_hidden_states=True``, which also computes full logits, takes the state of the same token from every
layer, and scores in the same way. Both have the same model, samples and batches, and must give the same scores.
Time: both ways alternate in one process. Peak memory in addition to the weights: each measurement runs in a process of
its own.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from measuring import (
    MIB,
    Goal,
    PeakMemory,
    Setup,
    add_setup_arguments,
    check_peak_memory,
    make_model,
    make_trainer,
    median_ratio,
    read_setup,
    report_goals,
    run_alone,
    synchronize,
    write_json,
)
from peft import PeftModel
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import Trainer

from axolotl_layersel.config.selection import SelectionConfig
from axolotl_layersel.lora.layers import find_layer_stack
from axolotl_layersel.lora.run import Run
from axolotl_layersel.selection.data.calibration import Sample, place_token
from axolotl_layersel.selection.methods import cka
from axolotl_layersel.selection.types import Selection

PLAIN, OURS = "plain", "layersel"
WAYS = (PLAIN, OURS)
GOAL_LENGTH = 2048
SCORE_TOLERANCE = 1e-6


@dataclass
class Cost:
    """All measurements at one sequence length, by way."""

    sequence_length: int
    seconds: dict[str, list[float]] = field(default_factory=lambda: {way: [] for way in WAYS})
    peak_bytes: dict[str, list[int]] = field(default_factory=lambda: {way: [] for way in WAYS})
    score_difference: float = 0.0

    @property
    def time_ratio(self) -> float:
        return median_ratio(self.seconds[OURS], self.seconds[PLAIN])

    @property
    def memory_ratio(self) -> float:
        return statistics.median(self.peak_bytes[OURS]) / statistics.median(self.peak_bytes[PLAIN])


def draw_samples(setup: Setup, count: int, length: int) -> list[Sample]:
    """Return ``count`` samples of ``length`` random tokens each."""
    draw = random.Random(length)
    ids = [[draw.randrange(setup.vocabulary) for _ in range(length)] for _ in range(count)]
    return [Sample(row=row, input_ids=tokens, labels=None) for row, tokens in enumerate(ids)]


def measure_plainly(trainer: Trainer, model: PeftModel, samples: list[Sample], positions: list[int]) -> torch.Tensor:
    """Return the states of one token of each sample in the plain way: (samples, layers + 1, width), fp32 on the CPU."""
    device, size = trainer.args.device, trainer.args.per_device_train_batch_size

    def measure(batch: list[Sample], rows: list[int]) -> torch.Tensor:
        ids = torch.tensor([sample.input_ids for sample in batch], device=device)
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
        return torch.stack([hidden[torch.arange(len(rows)), rows].float().cpu() for hidden in output.hidden_states], 1)

    model.eval()
    starts = range(0, len(samples), size)
    with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=trainer.args.bf16):
        return torch.cat([measure(samples[i : i + size], positions[i : i + size]) for i in starts])


def make_ways(setup: Setup, folder: str) -> dict[str, Callable[[list[Sample]], list[float | None]]]:
    """Return both ways to score the layers of one model, warmed up on a few short samples."""
    model = make_model(setup)
    trainer = make_trainer(setup, model, folder)
    settings = SelectionConfig(method="cka").resolve(run_seed=0)
    selection = Selection.of(Run.of(trainer), find_layer_stack(model), settings)

    def score(states: torch.Tensor | None) -> list[float | None]:
        assert states is not None, "one process has all states"
        pairs = [(layer, layer + 1) for layer in range(setup.layers)]
        return cka.score_pairs(states, pairs)[0]

    def plain(samples: list[Sample]) -> list[float | None]:
        kept, positions = place_token(samples, "last")
        assert positions is not None, "only a mean over tokens has none"
        return score(measure_plainly(trainer, model, kept, positions))

    def ours(samples: list[Sample]) -> list[float | None]:
        return score(cka.measure_token_states(selection, *place_token(samples, "last")))

    for way in (plain, ours):
        way(draw_samples(setup, 2, 32))
    return {PLAIN: plain, OURS: ours}


def time_ways(
    setup: Setup, count: int, length: int, repeats: int
) -> tuple[dict[str, list[float]], dict[str, list[float | None]]]:
    """Return the seconds of each repeat and the scores by way; the ways take turns to go first."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    scores: dict[str, list[float | None]] = {}
    samples = draw_samples(setup, count, length)
    with tempfile.TemporaryDirectory() as folder:
        ways = make_ways(setup, folder)
        for way in WAYS:
            ways[way](samples[: setup.batch_size])
        for repeat in range(repeats):
            for way in WAYS if repeat % 2 else reversed(WAYS):
                synchronize(setup.device)
                started = time.perf_counter()
                scores[way] = ways[way](samples)
                synchronize(setup.device)
                seconds[way].append(time.perf_counter() - started)
    return seconds, scores


def measure_peak(setup: Setup, count: int, length: int, way: str) -> tuple[int, list[float | None]]:
    """Return the peak memory in addition to the weights, in bytes, and the scores of one way."""
    samples = draw_samples(setup, count, length)
    with tempfile.TemporaryDirectory() as folder:
        ways = make_ways(setup, folder)
        check_peak_memory(setup.device)
        with PeakMemory(setup.device) as peak:
            scores = ways[way](samples)
    return peak.bytes, scores


def compare(scores: list[float | None], others: list[float | None]) -> float:
    """Return the largest difference between the scores of two ways.

    Raises:
        SystemExit: if the scores differ, because then the ways do not do the same work.
    """
    pairs = list(zip(scores, others, strict=True))
    if any(one is None or other is None for one, other in pairs):
        raise SystemExit(f"some layers have no score: {scores} and {others}")
    difference = max(abs(one - other) for one, other in pairs)
    if not difference <= SCORE_TOLERANCE:
        raise SystemExit(f"the two ways score differently, by {difference:.3g}: {scores} and {others}")
    return difference


def measure_cost(setup: Setup, count: int, length: int, repeats: int, memory_repeats: int) -> Cost:
    """Return all measurements at one sequence length.

    Raises:
        SystemExit: if the two ways do not give the same scores.
    """
    cost = Cost(length)
    cost.seconds, scores = run_alone(time_ways, setup, count, length, repeats)
    cost.score_difference = compare(scores[OURS], scores[PLAIN])
    for _ in range(memory_repeats):
        for way in WAYS:
            peak, again = run_alone(measure_peak, setup, count, length, way)
            cost.peak_bytes[way].append(peak)
            cost.score_difference = max(cost.score_difference, compare(again, scores[PLAIN]))
    return cost


def make_table(setup: Setup, count: int, costs: list[Cost]) -> Table:
    """Return the medians as a table."""
    table = Table(title=f"CKA on {count} samples: {setup.describe()}", title_justify="left", box=box.SIMPLE)
    for heading in ("tokens", "plain s", "layersel s", "ratio", "plain MiB", "layersel MiB", "ratio", "scores differ"):
        table.add_column(heading, justify="right")
    for cost in costs:
        table.add_row(
            str(cost.sequence_length),
            *(f"{statistics.median(cost.seconds[way]):.2f}" for way in WAYS),
            f"{cost.time_ratio:.2f}",
            *(f"{statistics.median(cost.peak_bytes[way]) / MIB:.0f}" for way in WAYS),
            f"{cost.memory_ratio:.2f}",
            f"{cost.score_difference:.0e}",
        )
    return table


def judge(costs: list[Cost]) -> list[Goal]:
    """Return the goals: memory at one length, time at every length."""
    memory = [
        Goal(f"peak memory over the weights at {GOAL_LENGTH} tokens, of the plain way", cost.memory_ratio, 1 / 3)
        for cost in costs
        if cost.sequence_length == GOAL_LENGTH
    ]
    time_goals = [
        Goal(f"time at {cost.sequence_length} tokens, of the plain way", cost.time_ratio, 1) for cost in costs
    ]
    return memory + time_goals


def main() -> None:
    """Measure, print the table and check the goals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_setup_arguments(parser, hidden_size=512, layers=12, vocabulary=32000, batch_size=4)
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[128, 256, 512, 1024, 2048],
        help="tokens of a row, one or more lengths",
    )
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each way's time")
    parser.add_argument("--memory-repeats", type=int, default=3, help="measurements of each way's peak memory")
    arguments = parser.parse_args()
    setup, console = read_setup(arguments), Console()

    costs = []
    for length in arguments.lengths:
        console.print(f"measuring {length} tokens", style="dim")
        costs.append(measure_cost(setup, arguments.samples, length, arguments.repeats, arguments.memory_repeats))
    console.print(make_table(setup, arguments.samples, costs))
    goals = judge(costs)
    report_goals(console, goals)
    results = [{**asdict(cost), "time_ratio": cost.time_ratio, "memory_ratio": cost.memory_ratio} for cost in costs]
    write_json(arguments.json, "selection_cost", setup, goals, samples=arguments.samples, results=results)


if __name__ == "__main__":
    main()
