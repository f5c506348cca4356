"""The statistics of a comparison: intervals that hold as often as they say, and claims that are seldom wrong."""

import csv
import random
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t, ttest_rel

from axolotl_layersel.cli.compare.figures import LORA, RANDOM, CurvePoint
from axolotl_layersel.cli.compare.statistics import (
    BETTER,
    CHANCE,
    OPEN,
    UNCONTROLLED,
    UNKNOWN,
    WORSE,
    Noise,
    differ,
    find_best,
    find_loss_at,
    find_quantile,
    judge,
    pool,
)

RESULTS = Path(__file__).parents[4] / "benchmarks" / "results"
ARMS = ["lora", "a", "b", "c"]
TRIALS = 1000
# Three standard errors of a share of 95 % in so many trials, and of 5 %.
ERROR = 3 * (0.95 * 0.05 / TRIALS) ** 0.5


def draw_losses(stream, arms, seeds, drawn=1.0):
    """Return losses without any difference between arms: an effect of the seed, and noise."""
    effects = [stream.gauss(2, 1) for _ in range(seeds)]
    return {
        arm: {
            seed: effect + stream.gauss(0, 0.01 * (drawn if arm == RANDOM else 1))
            for seed, effect in enumerate(effects)
        }
        for arm in arms
    }


# --- Formulas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("freedom", "comparisons"), [(1, 1), (2, 4), (8, 4), (2.3, 1)])
def test_quantiles_are_students(freedom, comparisons):
    assert find_quantile(freedom, comparisons) == pytest.approx(t.ppf(1 - 0.025 / comparisons, freedom))


def test_two_arms_are_compared_as_by_the_paired_test():
    losses = {"lora": {0: 2.1, 1: 2.3, 2: 2.25, 3: 2.0}, "a": {0: 2.05, 1: 2.28, 2: 2.21, 3: 1.99}}
    difference = differ(Noise(losses, ()), "a", LORA)
    expected = ttest_rel(list(losses["a"].values()), list(losses["lora"].values())).confidence_interval(0.95)
    assert (difference.interval.low, difference.interval.high) == pytest.approx(tuple(expected))
    assert difference.pairs == 4
    assert difference.reference == pytest.approx(fmean(losses["lora"].values()))


def test_the_variance_is_that_of_the_residuals_of_arms_and_seeds():
    losses = draw_losses(random.Random(0), ARMS, 3)
    means = {arm: fmean(losses[arm].values()) for arm in ARMS}
    columns = [fmean(losses[arm][seed] for arm in ARMS) for seed in range(3)]
    grand = fmean(columns)
    squares = sum((losses[arm][s] - means[arm] - columns[s] + grand) ** 2 for arm in ARMS for s in range(3))
    spread = pool(losses)
    assert spread.freedom == 6
    assert spread.variance == pytest.approx(squares / 6)


@given(st.floats(-100, 100), st.lists(st.floats(-5, 5), min_size=3, max_size=3))
def test_neither_the_level_of_the_losses_nor_effects_of_seeds_change_a_difference(level, effects):
    losses = draw_losses(random.Random(1), [*ARMS, RANDOM], 3, drawn=4)
    moved = {arm: {s: loss + level + effects[s] for s, loss in by_seed.items()} for arm, by_seed in losses.items()}
    for arm in ("a", RANDOM):
        before, after = differ(Noise(losses, (RANDOM,)), arm, LORA, 4), differ(Noise(moved, (RANDOM,)), arm, LORA, 4)
        for one, other in ((before.interval, after.interval), (before.claim, after.claim)):
            assert (one.low, one.high) == pytest.approx((other.low, other.high), abs=1e-9)


def test_two_drawn_arms_have_the_variances_of_both():
    losses = draw_losses(random.Random(2), [*ARMS, RANDOM, "mine"], 3, drawn=5)
    noise = Noise(losses, (RANDOM, "mine"))
    spread = noise.find_spread("mine", RANDOM)
    assert spread.variance == pytest.approx(sum(noise.find_own_spread(arm)[0].variance for arm in (RANDOM, "mine")))


def test_drawing_layers_never_lessens_the_variance():
    losses = draw_losses(random.Random(3), ARMS, 3)
    losses[RANDOM] = {seed: fmean(losses[arm][seed] for arm in ARMS) for seed in range(3)}
    noise = Noise(losses, (RANDOM,))
    assert noise.find_own_spread(RANDOM)[0].variance == pytest.approx(noise.steady.variance * 1.25)


def test_identical_runs_have_an_interval_without_width():
    losses = {arm: {0: 2.0, 1: 3.0} for arm in ("lora", "a", RANDOM)}
    judgements = judge(losses)
    assert {each.standing for each in judgements.values()} == {OPEN}
    assert judgements["a"].to_lora.claim.high == pytest.approx(0, abs=1e-12)


# --- Coverage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_an_interval_holds_in_95_of_100_comparisons(seeds):
    stream = random.Random(seeds)
    held = together = 0
    for _ in range(TRIALS):
        noise = Noise(draw_losses(stream, ARMS, seeds), ())
        differences = [differ(noise, arm, LORA, 3) for arm in ARMS[1:]]
        held += differences[0].interval.low <= 0 <= differences[0].interval.high
        together += all(each.claim.low <= 0 <= each.claim.high for each in differences)
    assert held / TRIALS == pytest.approx(0.95, abs=ERROR)
    assert together / TRIALS > 0.95 - ERROR


# By the approximation of Welch and Satterthwaite, and because a variance of one degree of freedom is hardly known.
@pytest.mark.parametrize(("seeds", "drawn", "low"), [(2, 1, 0.95), (2, 5, 0.93), (3, 5, 0.935), (5, 5, 0.945)])
def test_the_interval_to_a_random_choice_holds_about_as_often(seeds, drawn, low):
    stream = random.Random(10 * seeds + drawn)
    held = 0
    for _ in range(TRIALS):
        noise = Noise(draw_losses(stream, [*ARMS, RANDOM], seeds, drawn), (RANDOM,))
        interval = differ(noise, "a", RANDOM).interval
        held += interval.low <= 0 <= interval.high
    assert held / TRIALS > low - ERROR


@pytest.mark.parametrize(("seeds", "drawn"), [(2, 5), (3, 1), (5, 5)])
def test_an_arm_is_seldom_recommended_where_nothing_is_better(seeds, drawn):
    stream = random.Random(100 * seeds + drawn)
    wrong = 0
    for _ in range(TRIALS):
        losses = draw_losses(stream, [*ARMS, RANDOM], seeds, drawn)
        wrong += find_best(judge(losses)) != LORA
    assert wrong / TRIALS < 0.05 + ERROR


def test_a_missing_cell_keeps_the_interval():
    stream = random.Random(7)
    held = 0
    for _ in range(TRIALS):
        losses = draw_losses(stream, ARMS, 3)
        del losses["a"][1]
        interval = differ(Noise(losses, ()), "a", LORA).interval
        held += interval.low <= 0 <= interval.high
    assert held / TRIALS == pytest.approx(0.95, abs=ERROR + 0.01)


# --- Decision ---------------------------------------------------------------------------------------------------------

losses_of = st.dictionaries(
    st.sampled_from(["lora", "a", "b", RANDOM]),
    st.dictionaries(st.integers(0, 4), st.floats(1, 3), max_size=5),
    min_size=1,
)


@given(losses_of, st.sets(st.sampled_from(["a", "b"])))
def test_a_recommended_arm_is_below_lora_by_its_whole_interval(losses, choosing):
    judgements = judge(losses, choosing)
    best = find_best(judgements)
    if best != LORA:
        assert judgements[best].to_lora.claim.high < 0
    for arm, each in judgements.items():
        assert (each.to_lora is None) == (not losses[arm].keys() & losses.get(LORA, {}).keys())
        assert each.to_lora is None or each.to_lora.pairs > 1 or each.to_lora.interval is None


@given(losses_of, st.randoms())
def test_the_order_of_cells_does_not_matter(losses, stream):
    def shuffle(content):
        items = list(content.items())
        stream.shuffle(items)
        return dict(items)

    other = judge(shuffle({arm: shuffle(by_seed) for arm, by_seed in losses.items()}))
    for arm, each in judge(losses).items():
        assert (each.to_lora is None) == (other[arm].to_lora is None)
        if each.to_lora is not None:
            assert each.to_lora.mean == pytest.approx(other[arm].to_lora.mean, abs=1e-12)
            assert (each.to_lora.interval is None) == (other[arm].to_lora.interval is None)


def test_a_random_choice_that_scatters_does_not_hide_a_gain():
    # Five seeds of benchmarks/planted_compare.py; two draws of `random` have the damaged layers.
    losses = {
        "lora": [1.00, 1.01, 1.02, 1.00, 1.03],
        "gradient": [0.82, 0.85, 0.87, 0.84, 0.84],
        RANDOM: [0.83, 1.37, 1.62, 0.88, 1.60],
    }
    judgements = judge({arm: dict(enumerate(each)) for arm, each in losses.items()}, ["gradient"])
    assert judgements["gradient"].standing == CHANCE
    assert find_best(judgements) == "gradient"


@given(st.integers(0, 10_000), st.integers(2, 5), st.floats(0.2, 1))
def test_a_planted_difference_is_found(start, seeds, gain):
    losses = draw_losses(random.Random(start), [*ARMS, RANDOM], seeds)
    losses["b"] = {seed: loss - 10 * gain for seed, loss in losses["b"].items()}
    losses["c"] = {seed: loss + 10 * gain for seed, loss in losses["c"].items()}
    judgements = judge(losses, ["a", "b", "c"])
    assert find_best(judgements) == "b"
    assert judgements["c"].standing == WORSE


@pytest.mark.parametrize(
    ("changes", "choosing", "standing"),
    [
        ({"a": -1.0}, [], BETTER),
        ({"a": -1.0}, ["a"], BETTER),
        ({"a": -1.0, RANDOM: -1.0}, ["a"], CHANCE),
        ({"a": -1.0, RANDOM: -1.0}, [], BETTER),
        ({"a": -1.0, RANDOM: None}, ["a"], UNCONTROLLED),
        ({"a": 0.0}, ["a"], OPEN),
        ({"a": 1.0}, [], WORSE),
        ({"a": None}, [], UNKNOWN),
        ({"lora": None}, [], UNKNOWN),
    ],
)
def test_standings(changes, choosing, standing):
    losses = draw_losses(random.Random(6), [*ARMS, RANDOM], 3)
    for arm, change in changes.items():
        losses[arm] = {} if change is None else {seed: loss + change for seed, loss in losses[arm].items()}
    assert judge(losses, choosing)["a"].standing == standing


def test_one_seed_allows_no_claim():
    losses = {"lora": {0: 2.0}, "a": {0: 1.0}, RANDOM: {0: 3.0}}
    judgements = judge(losses)
    assert {each.standing for each in judgements.values()} == {UNKNOWN}
    assert judgements["a"].to_lora.mean == -1
    assert find_best(judgements) == LORA


def test_arms_that_share_no_seed_are_not_compared():
    judgements = judge({"lora": {0: 2.0, 1: 2.1}, "a": {2: 1.0, 3: 1.1}})
    assert judgements["a"].to_lora is None


def read_benchmark(name, rank):
    """Return the test losses of a benchmark by arm and seed, each arm at its best learning rate."""
    cells = defaultdict(lambda: defaultdict(dict))
    with (RESULTS / f"{name}.csv").open() as file:
        for row in csv.DictReader(file):
            if row["rank"] == str(rank):
                values = float(row["validation"]), float(row["test"])
                cells[row["arm"]][row["rate"]][int(row["seed"])] = values
    losses = {}
    for arm, rates in cells.items():
        best = min(rates.values(), key=lambda seeds: (-len(seeds), fmean(loss for loss, _ in seeds.values())))
        losses[arm] = {seed: test for seed, (_, test) in best.items()}
    return losses


@pytest.mark.parametrize(
    ("name", "rank", "best"),
    [("small-llama-gsm8k", 4, "gradient"), ("small-llama-gsm8k", 16, LORA), ("smollm2-gsm8k", 4, LORA)],
)
def test_benchmarks_have_the_answers_that_the_results_state(name, rank, best):
    losses = {
        arm: by_seed
        for arm, by_seed in read_benchmark(name, rank).items()
        if arm in (LORA, "gradient", "l1ra", "cka", RANDOM)
    }
    assert find_best(judge(losses, [arm for arm in ("gradient", "cka") if arm in losses])) == best


# --- Time -------------------------------------------------------------------------------------------------------------

CURVE = [CurvePoint(step=step, seconds=2.0 * step, validation_loss=3 - 0.1 * step) for step in (0, 5, 10)]


@pytest.mark.parametrize(
    ("choosing", "seconds", "loss"),
    [(0, 0, 3.0), (0, 5, 2.75), (0, 10, 2.5), (0, 20, 2.0), (0, 21, None), (10, 5, 3.0), (10, 10, 3.0), (10, 25, 2.25)],
)
def test_a_loss_at_a_time_lies_between_evaluations(choosing, seconds, loss):
    assert find_loss_at(CURVE, choosing, seconds) == (None if loss is None else pytest.approx(loss))


def test_a_curve_without_its_beginning_says_nothing_about_it():
    assert find_loss_at(CURVE[1:], 0, 5) is None
    assert find_loss_at(CURVE[1:], 0, 10) == 2.5
    assert find_loss_at([], 0, 5) is None
