from hypothesis import given
from hypothesis import strategies as st

from axolotl_layersel.selection.controls import choose_without_data


@given(candidates=st.sets(st.integers(0, 99), min_size=1), seed=st.integers(0, 10**6), data=st.data())
def test_random_layers_are_candidates_and_come_from_the_seed(candidates, seed, data):
    keep = data.draw(st.integers(1, len(candidates)))
    chosen = choose_without_data("random", list(candidates), keep, seed)
    assert chosen == sorted(set(chosen)) == choose_without_data("random", sorted(candidates), keep, seed)
    assert len(chosen) == keep
    assert set(chosen) <= candidates


def test_different_seeds_choose_different_layers():
    assert len({tuple(choose_without_data("random", list(range(32)), 8, seed)) for seed in range(20)}) > 15


def test_first_and_last_take_the_ends_and_explicit_what_is_listed():
    assert choose_without_data("first", [5, 1, 9, 3], 2, 0) == [1, 3]
    assert choose_without_data("last", [5, 1, 9, 3], 2, 0) == [5, 9]
    assert choose_without_data("explicit", [0, 1, 2, 3], 2, 0, [3, 1]) == [1, 3]
