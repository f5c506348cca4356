"""The answer of a comparison: it says no more than the figures do, in sentences that fit a terminal."""

import json
import re

import pytest
from helpers.comparisons import ARMS, make_cell, make_comparison, make_failure, plant
from hypothesis import given, settings
from hypothesis import strategies as st

from axolotl_layersel.cli.compare.answer import (
    Choice,
    answer,
    describe,
    format_figure,
    format_interval,
)
from axolotl_layersel.cli.compare.figures import ArmSettings
from axolotl_layersel.cli.compare.statistics import BETTER, Difference, Interval
from axolotl_layersel.cli.compare.summary import is_drawn, summarise

FULL = {"gradient": -0.03, "cka": 0.012, "random": 0.1, "lora@32": -0.012, "lora@4": 0.001}


def drop(cells, arm, seed):
    """Return cells without that of an arm and a seed, which failed."""
    return [cell for cell in cells if (cell.arm, cell.seed) != (arm, seed)] + [make_failure(arm, seed)]


def add_general(cells, rise):
    """Return cells with the loss on general text, which rises by ``rise`` more in other arms than ``lora``."""
    after = [3.1 + 0.001 * index + rise * (cell.arm != "lora") for index, cell in enumerate(cells)]
    return [cell.model_copy(update={"general_before": 3.0, "general_after": loss}) for cell, loss in zip(cells, after)]


CASES = {
    "gradient": make_comparison(plant(FULL)),
    "nothing": make_comparison(plant({"gradient": 0.001, "random": 0.05, "l1ra": 0.0})),
    "one seed": make_comparison(plant(FULL, seeds=1)),
    "chance": make_comparison(plant({"cka": -0.05, "gradient": -0.06, "random": -0.05})),
    "no control": make_comparison(plant({"cka": -0.05})),
    "random": make_comparison(plant({"random": -0.3, "cka": 0.0})),
    "rank": make_comparison(plant({"lora@32": -0.05})),
    "failed arm": make_comparison([*plant({"lora@32": 0.0}), make_failure("gradient", 0), make_failure("gradient", 1)]),
    "failed cell": make_comparison(drop(plant({"gradient": -0.1, "random": 0.05}), "gradient", 1)),
    "failed lora": make_comparison([make_failure("lora", 0), *plant({"gradient": -0.1})[3:]]),
    "failed random": make_comparison([*plant({"gradient": -0.1}), make_failure("random", 0)]),
    "only lora": make_comparison(plant({})),
    "only failures": make_comparison([make_failure("lora", 0), make_failure("gradient", 0)]),
    "empty": make_comparison([], planned=30),
    "stopped": make_comparison(
        [*plant({"gradient": -0.1, "random": 0.0}, seeds=1), make_failure("gradient", 1)], planned=30
    ),
    "whole run": make_comparison(
        [cell.model_copy(update={"steps": 2500}) for cell in plant({"lora@32": 0.0})], steps=2500
    ),
    "forgets": make_comparison(add_general(plant({"lora@32": -0.05}), 0.1), general="texts/wiki.txt"),
    "notes": make_comparison(plant({"lora@32": 0.0}), notes=["The best rate is the highest that was tried."]),
    "negative": make_comparison([cell.model_copy(update={"test_loss": cell.test_loss - 5}) for cell in plant(FULL)]),
    "zero": make_comparison([make_cell(arm, seed, 0.0) for arm in ("lora", "l1ra") for seed in range(3)]),
    "own arm": make_comparison(
        [
            cell.model_copy(update={"arm": "lora@\x1b[31m`<b>"}) if cell.arm == "cka" else cell
            for cell in plant({"cka": -0.1})
        ],
        {"lora": ({}, False), "lora@\x1b[31m`<b>": ({"layersel": {}}, False)},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_answer_fits_a_terminal_and_is_whole_sentences(name):
    found = answer(CASES[name])
    lines = found.format()
    assert max(map(len, lines)) <= 80
    assert all(line.isprintable() for line in lines)
    assert all(sentence[0] in "`" or sentence[0].isupper() for sentence in found.sentences)
    assert all(sentence.endswith(".") and not sentence.endswith("..") for sentence in found.sentences)
    assert not re.search(r"nan|inf\b|None|  ", found.paragraph)
    assert not any(line.startswith("%") for line in lines), "a number and its unit are on one line"
    for line in lines:
        line.encode("ascii")


@pytest.mark.parametrize("name", CASES)
def test_json_has_the_same_answer(name):
    content = json.loads(json.dumps(describe(CASES[name]), allow_nan=False))
    found = answer(CASES[name])
    assert content["answer"]["paragraph"] == found.paragraph
    assert content["answer"]["arm"] == (found.choice.arm if found.choice else None)
    assert list(content["arms"]) == list(CASES[name].settings.arms)


@pytest.mark.parametrize(
    ("name", "arm"),
    [
        ("gradient", "gradient"),
        ("nothing", "lora"),
        ("one seed", "lora"),
        ("chance", "gradient"),
        ("no control", "cka"),
        ("random", "random"),
        ("rank", "lora@32"),
        ("failed arm", "lora"),
        ("failed cell", "gradient"),
        ("failed random", "gradient"),
        ("only lora", "lora"),
        ("stopped", "lora"),
        ("zero", "lora"),
    ],
)
def test_choices(name, arm):
    assert answer(CASES[name]).choice == Choice(arm, 2e-4)


@pytest.mark.parametrize("name", ["empty", "only failures", "failed lora"])
def test_nothing_is_chosen_without_plain_lora(name):
    assert answer(CASES[name]).choice is None
    assert "plain LoRA has no complete run to compare with." in answer(CASES[name]).paragraph


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gradient", "Use `gradient` at learning rate 0.0002."),
        ("gradient", "A random choice of layers does not explain it: the loss is "),
        ("gradient", "choosing takes 12 s."),
        ("gradient", "`lora@32` (0.50 % below) is better than plain LoRA as well."),
        ("gradient", "Each cell trained for 100 steps, which are 4.0 % of the real run's 2,500"),
        ("gradient", "The 95 % interval for all 5 comparisons together is "),
        ("gradient", "`lora@4` has 0.25 times plain LoRA's trainable parameters, for a loss "),
        ("nothing", "Use plain LoRA (rank 16) at learning rate 0.0002. No other arm is better beyond its interval"),
        ("nothing", "With 3 seeds, a gain of less than "),
        ("one seed", "One seed cannot tell a difference from noise; `--seeds 3` can."),
        ("chance", "Whether its choice of layers matters is not known: the loss is "),
        ("chance", "so a random one may be as good on average. More seeds can tell."),
        ("chance", "`cka` (2.3 % below) is better than plain LoRA as well."),
        ("no control", "Whether its choice of layers matters is not known, because `random` has no complete runs."),
        ("rank", "Use plain LoRA of rank 32 (`lora@32`) at learning rate 0.0002."),
        ("rank", "are 2.00, 1.05 and 1.00 times those of plain LoRA."),
        ("rank", "The 95 % interval is "),
        ("only lora", "No other arm was compared with it."),
        ("failed cell", "means of 2 seeds"),
        ("failed lora", "Its last failure was: CUDA out of memory. Tried to allocate 2.00 GiB."),
        ("stopped", "This is provisional: 4 of 30 cells have ended."),
        ("stopped", "Too few cells have ended to tell a difference from noise."),
        ("whole run", "for the 2,500 steps of the real run"),
        (
            "forgets",
            "It forgets more than plain LoRA: the loss on wiki.txt is 3.3 % above plain LoRA's after training.",
        ),
    ],
)
def test_sentences(name, words):
    assert words in answer(CASES[name]).paragraph


def test_failed_cells_and_notes_are_remarks():
    assert answer(CASES["notes"]).remarks == ["The best rate is the highest that was tried."]
    first, _ = answer(CASES["failed arm"]).remarks
    assert first == (
        "Failed: `gradient` at 0.0002, seed 0, 100 steps: CUDA out of memory. Tried to allocate 2.00 GiB. "
        "Log: outputs/run/compare/gradient/0.0002/0/log.txt"
    )
    assert "failed" in "\n".join(answer(CASES["failed arm"]).tables)


def test_differences_without_a_positive_loss_are_no_percentages():
    assert " % below" not in answer(CASES["negative"]).paragraph


def test_plain_lora_ahead_at_equal_time_is_said():
    slow = [
        cell.model_copy(update={"seconds_choosing": 70.0}) if cell.arm == "gradient" else cell
        for cell in plant({"gradient": -0.1, "random": 0.1})
    ]
    assert "the choice of layers included), plain LoRA is ahead" in answer(make_comparison(slow)).paragraph
    assert summarise(make_comparison(slow)).arms["gradient"].equal_time_loss > 2.5


def test_cells_of_other_lengths_and_rates_do_not_count():
    cells = plant({"gradient": -0.05, "random": 0.1})
    others = [
        make_cell("gradient", 0, 9.0, steps=50),
        make_cell("gradient", 0, 9.0, rate=4e-4),
        make_cell("lora", 0, 0.1, rate=1e-4),
    ]
    rates = {"lora": 2e-4, "gradient": 2e-4, "random": 2e-4}
    alone, together = make_comparison(cells), make_comparison([*others, *cells], best_rates=rates)
    assert summarise(alone).arms["gradient"].judgement == summarise(together).arms["gradient"].judgement
    assert (
        "the best of 2 that were tried"
        in answer(make_comparison([*others[2:], *cells[:3]], best_rates=rates)).paragraph
    )


def test_metrics_are_means():
    cells = [
        make_cell(
            "lora", seed, 2.0 + seed, metrics={"rouge": 0.1 * seed, "bad": float("nan")} | ({"odd": 1} if seed else {})
        )
        for seed in range(3)
    ]
    comparison = make_comparison(cells)
    assert summarise(comparison).arms["lora"].metrics == {"rouge": pytest.approx(0.1)}
    assert "rouge" in "\n".join(answer(comparison).tables)
    json.dumps(describe(comparison), allow_nan=False)


@settings(max_examples=50)
@given(st.randoms(), st.dictionaries(st.sampled_from([arm for arm in ARMS if arm != "lora"]), st.floats(-0.2, 0.2)))
def test_the_order_of_cells_and_arms_does_not_matter(stream, gains):
    cells = plant(gains)
    stream.shuffle(cells)
    names = [arm for arm in ARMS if arm in {"lora", *gains}]
    arms = {arm: ARMS[arm] for arm in names}
    assert answer(make_comparison(cells, arms)) == answer(
        make_comparison(sorted(cells, key=lambda cell: cell.seed), arms)
    )


@settings(max_examples=50)
@given(
    st.dictionaries(st.sampled_from([arm for arm in ARMS if arm != "lora"]), st.floats(-0.1, 0.1)),
    st.integers(1, 4),
    st.integers(0, 1000),
    st.sets(st.integers(0, 20)),
)
def test_an_arm_whose_interval_includes_0_is_never_recommended(gains, seeds, start, missing):
    planted = plant(gains, seeds, noise=0.02, start=start)
    cells = [cell for place, cell in enumerate(planted) if place not in missing]
    comparison = make_comparison(cells, {arm: ARMS[arm] for arm in ["lora", *gains]}, planned=len(planted))
    found, summary = answer(comparison), summarise(comparison)
    choice = found.choice
    assert (choice is None) == (not summary.lora.cells)
    found.format()
    if choice and choice.arm != "lora":
        judgement = summary.arms[choice.arm].judgement
        assert judgement.to_lora.claim.high < 0
        assert judgement.to_lora.interval.high < 0
        explained = "A random choice of layers does not explain it" in found.paragraph
        assert explained == (ARMS[choice.arm][1] and judgement.standing == BETTER)


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (-0.04, -0.02, "1.0 to 2.0 % below"),
        (-0.04, -0.01, "0.50 to 2.00 % below"),
        (0.02, 0.3, "1.0 to 15.0 % above"),
        (-0.004, 0.02, "from 0.20 % below to 1.00 % above"),
    ],
)
def test_intervals_in_words(low, high, words):
    assert format_interval(Difference(0, 3, 2.0, Interval(low, high), Interval(low, high)), "claim") == words


def test_numbers_fit():
    assert [format_figure(value) for value in (0.0412, 1, 12.34, 999.4, 1234)] == [
        "0.0412",
        "1.00",
        "12.3",
        "999",
        "1,234",
    ]


@pytest.mark.parametrize(("block", "drawn"), [({"method": "random"}, True), ({"method": "random", "seed": 7}, False)])
def test_an_own_arm_of_random_layers_scatters_only_if_the_seed_draws_them(block, drawn):
    comparison = make_comparison(plant({"cka": 0.0}))
    comparison.settings.arms["cka"] = ArmSettings(keys={"layersel": {"selection": block}}, choosing=False)
    assert is_drawn(comparison, "cka") == drawn
