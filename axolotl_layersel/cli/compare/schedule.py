"""The course of a comparison: from the cells that have ended, the cells that come next. Pure functions.

Each arm finds its own rate. All rates are tried with half of the steps, the better half of them with all steps, and the
grid is widened while the best rate lies at its edge. Then the rates halfway to the neighbours of the best one are
tried, because the loss can rise steeply above the best rate. The other seeds follow at the best rate. A second start
computes the same from the figures on disk.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from statistics import fmean

from axolotl_layersel.cli.compare.cells import Cell
from axolotl_layersel.cli.compare.figures import Settings
from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.progress import format_duration

FACTOR = 2.0  # between neighbouring rates
FINE = 1.5  # rates that are no further apart are not refined
RATES = 5
FEWEST_RATES, FEWEST_SEEDS, FEWEST_STEPS = 3, 2, 10  # that a time limit leaves
EDGE = "The best rate of"  # the begin of the sentence about a best rate at the edge

# The validation loss of each cell that has ended, None for one that has failed.
Ended = Mapping[Cell, float | None]


def spread_rates(middle: float, number: int = RATES) -> list[float]:
    """Return an odd ``number`` of rates around one, a factor of 2 apart, in ascending order."""
    half = number // 2
    return [round_rate(middle * FACTOR**power) for power in range(-half, half + 1)]


def round_rate(rate: float) -> float:
    """Return a rate with as many digits as the name of its folder has."""
    return float(f"{rate:.4g}")


def order_rates(rates: list[float], own: float) -> list[float]:
    """Return rates by their distance from that of the user's file, so that the first cell is closest to their run."""
    return sorted(rates, key=lambda rate: (abs(math.log(rate / own)), rate))


@dataclass(frozen=True)
class ArmPlan:
    """The cells of one arm that are known so far.

    Attributes:
        rungs: the cells in groups; those of a group do not depend on each other.
        best: the rate with the lowest validation loss, once it is known.
        edge: how the best rate lies at the edge of the grid after it was widened: ``lowest`` or ``highest``.
        is_complete: whether no further cells can follow.
        least: the number of cells of the whole arm, if the grid is not widened any further and the best rate has a
            neighbour on both sides.
    """

    rungs: list[list[Cell]]
    best: float | None
    edge: str | None
    is_complete: bool
    least: int


def plan_arm(arm: str, settings: Settings, own: float, ended: Ended) -> ArmPlan:
    """Return the course of an arm.

    Args:
        arm: its name.
        settings: the settings of the comparison.
        own: the learning rate of the user's file.
        ended: the cells that have ended, of all arms.
    """
    first, *others = settings.seeds
    grid, rungs = order_rates(settings.rates, own), []
    seeds = [first] if settings.halving else settings.seeds
    keeps = max(2, len(grid) // 2) if settings.halving else len(grid)
    later = len(others) if settings.halving else 0
    between = len(seeds) * max(len(list_between(rate, grid)) for rate in grid) if settings.refine else 0
    if keeps < len(grid) and settings.steps > 1:
        rungs.append([Cell(arm, rate, first, settings.steps // 2) for rate in grid])
        if any(cell not in ended for cell in rungs[-1]):
            return ArmPlan(rungs, None, None, False, len(grid) + keeps + between + later)
        ranked = rank_rates({cell.rate: [cell] for cell in rungs[-1]}, ended)
        full = order_rates(ranked[:keeps], own)
    else:
        full = grid
    rungs.append([Cell(arm, rate, seed, settings.steps) for seed in seeds for rate in full])
    tried, wider, refines = set(grid), 0, settings.refine  # refines: whether the rates in between are still to come
    while True:
        cells = list_cells(rungs)
        if any(cell not in ended for cell in cells):
            return ArmPlan(rungs, None, None, False, len(cells) + (between if refines else 0) + later)
        at_full = [cell for cell in cells if cell.steps == settings.steps]
        ranked = rank_rates({rate: [c for c in at_full if c.rate == rate] for rate in {c.rate for c in at_full}}, ended)
        if not ranked:
            return ArmPlan(rungs, None, None, True, len(cells))
        best = ranked[0]
        edge = find_edge(best, tried)
        added: list[float] = []
        if edge is not None and wider < settings.widen:
            wider += 1
            added = [round_rate(best * FACTOR if edge == "highest" else best / FACTOR)]
        elif refines:
            refines = False
            added = [round_rate(rate) for rate in list_between(best, tried)]
        if not added:
            break
        tried.update(added)
        rungs.append([Cell(arm, rate, seed, settings.steps) for seed in seeds for rate in added])
    if later:
        rungs.append([Cell(arm, best, seed, settings.steps) for seed in others])
    cells = list_cells(rungs)
    return ArmPlan(rungs, best, edge, all(cell in ended for cell in cells), len(cells))


def list_cells(rungs: list[list[Cell]]) -> list[Cell]:
    """Return the cells of all rungs."""
    return [cell for rung in rungs for cell in rung]


def rank_rates(cells: Mapping[float, list[Cell]], ended: Ended) -> list[float]:
    """Return the rates by their mean validation loss, the lowest first, without those of which a cell has failed.

    If every rate has a failed cell, those with any loss are ranked by the mean over the cells that have one.
    """
    losses = {rate: [ended[cell] for cell in of_rate] for rate, of_rate in cells.items()}
    whole = {rate: [loss for loss in found if loss is not None] for rate, found in losses.items()}
    complete = {rate: found for rate, found in whole.items() if found and len(found) == len(losses[rate])}
    chosen = complete or {rate: found for rate, found in whole.items() if found}
    return sorted(chosen, key=lambda rate: (sum(chosen[rate]) / len(chosen[rate]), rate))


def find_edge(best: float, tried: set[float]) -> str | None:
    """Return whether a rate is the ``lowest`` or the ``highest`` of those tried; None for one in between."""
    if len(tried) < 2:
        return None
    return "lowest" if best == min(tried) else "highest" if best == max(tried) else None


def list_between(rate: float, tried: Collection[float]) -> list[float]:
    """Return the rates halfway, by their ratio, to the neighbours of one of those tried that are not close to it."""
    below, above = [each for each in tried if each < rate], [each for each in tried if each > rate]
    neighbours = ([max(below)] if below else []) + ([min(above)] if above else [])
    return [math.sqrt(rate * other) for other in neighbours if max(rate, other) > FINE * min(rate, other)]


def plan_next(settings: Settings, own: float, ended: Ended) -> Cell | None:
    """Return the next cell: arms take turns within a rung, with ``lora`` first. None if the comparison is complete."""
    waiting = []
    for place, arm in enumerate(settings.arms):
        for number, rung in enumerate(plan_arm(arm, settings, own, ended).rungs):
            waiting += [(number, index, place, cell) for index, cell in enumerate(rung) if cell not in ended]
    return min(waiting, key=lambda entry: entry[:3])[3] if waiting else None


def list_planned(settings: Settings, own: float, ended: Ended) -> list[Cell]:
    """Return all cells that are known so far, in the order of the arms."""
    return [cell for arm in settings.arms for cell in list_cells(plan_arm(arm, settings, own, ended).rungs)]


def count_planned(settings: Settings, own: float, ended: Ended) -> int:
    """Return the number of cells of the whole comparison, if no grid is widened any further."""
    return sum(plan_arm(arm, settings, own, ended).least for arm in settings.arms)


def find_best_rates(settings: Settings, own: float, ended: Ended) -> dict[str, float]:
    """Return the best rate of each arm that has one so far."""
    found = {arm: plan_arm(arm, settings, own, ended).best for arm in settings.arms}
    return {arm: rate for arm, rate in found.items() if rate is not None}


def describe_edges(settings: Settings, own: float, ended: Ended) -> list[str]:
    """Return a sentence for each arm whose best rate lies at the edge of those tried."""
    sentences = []
    for arm in settings.arms:
        course = plan_arm(arm, settings, own, ended)
        if course.edge is not None and course.best is not None:
            better = "lower" if course.edge == "lowest" else "higher"
            sentences.append(
                f"{EDGE} {arm}, {course.best:g}, is the {course.edge} that was tried, so a {better} one may "
                "be better still."
            )
    return sentences


# --- The time ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """The seconds that a cell takes: ``start`` once, and ``step`` for each optimizer step with its evaluations."""

    start: float
    step: float

    def find_seconds(self, steps: int) -> float:
        """Return the seconds of a cell of ``steps``."""
        return self.start + self.step * steps


# The cost of a cell of each arm that has been timed.
Costs = Mapping[str, Cost]


def find_cost(arm: str, costs: Costs) -> Cost:
    """Return the cost of an arm's cells, or the mean over the other arms until one of its own has been timed."""
    if arm in costs:
        return costs[arm]
    return Cost(start=fmean(cost.start for cost in costs.values()), step=fmean(cost.step for cost in costs.values()))


def estimate(settings: Settings, own: float, ended: Ended, costs: Costs) -> float:
    """Return the seconds that the cells take that have not ended, if no grid is widened any further.

    ``costs``: of at least one arm.
    """
    seconds = 0.0
    for arm in settings.arms:
        course, cost = plan_arm(arm, settings, own, ended), find_cost(arm, costs)
        known = list_cells(course.rungs)
        seconds += sum(cost.find_seconds(cell.steps) for cell in known if cell not in ended)
        seconds += (course.least - len(known)) * cost.find_seconds(settings.steps)
    return seconds


def fit(settings: Settings, own: float, costs: Costs, limit: float) -> Settings:
    """Return settings whose cells fit into ``limit`` seconds: with fewer seeds, then rates, then steps.

    The rates in between go before those of the grid do.

    Raises:
        LayerselError: if not even the smallest comparison fits; it says which time would do.
    """

    def fits(candidate: Settings) -> bool:
        return estimate(candidate, own, {}, costs) <= limit

    def shrink(number: int, least: int, change: Callable[[Settings, int], Settings]) -> Settings | None:
        nonlocal settings
        for smaller in range(number, least - 1, -1):
            settings = change(settings, smaller)
            if fits(settings):
                return settings
        return None

    nearest = order_rates(settings.rates, own)
    found = (
        shrink(len(settings.seeds), FEWEST_SEEDS, lambda s, n: s.model_copy(update={"seeds": s.seeds[:n]}))
        or shrink(int(settings.refine), 0, lambda s, n: s.model_copy(update={"refine": bool(n)}))
        or shrink(len(nearest), FEWEST_RATES, lambda s, n: s.model_copy(update={"rates": sorted(nearest[:n])}))
        or shrink(settings.steps, FEWEST_STEPS, lambda s, n: s.model_copy(update={"steps": n}))
    )
    if found is not None:
        return found
    if fits(settings):
        return settings
    needed = estimate(settings, own, {}, costs)
    raise LayerselError(
        f"--time-limit: {format_duration(limit)} is too short: {len(settings.arms)} arms at {len(settings.rates)} "
        f"rates and {len(settings.seeds)} seeds, with {settings.steps} steps each, take about "
        f"{format_duration(needed)}. "
        f"Allow {format_minutes(needed)}, or compare fewer arms."
    )


def format_minutes(seconds: float) -> str:
    """Return a duration as ``--time-limit`` takes it, rounded up to whole minutes."""
    return f"{math.ceil(seconds / 60)}m"


def measure_cost(steps: int, wall: float, training: float) -> Cost:
    """Return the cost of a cell from one that took ``wall`` seconds, of which it trained ``training``."""
    return Cost(start=max(wall - training, 0.0), step=training / steps)


def average(cost: Cost, last: Cost) -> Cost:
    """Return the cost of an arm after its ``last`` cell, in which later cells count more."""
    return Cost(start=(cost.start + last.start) / 2, step=(cost.step + last.step) / 2)


def describe_change(before: Settings, after: Settings) -> str | None:
    """Return what a time limit has changed, as the end of a sentence; None if nothing."""
    parts = []
    for what in ("seeds", "rates"):
        old, new = len(getattr(before, what)), len(getattr(after, what))
        if new < old:
            parts.append(f"{new} {what} instead of {old}")
    if before.refine and not after.refine:
        parts.append("no rates between those of the grid")
    if after.steps < before.steps:
        parts.append(f"{after.steps} steps instead of {before.steps}")
    return ", ".join(parts) or None
