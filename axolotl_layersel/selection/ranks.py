"""The rank of each unit: from scores, costs and a budget of parameters.

A unit's cost is the number of parameters that one rank takes in all of its modules.
"""

import heapq
import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.selection import check_forced, find_budget
from axolotl_layersel.lora.modules import count_component_parameters
from axolotl_layersel.selection.plan import Budget
from axolotl_layersel.selection.types import Choice, Selection
from axolotl_layersel.selection.units import Unit

LOG = logging.getLogger("axolotl.layersel")
# Scores below this share of the largest one count as zero: they could not get any rank.
NEGLIGIBLE = 1e-9
NO_LIMIT = 2**63
# Its multiples modulo 1 are spread evenly, whatever their number (Weyl's sequence).
GOLDEN_RATIO = (5**0.5 - 1) / 2


def allocate_ranks(selection: Selection, choice: Choice) -> tuple[dict[str, int], Budget | None]:
    """Return the rank of every module that keeps LoRA, and their budget; nothing if all have ``lora_r``.

    Raises:
        LayerselError: if the budget pays for no rank, or there are no scores to give ranks by.
    """
    settings = selection.settings
    if settings.rank_allocation == "same":
        return {}, None
    kept = set(choice.modules)
    units = [unit for unit in selection.units if kept.issuperset(unit.modules)]
    prices = find_prices(selection)
    lora = selection.lora_r * sum(prices.values())
    budget = find_budget(settings, lora)
    costs = {unit.name: prices[unit.name] for unit in units}
    ranks, even = decide_ranks(selection, choice, units, costs, budget)
    if even > budget / 2:
        LOG.warning(
            "layersel: %d %% of the budget is given to all %ss alike, because method %s finds no gain there that is "
            "more than noise. Use more `num_samples` to tell them apart.",
            100 * even // budget,
            settings.granularity,
            settings.method,
        )
    if not any(ranks.values()):
        raise LayerselError(
            f"layersel.selection.budget: {budget:,} parameters do not pay for rank 1 in the {settings.granularity} "
            "with the most to gain. Raise budget."
        )
    by_module = {name: ranks[unit.name] for unit in units for name in unit.modules if ranks[unit.name]}
    spent = find_cost(ranks, costs)
    return by_module, Budget(lora=lora, lora_r=selection.lora_r, allowed=budget, spent=spent, even=even)


def decide_ranks(
    selection: Selection, choice: Choice, units: list[Unit], costs: Mapping[str, int], budget: int
) -> tuple[dict[str, int], int]:
    """Return the rank of each unit that is kept, and the parameters that no gain above noise asked for."""
    least, most = selection.settings.min_rank or 0, selection.highest_rank
    if selection.settings.rank_allocation == "match":
        return match_budget(costs, budget, most), 0
    if not choice.gains:
        return share_by_score({unit.name: get_score(choice, unit) for unit in units}, costs, budget, least, most), 0
    gains = {unit.name: choice.gains[unit.name] for unit in units}
    ranks = spend_by_gain(gains, costs, budget, least, most)
    if ranks != spend_by_gain(gains, costs, NO_LIMIT, least, most):
        return ranks, 0
    # Every gain above noise is bought, and some of the budget may be left.
    filled = fill_evenly(ranks, costs, budget, most)
    return filled, find_cost(filled, costs) - find_cost(ranks, costs)


def find_prices(selection: Selection) -> dict[str, int]:
    """Return the parameters of one rank of each unit that may be chosen, by unit name."""
    lora_modules, adapter = selection.run.lora_modules, selection.run.adapter
    return {
        unit.name: sum(count_component_parameters(lora_modules[name], adapter) for name in unit.modules)
        for unit in selection.units
    }


def check_spread(selection: Selection) -> None:
    """Raise LayerselError if all units are kept and the budget leaves nothing for scores to decide."""
    settings, prices = selection.settings, find_prices(selection)
    total, least = sum(prices.values()), settings.min_rank or 0
    budget = find_budget(settings, selection.lora_r * total)
    check_floor(prices, budget, least)
    check_forced(selection.method, budget / total, least, selection.highest_rank, min(prices.values()) / total)


def get_score(choice: Choice, unit: Unit) -> float:
    """Return the score of a unit that is kept."""
    score = choice.module_scores[unit.modules[0]] if choice.module_scores else choice.scores[unit.layer]
    assert score is not None, "units that are kept are scored"
    return score


def spend_by_gain(
    gains: Mapping[str, Sequence[float]], costs: Mapping[str, int], budget: int, least: int, most: int
) -> dict[str, int]:
    """Return the ranks that gain most: components are bought by gain per parameter until one is too expensive.

    A component without gain is never bought, so some of the budget may be left, see ``fill_evenly``. A larger budget
    buys all components that a smaller one buys.

    Args:
        gains: of the 1st, 2nd, … rank of each unit. A gain above the one before it counts as that one, because it
            cannot be had without it.
        costs: the parameters of one rank of each unit.
        budget: in parameters.
        least: the rank that every unit gets first.
        most: the highest rank.

    Raises:
        LayerselError: if the budget does not pay for ``least``.
    """
    check_floor(costs, budget, least)
    offers = []
    for unit, values in gains.items():
        for index, gain in enumerate(itertools.accumulate(values[:most], min)):
            if index >= least and gain > 0:
                offers.append((-gain / costs[unit], index, unit))
    ranks = dict.fromkeys(gains, least)
    left = budget - least * sum(costs.values())
    for _, _, unit in sorted(offers):
        left -= costs[unit]
        if left < 0:
            break
        ranks[unit] += 1
    return ranks


def fill_evenly(ranks: Mapping[str, int], costs: Mapping[str, int], budget: int, most: int) -> dict[str, int]:
    """Return ``ranks`` with the rest of the budget spent: the lowest one is raised until the next is too expensive.

    No gain above noise is known for these components, so all of them count alike. Arguments as in ``spend_by_gain``.
    """
    filled = dict(ranks)
    left = budget - find_cost(ranks, costs)
    lowest = [(filled[unit], place, unit) for place, unit in enumerate(spread_evenly(costs))]
    heapq.heapify(lowest)
    while lowest[0][0] < most and costs[lowest[0][2]] <= left:
        rank, place, unit = lowest[0]
        left -= costs[unit]
        filled[unit] = rank + 1
        heapq.heapreplace(lowest, (rank + 1, place, unit))
    return filled


def spread_evenly(units: Iterable[str]) -> list[str]:
    """Return units, sorted by name, in an order whose beginnings are all spread evenly over them."""
    return [unit for _, unit in sorted((index * GOLDEN_RATIO % 1, unit) for index, unit in enumerate(sorted(units)))]


def share_by_score(
    scores: Mapping[str, float], costs: Mapping[str, int], budget: int, least: int, most: int
) -> dict[str, int]:
    """Return ranks in proportion to scores, between ``least`` and ``most``, as far as the budget goes.

    Ranks are rounded by largest remainder: each unit gets its share rounded down, and the rest of the budget goes to
    the largest fractions that it pays for. Scores below zero count as zero. Arguments as in ``spend_by_gain``.

    Raises:
        LayerselError: if the budget does not pay for ``least``, or no score is above zero.
    """
    check_floor(costs, budget, least)
    largest = max(scores.values())
    if largest <= 0:
        raise LayerselError(
            "layersel.selection.rank_allocation: 'score' needs scores above zero, and there are none. Use "
            "`rank_allocation: match`."
        )
    shares_of_largest = {unit: score / largest for unit, score in scores.items()}
    positive = {unit: share if share > NEGLIGIBLE else 0.0 for unit, share in shares_of_largest.items()}

    def share(factor: float) -> dict[str, float]:
        return {unit: min(max(factor * score, least), most) for unit, score in positive.items()}

    def spend(shares: Mapping[str, float]) -> float:
        return sum(shares[unit] * costs[unit] for unit in shares)

    low, high = 0.0, most / min(score for score in positive.values() if score > 0)
    if spend(share(high)) > budget:
        for _ in range(200):  # until both are neighbouring floats
            middle = (low + high) / 2
            low, high = (middle, high) if spend(share(middle)) <= budget else (low, middle)
        high = low
    shares = share(high)
    ranks = {unit: int(value + 1e-9) for unit, value in shares.items()}
    left = budget - find_cost(ranks, costs)
    for unit in sorted(shares, key=lambda unit: (ranks[unit] - shares[unit], unit)):
        if shares[unit] - ranks[unit] > 1e-9 and costs[unit] <= left:
            ranks[unit] += 1
            left -= costs[unit]
    return ranks


def match_budget(costs: Mapping[str, int], budget: int, most: int) -> dict[str, int]:
    """Return the highest rank that the budget pays for in all units, and one more in some units for the rest.

    These are spread evenly over all units, so that no end of the model is favoured.

    Raises:
        LayerselError: if the budget pays for less than rank 1.
    """
    check_floor(costs, budget, 1)
    rank = min(budget // sum(costs.values()), most)
    ranks = dict.fromkeys(costs, rank)
    left = budget - rank * sum(costs.values())
    for unit in spread_evenly(costs):
        left -= costs[unit]
        if left < 0 or rank == most:
            break
        ranks[unit] += 1
    return ranks


def find_cost(ranks: Mapping[str, int], costs: Mapping[str, int]) -> int:
    """Return the number of parameters of ``ranks``."""
    return sum(rank * costs[unit] for unit, rank in ranks.items())


def check_floor(costs: Mapping[str, int], budget: int, least: int) -> None:
    """Raise LayerselError unless the budget pays for rank ``least`` in every unit."""
    needed = least * sum(costs.values())
    if budget < max(needed, min(costs.values())):
        raise LayerselError(
            f"layersel.selection.budget: {budget:,} parameters do not pay for rank {max(least, 1)} in "
            f"{'all units' if least else 'a single one'}, which takes {max(needed, min(costs.values())):,}. Raise "
            "budget, or keep fewer units."
        )
