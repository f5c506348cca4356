"""The order of the cells of a comparison, and what a time limit leaves of them."""

import itertools
import math

import pytest
from helpers.compared import make_settings

from axolotl_layersel.cli.compare import schedule
from axolotl_layersel.cli.compare.cells import Cell
from axolotl_layersel.cli.compare.schedule import Cost
from axolotl_layersel.common.errors import LayerselError

OWN = 2e-4


def bowl(best: float):
    """Return a validation loss that is lowest at a rate."""
    return lambda cell: abs(math.log(cell.rate / best)) + 1 / cell.steps


def finish(settings, find_loss, ended=None) -> list[Cell]:
    """Return the cells in the order in which they run, and fill ``ended``."""
    ended = {} if ended is None else ended
    order = []
    while (cell := schedule.plan_next(settings, OWN, ended)) is not None:
        ended[cell] = find_loss(cell)
        order.append(cell)
    return order


def test_the_first_run_is_plain_lora_at_the_rate_of_the_file_and_arms_take_turns():
    order = finish(make_settings(), bowl(OWN))
    assert [cell.arm for cell in order[:10]] == ["lora", "random"] * 5
    assert order[0] == Cell("lora", OWN, 42, 50)
    assert {cell.steps for cell in order[:10]} == {50}


def test_the_better_rates_are_trained_in_full_and_the_other_seeds_follow_at_the_best():
    ended = {}
    order = finish(make_settings(), bowl(OWN), ended)
    lora = [cell for cell in order if cell.arm == "lora"]
    assert [cell.rate for cell in lora if cell.steps == 50] == [2e-4, 1e-4, 4e-4, 5e-5, 8e-4]
    assert [cell.rate for cell in lora if cell.steps == 100 and cell.seed == 42] == [2e-4, 1e-4, 1.414e-4, 2.828e-4]
    assert [cell.seed for cell in lora if cell.seed != 42] == [43, 44]
    assert {cell.rate for cell in lora if cell.seed != 42} == {2e-4}
    assert schedule.find_best_rates(make_settings(), OWN, ended) == {"lora": 2e-4, "random": 2e-4}
    assert schedule.describe_edges(make_settings(), OWN, ended) == []


def test_the_grid_is_widened_while_the_best_rate_lies_at_its_edge():
    ended = {}
    settings = make_settings(["lora"])
    order = finish(settings, bowl(3.2e-3), ended)
    added = [cell for cell in order if cell.rate not in settings.rates]
    assert [cell.rate for cell in added if cell.seed == 42] == [1.6e-3, 3.2e-3, 6.4e-3, 2.263e-3, 4.525e-3]
    assert {cell.steps for cell in added} == {100}
    assert schedule.find_best_rates(settings, OWN, ended) == {"lora": 3.2e-3}
    assert not schedule.describe_edges(settings, OWN, ended)


@pytest.mark.parametrize(("best", "edge", "last"), [(1.0, "highest", 6.4e-3), (1e-9, "lowest", 6.25e-6)])
def test_after_three_rates_outside_the_grid_it_is_said_that_the_edge_is_the_best(best, edge, last):
    ended = {}
    settings = make_settings(["lora"])
    finish(settings, bowl(best), ended)
    assert schedule.find_best_rates(settings, OWN, ended) == {"lora": last}
    (sentence,) = schedule.describe_edges(settings, OWN, ended)
    assert sentence.startswith(f"The best rate of lora, {last:g}, is the {edge} that was tried")


@pytest.mark.parametrize("best", [1.414e-4, 2.828e-4, 5.6e-4])
def test_rates_halfway_to_the_neighbours_of_the_best_one_are_tried(best):
    settings, ended = make_settings(["lora"]), {}
    order = finish(settings, bowl(best), ended)
    added = [cell for cell in order if cell.rate not in settings.rates]
    assert len({cell.rate for cell in added}) == 2
    (found,) = schedule.find_best_rates(settings, OWN, ended).values()
    assert found == pytest.approx(best, rel=0.02) and found not in settings.rates
    assert {cell.seed for cell in added if cell.rate == found} == {42, 43, 44}
    coarse, ended = make_settings(["lora"], refine=False), {}
    assert {cell.rate for cell in finish(coarse, bowl(best), ended)} == set(settings.rates)
    assert schedule.count_planned(coarse, OWN, ended) == len(ended)


def test_rates_that_are_close_and_a_single_one_have_none_in_between():
    for rates in ([1.5e-4, 2e-4, 2.7e-4], [2e-4]):
        settings = make_settings(["lora"], rates=rates, widen=0)
        planned = schedule.count_planned(settings, OWN, {})
        order = finish(settings, bowl(OWN))
        assert {cell.rate for cell in order} == set(rates) and len(order) == planned


def test_without_halving_every_rate_is_trained_in_full_with_every_seed():
    settings = make_settings(["lora"], halving=False, rates=[1e-4, 2e-4, 4e-4])
    order = finish(settings, bowl(OWN))
    rates = [*settings.rates, 1.414e-4, 2.828e-4]
    assert {(cell.rate, cell.seed) for cell in order} == set(itertools.product(rates, settings.seeds))
    assert {cell.steps for cell in order} == {100}


def test_without_halving_the_mean_over_seeds_decides():
    settings = make_settings(["lora"], halving=False, rates=[1e-4, 2e-4, 4e-4], seeds=[1, 2])
    losses = {(2e-4, 1): 1.0, (2e-4, 2): 3.0, (1e-4, 1): 1.5, (1e-4, 2): 1.6}
    ended = {}
    finish(settings, lambda cell: losses.get((cell.rate, cell.seed), 9.0), ended)
    assert schedule.find_best_rates(settings, OWN, ended)["lora"] != 2e-4


def test_failed_runs_leave_the_choice_to_the_others():
    ended = {}
    settings = make_settings()
    find = bowl(OWN)
    finish(settings, lambda cell: None if cell.arm == "random" or cell.rate == OWN else find(cell), ended)
    assert schedule.find_best_rates(settings, OWN, ended) == {"lora": 1.414e-4}
    assert sum(cell.arm == "random" for cell in ended) == 5, "no rate of it can be trained in full"
    assert schedule.count_planned(settings, OWN, ended) == len(ended)


def test_a_second_start_goes_on_wherever_the_first_one_stopped():
    settings, whole = make_settings(["lora", "random", "cka"]), {}
    order = finish(settings, bowl(8e-4), whole)
    for stopped in range(len(order)):
        ended = {cell: whole[cell] for cell in order[:stopped]}
        assert finish(settings, bowl(8e-4), ended) == order[stopped:]
        assert ended == whole


def test_the_number_of_runs_is_known_before_any_has_ended_unless_a_grid_is_widened():
    settings, ended = make_settings(), {}
    assert schedule.count_planned(settings, OWN, ended) == 2 * (5 + 2 + 2 + 2)
    assert len(finish(settings, bowl(OWN), ended)) == 22
    assert schedule.count_planned(settings, OWN, ended) == 22


def test_the_time_left_is_that_of_the_runs_that_have_not_ended():
    settings, ended, costs = make_settings(["lora"]), {}, {"lora": Cost(start=10, step=0.1)}
    whole = 5 * 15 + 6 * 20
    assert schedule.estimate(settings, OWN, ended, costs) == pytest.approx(whole)
    ended[schedule.plan_next(settings, OWN, ended)] = 1.0
    assert schedule.estimate(settings, OWN, ended, costs) == pytest.approx(whole - 15)
    finish(settings, bowl(OWN), ended)
    assert schedule.estimate(settings, OWN, ended, costs) == 0


def test_a_slow_arm_takes_its_own_time_and_an_arm_that_has_not_run_takes_the_mean():
    settings = make_settings(["lora", "flexora", "random"], halving=False, rates=[OWN], seeds=[42], widen=0)
    costs = {"lora": Cost(start=10, step=0.1)}
    assert schedule.estimate(settings, OWN, {}, costs) == pytest.approx(3 * 20)
    costs["flexora"] = Cost(start=100, step=0.3)
    assert schedule.estimate(settings, OWN, {}, costs) == pytest.approx(20 + 130 + 75)


@pytest.mark.parametrize(
    ("limit", "seeds", "refine", "rates", "steps"),
    [
        (10_000, 3, True, 5, 100),
        (180, 2, True, 5, 100),
        (150, 2, False, 5, 100),
        (125, 2, False, 4, 100),
        (105, 2, False, 3, 100),
        (80, 2, False, 3, 44),
    ],
)
def test_a_time_limit_takes_seeds_then_rates_then_steps(limit, seeds, refine, rates, steps):
    settings, costs = make_settings(["lora"]), {"lora": Cost(start=10, step=0.1)}
    fitted = schedule.fit(settings, OWN, costs, limit)
    assert (len(fitted.seeds), fitted.refine, len(fitted.rates), fitted.steps) == (seeds, refine, rates, steps)
    assert OWN in fitted.rates and fitted.rates == sorted(fitted.rates)
    assert schedule.estimate(fitted, OWN, {}, costs) <= limit
    change = schedule.describe_change(settings, fitted)
    assert (change is None) == (fitted == settings)
    assert ("no rates between those of the grid" in (change or "")) != fitted.refine


def test_a_time_limit_that_nothing_fits_into_says_what_would():
    with pytest.raises(LayerselError, match=r"--time-limit: 5 s is too short: 1 arms at 3 rates.*Allow 2m, or compare"):
        schedule.fit(make_settings(["lora"]), OWN, {"lora": Cost(start=10, step=0.1)}, 5)


def test_rates_are_a_factor_of_two_apart_around_that_of_the_file():
    assert schedule.spread_rates(3e-4) == [7.5e-5, 1.5e-4, 3e-4, 6e-4, 1.2e-3]
    assert schedule.measure_cost(50, wall=30, training=20) == Cost(start=10, step=0.4)
