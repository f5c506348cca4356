"""How far choices agree."""

import pytest

from axolotl_layersel.selection.choosing import find_mean_overlap


def test_choices_of_equal_ranks_agree_as_far_as_their_modules_do():
    choices = [dict.fromkeys(names, 4) for names in ("ab", "bc", "bc")]
    assert find_mean_overlap(choices) == pytest.approx((1 / 3 + 1 / 3 + 1) / 3)


def test_the_same_modules_with_other_ranks_do_not_agree():
    assert find_mean_overlap([{"a": 6, "b": 2}, {"a": 2, "b": 6}]) == pytest.approx(4 / 12)
    assert find_mean_overlap([{"a": 6, "b": 2}, {"a": 6, "b": 2}]) == 1
