"""What the report of the demo says of numbers that are known."""

import dataclasses

import pytest

from demo.report import Result, compare_losses, compare_times, lay_out

LORA = Result("plain LoRA, all layers", None, 7.5, 4.0, 60, 182272, 0.40, 0.0)
CHOICE = Result("cka, 4 of 8 layers", [4, 5, 6, 7], 7.5, 3.9, 60, 182272, 0.30, 2.05)
DRAWN = Result("random, 4 of 8 layers", [0, 2, 5, 6], 7.5, 4.2, 60, 182272, 0.38, 0.0)


@pytest.mark.parametrize(
    "loss, verdict, differences",
    [
        (3.9, "It wins both comparisons here.", ("2.5 % below", "7.1 % below")),
        (4.1, "It does not win: its scores beat chance here", ("2.5 % above", "2.4 % below")),
        (4.3, "It does not win: neither plain LoRA nor a random choice is worse", ("7.5 % above", "2.4 % above")),
        (4.0, "It does not win: its scores beat chance here", ("0.0 % above", "4.8 % below")),
    ],
)
def test_the_numbers_decide_whether_the_choice_wins(loss, verdict, differences):
    text = compare_losses(LORA, dataclasses.replace(CHOICE, after=loss), DRAWN)
    assert (
        verdict in text and f"ends {differences[0]} plain LoRA's loss and {differences[1]} the random choice's" in text
    )
    assert ("It wins" in text) != ("It does not win" in text)


def test_a_choice_that_only_chance_beats_does_not_win():
    text = compare_losses(LORA, CHOICE, dataclasses.replace(DRAWN, after=3.8))
    assert "It does not win: layers drawn by chance did as well or better" in text


def test_what_a_step_saves_is_set_against_what_the_choice_cost():
    text = compare_times(LORA, CHOICE)
    assert text == (
        "A step takes 0.75 of plain LoRA's time, because the backward pass ends at layer 4. "
        "Choosing took 2.0 s, once, which 21 steps save."
    )


def test_a_choice_that_saves_nothing_is_said_to():
    slow = dataclasses.replace(CHOICE, step_seconds=0.41, layers=[0, 1, 2, 3])
    assert compare_times(LORA, slow) == "The choice saves no time here: its step takes 1.02 of plain LoRA's."
    assert "too short" in compare_times(LORA, dataclasses.replace(CHOICE, step_seconds=None))


def test_the_table_has_a_column_under_each_heading():
    assert lay_out([LORA, CHOICE, DRAWN]) == [
        "                         loss before   loss after   parameters   s a step",
        "plain LoRA, all layers         7.500        4.000      182,272       0.40",
        "cka, 4 of 8 layers             7.500        3.900      182,272       0.30",
        "random, 4 of 8 layers          7.500        4.200      182,272       0.38",
    ]
