"""The figures of each arm of a comparison over its seeds, and what follows from them."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean, median

from axolotl_layersel.cli.compare.figures import LORA, RANDOM, Comparison, Failure, Figures
from axolotl_layersel.cli.compare.statistics import (
    Difference,
    Judgement,
    Noise,
    differ,
    find_best,
    find_loss_at,
    judge,
)
from axolotl_layersel.config.strict_block import as_mapping


@dataclass(frozen=True)
class Costs:
    """What an arm costs, over its seeds.

    Attributes:
        parameters: the mean number of trainable parameters.
        seconds_per_step: the median.
        seconds_choosing: the mean; 0 without a choice.
        seconds_training: the mean of all steps together.
        peak_memory_bytes: the largest.
        adapter_bytes: the mean.
    """

    parameters: float
    seconds_per_step: float
    seconds_choosing: float
    seconds_training: float
    peak_memory_bytes: int
    adapter_bytes: float


@dataclass(frozen=True)
class Forgetting:
    """The loss on the general text.

    Attributes:
        rise: its mean rise in training.
        to_lora: the difference to plain LoRA's loss after training; None for ``lora`` and without a shared seed.
    """

    rise: float
    to_lora: Difference | None


@dataclass(frozen=True)
class ArmSummary:
    """An arm at its best learning rate and at the full number of steps.

    Attributes:
        arm: its name.
        rate: its best learning rate; None if no cell ended well.
        cells: those that ended well, by seed in ascending order.
        failures: the cells that failed, at any rate.
        test_loss: the mean over the seeds; None without cells.
        judgement: what the losses say about the arm; None for ``lora``.
        costs: None without cells.
        equal_time_loss: the mean validation loss after as much time as the fastest cell took; None if unknown.
        forgetting: None without general text.
        metrics: the means of what Axolotl's evaluation returned besides the loss.
    """

    arm: str
    rate: float | None
    cells: dict[int, Figures]
    failures: list[Failure]
    test_loss: float | None
    judgement: Judgement | None
    costs: Costs | None
    equal_time_loss: float | None
    forgetting: Forgetting | None
    metrics: dict[str, float]


@dataclass(frozen=True)
class Summary:
    """All arms of a comparison.

    Attributes:
        arms: by name, in the order of the settings.
        best: the arm to use, which is ``lora`` unless another one is better beyond its interval.
        equal_seconds: the time of the fastest cell with its choice of layers; None without cells.
    """

    arms: dict[str, ArmSummary]
    best: str
    equal_seconds: float | None

    @property
    def lora(self) -> ArmSummary:
        """Plain LoRA."""
        return self.arms[LORA]


def summarise(comparison: Comparison) -> Summary:
    """Return the figures of each arm, and which arm to use."""
    arms = comparison.settings.arms
    final = {arm: dict(sorted(comparison.list_final(arm).items())) for arm in arms}
    drawn = [arm for arm in arms if is_drawn(comparison, arm)]
    choosing = [arm for arm, settings in arms.items() if settings.choosing]
    judgements = judge(collect_losses(final, lambda cell: cell.test_loss), choosing, drawn)
    forgotten = Noise(collect_losses(final, lambda cell: cell.general_after), drawn)
    everything = [cell for cells in final.values() for cell in cells.values() if cell.curve]
    equal_seconds = min((cell.seconds_choosing + cell.curve[-1].seconds for cell in everything), default=None)
    summaries = {
        arm: ArmSummary(
            arm=arm,
            rate=comparison.best_rates.get(arm),
            cells=cells,
            failures=[failure for failure in comparison.failures if failure.arm == arm],
            test_loss=average(cell.test_loss for cell in cells.values()),
            judgement=judgements.get(arm),
            costs=add_up_costs(list(cells.values())) if cells else None,
            equal_time_loss=find_equal_time_loss(list(cells.values()), equal_seconds),
            forgetting=find_forgetting(forgotten, arm, cells),
            metrics=average_metrics(list(cells.values())),
        )
        for arm, cells in final.items()
    }
    return Summary(summaries, find_best(judgements), equal_seconds)


def is_drawn(comparison: Comparison, arm: str) -> bool:
    """Return whether an arm draws its layers at random, so that they change with the seed."""
    block = comparison.settings.arms[arm].keys.get("layersel")
    selection = as_mapping(as_mapping(block).get("selection"))
    return arm == RANDOM or (selection.get("method") == RANDOM and selection.get("seed") is None)


def collect_losses(
    final: dict[str, dict[int, Figures]], read: Callable[[Figures], float | None]
) -> dict[str, dict[int, float]]:
    """Return a loss of the cells by arm and seed, as far as they have it."""
    return {
        arm: {seed: loss for seed, cell in cells.items() if (loss := read(cell)) is not None}
        for arm, cells in final.items()
    }


def average(values: Iterable[float | None]) -> float | None:
    """Return the mean of numbers; None if one is missing, or all."""
    numbers = list(values)
    present = [number for number in numbers if number is not None]
    return fmean(present) if present and len(present) == len(numbers) else None


def add_up_costs(cells: list[Figures]) -> Costs:
    """Return the costs of an arm."""
    return Costs(
        parameters=fmean(cell.trainable_parameters for cell in cells),
        seconds_per_step=median(cell.seconds_per_step for cell in cells),
        seconds_choosing=fmean(cell.seconds_choosing for cell in cells),
        seconds_training=fmean(cell.seconds_training for cell in cells),
        peak_memory_bytes=max(cell.peak_memory_bytes for cell in cells),
        adapter_bytes=fmean(cell.adapter_bytes for cell in cells),
    )


def find_equal_time_loss(cells: list[Figures], seconds: float | None) -> float | None:
    """Return the mean validation loss of cells ``seconds`` after their start; None if one does not reach so far."""
    if seconds is None:
        return None
    return average(find_loss_at(cell.curve, cell.seconds_choosing, seconds) for cell in cells)


def find_forgetting(noise: Noise, arm: str, cells: dict[int, Figures]) -> Forgetting | None:
    """Return what an arm forgets; None if its cells have no loss on general text."""
    rises = [
        cell.general_after - cell.general_before
        for cell in cells.values()
        if cell.general_after is not None and cell.general_before is not None
    ]
    if not rises:
        return None
    return Forgetting(fmean(rises), None if arm == LORA else differ(noise, arm, LORA))


def average_metrics(cells: list[Figures]) -> dict[str, float]:
    """Return the mean of each metric that is a finite number in all cells."""
    names = cells[0].metrics if cells else {}
    values = {name: [cell.metrics.get(name, math.nan) for cell in cells] for name in names}
    return {name: fmean(each) for name, each in values.items() if all(map(math.isfinite, each))}
