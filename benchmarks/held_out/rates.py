"""The learning rate of each arm: which rate is tried next, and which one is the best."""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from axolotl_layersel.cli.compare.schedule import list_between

STEP = 2.0  # factor between neighbouring rates of a widened grid

Losses = Mapping[float, Mapping[int, float]]  # validation losses, by rate and seed


def rank_loss(loss: float) -> float:
    """Return a loss by which rates are compared: infinite if the run diverged."""
    return math.inf if math.isnan(loss) else loss


def find_next_rate(
    losses: Mapping[float, float], grid: Sequence[float], widenings: int, refines: bool = False
) -> float | None:
    """Return the rate to try next, None if the best is settled.

    The rates of the grid come first. While the best rate is the highest or lowest one, the next is one factor beyond
    it, up to ``widenings`` times. With ``refines``, the rates halfway from the best one to its neighbours follow.
    """
    for rate in grid:
        if rate not in losses:
            return rate
    best = min(sorted(losses), key=lambda rate: rank_loss(losses[rate]))
    if sum(not min(grid) <= rate <= max(grid) for rate in losses) < widenings:
        if best == max(losses) and math.isfinite(rank_loss(losses[best])):
            return best * STEP
        if best == min(losses):
            return best / STEP
    between = list_between(best, losses) if refines else []
    return float(f"{between[0]:.3g}") if between else None


def choose_rate(losses: Losses) -> float:
    """Return the rate with the lowest mean loss over the seeds that were run with all rates.

    If there is no such seed, those rates count that the most tried seed was run with. If other rates were run with all
    seeds of the rate that is found so, it is the best of them over these seeds.
    """
    common = set.intersection(*(set(by_seed) for by_seed in losses.values()))
    if not common:
        tries = Counter(seed for by_seed in losses.values() for seed in by_seed)
        widest = max(sorted(tries), key=tries.__getitem__)
        return choose_rate({rate: by_seed for rate, by_seed in losses.items() if widest in by_seed})
    best = find_lowest(losses, common)
    seeds = set(losses[best])
    return find_lowest({rate: by_seed for rate, by_seed in losses.items() if seeds <= set(by_seed)}, seeds)


def find_lowest(losses: Losses, seeds: Collection[int]) -> float:
    """Return the rate with the lowest mean loss over ``seeds``."""
    means = {rate: statistics.mean(rank_loss(by_seed[seed]) for seed in seeds) for rate, by_seed in losses.items()}
    return min(means, key=means.__getitem__)


def is_at_edge(rate: float, rates: Collection[float]) -> bool:
    """Return whether a rate is the lowest or highest one that was tried, so that a better one may be beyond it."""
    return rate in (min(rates), max(rates))


def find_neighbours(rate: float, rates: Collection[float]) -> list[float]:
    """Return a rate with the next lower and the next higher one that was tried."""
    tried = sorted(rates)
    place = tried.index(rate)
    return tried[max(0, place - 1) : place + 2]


def choose_rates(runs: list[dict[str, Any]]) -> dict[tuple[str, int], float]:
    """Return the learning rate with the lowest mean validation loss for each arm and rank, see ``choose_rate``."""
    losses: dict[tuple[str, int], dict[float, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        losses[run["arm"], run["rank"]][run["rate"]][run["seed"]] = run["validation"]
    return {key: choose_rate(by_rate) for key, by_rate in losses.items()}
