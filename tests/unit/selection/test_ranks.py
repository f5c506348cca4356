"""From scores, costs and a budget to ranks."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.selection import SelectionConfig
from axolotl_layersel.selection.ranks import fill_evenly, find_budget, match_budget, share_by_score, spend_by_gain

UNITS = st.integers(1, 8).flatmap(
    lambda count: st.tuples(
        st.lists(st.lists(st.floats(0, 10), min_size=1, max_size=6), min_size=count, max_size=count),
        st.lists(st.integers(1, 50), min_size=count, max_size=count),
    )
)


def name(values):
    return {f"unit{i}": value for i, value in enumerate(values)}


def spent(ranks, costs):
    return sum(rank * costs[unit] for unit, rank in ranks.items())


@given(UNITS, st.integers(50, 3000), st.integers(1, 6))
def test_gains_are_spent_within_the_budget_and_the_highest_rank(units, budget, most):
    gains, costs = name(units[0]), name(units[1])
    ranks = spend_by_gain(gains, costs, budget, 0, most)
    assert spent(ranks, costs) <= budget
    assert all(0 <= rank <= most for rank in ranks.values())


@given(UNITS, st.integers(50, 3000), st.integers(0, 500))
def test_a_larger_budget_takes_no_rank_away(units, budget, more):
    gains, costs = name(units[0]), name(units[1])
    small, large = (spend_by_gain(gains, costs, size, 0, 6) for size in (budget, budget + more))
    assert all(large[unit] >= rank for unit, rank in small.items())


@given(UNITS, st.integers(50, 3000), st.randoms())
def test_the_order_of_the_units_changes_nothing(units, budget, random):
    gains, costs = name(units[0]), name(units[1])
    order = list(gains)
    random.shuffle(order)
    shuffled = spend_by_gain({unit: gains[unit] for unit in order}, costs, budget, 0, 6)
    assert shuffled == spend_by_gain(gains, costs, budget, 0, 6)


@given(UNITS, st.integers(50, 3000))
def test_no_exchange_of_one_component_for_another_gains_more(units, budget):
    gains, costs = name([sorted(values, reverse=True) for values in units[0]]), name([7] * len(units[0]))
    ranks = spend_by_gain(gains, costs, budget, 0, 6)
    taken = [gain for unit, values in gains.items() for gain in values[: ranks[unit]]]
    left = [gain for unit, values in gains.items() for gain in values[ranks[unit] :]]
    assert min(taken, default=10) >= max(left, default=0) or not taken


@given(UNITS, st.integers(50, 3000), st.integers(0, 500), st.integers(1, 6), st.randoms())
def test_what_no_gain_asks_for_is_filled_up_from_the_lowest_rank(units, budget, more, most, random):
    costs = name(units[1])
    by_gain = spend_by_gain(name(units[0]), costs, budget, 0, most)
    ranks = fill_evenly(by_gain, costs, budget, most)
    assert spent(ranks, costs) <= budget and max(ranks.values()) <= most
    assert all(ranks[unit] >= rank for unit, rank in by_gain.items())
    raised = [rank for unit, rank in ranks.items() if rank > by_gain[unit]]
    assert max(raised, default=0) <= min(ranks.values()) + 1
    lowest = [unit for unit in ranks if ranks[unit] == min(ranks.values())]
    assert ranks[lowest[0]] == most or max(costs[unit] for unit in lowest) > budget - spent(ranks, costs)
    order = list(costs)
    random.shuffle(order)
    assert (
        fill_evenly({unit: by_gain[unit] for unit in order}, {unit: costs[unit] for unit in order}, budget, most)
        == ranks
    )
    larger = fill_evenly(by_gain, costs, budget + more, most)
    assert all(larger[unit] >= rank for unit, rank in ranks.items())


def test_where_all_is_noise_ranks_are_those_of_lora():
    costs = {"a": 10, "b": 30, "c": 20}
    assert fill_evenly(dict.fromkeys(costs, 0), costs, 8 * 60, 64) == dict.fromkeys(costs, 8)


def test_what_gains_nothing_gets_nothing_and_the_floor_comes_first():
    gains, costs = {"a": [3.0, 0.0, 2.0], "b": [0.0], "c": [1.0, 1.0]}, {"a": 10, "b": 10, "c": 10}
    assert spend_by_gain(gains, costs, 1000, 0, 8) == {"a": 1, "b": 0, "c": 2}
    assert spend_by_gain(gains, costs, 1000, 1, 8) == {"a": 1, "b": 1, "c": 2}
    with pytest.raises(LayerselError, match="budget: 29 parameters do not pay for rank 1 in all units, which takes 30"):
        spend_by_gain(gains, costs, 29, 1, 8)


def test_gain_is_weighed_against_what_a_rank_costs():
    gains, costs = {"wide": [3.0, 3.0], "narrow": [2.0, 2.0]}, {"wide": 100, "narrow": 10}
    assert spend_by_gain(gains, costs, 120, 0, 8) == {"wide": 1, "narrow": 2}
    assert spend_by_gain(gains, costs, 110, 0, 8) == {"wide": 0, "narrow": 2}


@given(st.lists(st.floats(0, 5), min_size=1, max_size=8), st.data(), st.integers(0, 2))
def test_shares_stay_within_budget_floor_and_cap(values, data, least):
    costs = name(data.draw(st.lists(st.integers(1, 20), min_size=len(values), max_size=len(values))))
    budget = data.draw(st.integers(max(least, 1) * sum(costs.values()), 2000))
    if not any(values):
        with pytest.raises(LayerselError, match="needs scores above zero"):
            share_by_score(name(values), costs, budget, least, 9)
        return
    ranks = share_by_score(name(values), costs, budget, least, 9)
    assert spent(ranks, costs) <= budget
    assert all(least <= rank <= 9 for rank in ranks.values())
    order = sorted(costs, key=lambda unit: name(values)[unit])
    assert all(ranks[low] <= ranks[high] + 1 for low, high in pairwise(order))


def test_shares_are_in_proportion_and_what_is_left_goes_to_the_largest_fraction():
    ranks = share_by_score({"a": 3.0, "b": 2.0, "c": 1.0, "d": -4.0}, dict.fromkeys("abcd", 1), 12, 0, 64)
    assert ranks == {"a": 6, "b": 4, "c": 2, "d": 0}
    assert share_by_score({"a": 3.0, "b": 2.0, "c": 1.0}, dict.fromkeys("abc", 1), 10, 0, 64) == {
        "a": 5,
        "b": 3,
        "c": 2,
    }


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(1, 5000), st.integers(1, 40))
def test_one_rank_for_all_fills_the_budget_up_to_less_than_one_component(values, budget, most):
    costs = name(values)
    if budget < sum(values):
        with pytest.raises(LayerselError, match="do not pay for rank 1 in all units"):
            match_budget(costs, budget, most)
        return
    ranks = match_budget(costs, budget, most)
    assert spent(ranks, costs) <= budget and max(ranks.values()) - min(ranks.values()) <= 1
    assert max(ranks.values()) == most or budget - spent(ranks, costs) < max(values)


def test_what_is_left_of_a_budget_favours_no_end_of_the_model():
    costs = dict.fromkeys([f"layer{i:02}" for i in range(32)], 10)
    ranks = list(match_budget(costs, 320 + 8 * 10, 64).values())
    assert [sum(ranks[start : start + 8]) for start in range(0, 32, 8)] == [10, 10, 10, 10]


def test_a_budget_is_what_lora_has_a_multiple_or_a_number():
    asked = [{}, {"budget": 0.5}, {"budget": 2}, {"budget_parameters": 1234}]
    settings = [SelectionConfig(method="gradient", **keys).resolve(run_seed=0) for keys in asked]
    assert [find_budget(each, 700) for each in settings] == [700, 350, 1400, 1234]
