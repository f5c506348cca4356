import itertools

import pytest
import torch
from datasets import Dataset
from helpers.models import make_rows
from hypothesis import given
from hypothesis import strategies as st

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.selection.data.label_alignment import NEXT_TOKEN, ROW, SAME_TOKEN
from axolotl_layersel.selection.methods.flexora.validation import (
    count_targets,
    draw_micro_batches,
    find_eval_rows,
    has_target,
    hold_out,
    take_rows,
)


def test_held_out_rows_and_the_others_are_the_whole_set():
    rows = make_rows(30)
    train, held = hold_out(rows, 10, 4, seed=3, kind=NEXT_TOKEN)
    assert sorted(train + held) == list(range(30))
    assert len(held) == 10 and train == sorted(train)
    assert hold_out(rows, 10, 4, seed=3, kind=NEXT_TOKEN) == (train, held)
    assert hold_out(rows, 10, 4, seed=4, kind=NEXT_TOKEN) != (train, held)


def test_rows_with_labels_are_found_where_they_are_few():
    rows = make_rows(60)
    for row in rows[:-3]:
        row["labels"] = [-100] * len(row["input_ids"])
    for seed in range(5):
        assert sorted(hold_out(rows, 3, 4, seed, NEXT_TOKEN)[1]) == [57, 58, 59]


def test_rows_without_a_label_to_learn_are_not_validated_on():
    rows = make_rows(12)
    for row in rows[:6]:
        row["labels"] = [row["input_ids"][0], *[-100] * (len(row["input_ids"]) - 1)]  # the first is never predicted
    assert not has_target(rows[0], NEXT_TOKEN) and has_target(rows[6], NEXT_TOKEN)
    assert has_target(rows[0], SAME_TOKEN)
    assert has_target({"chosen_ids": [1]}, NEXT_TOKEN) and has_target({"label": True}, NEXT_TOKEN)
    assert has_target({"label": 1}, ROW) and not has_target({"labels": -100}, ROW)
    assert has_target({"labels": [0.0, 1.0]}, ROW)
    assert sorted(hold_out(rows, 6, 2, seed=0, kind=NEXT_TOKEN)[1]) == list(range(6, 12))
    with pytest.raises(LayerselError, match="val_samples: only 6 training rows have a label to learn, 7 are"):
        hold_out(rows, 7, 2, seed=0, kind=NEXT_TOKEN)


@pytest.mark.parametrize(
    ("rows", "samples", "message"),
    [
        (10, 7, "val_samples: 7 of the 10 training rows leaves 3 to train on, .* needs 4 or more. Set it to 3, which"),
        (3, 200, "val_samples: 200 of the 3 training rows leaves 0 to train on.*Give more data, or use"),
    ],
)
def test_too_few_rows_to_train_on_is_an_error(rows, samples, message):
    with pytest.raises(LayerselError, match=message):
        hold_out(make_rows(rows), samples, 4, seed=0, kind=NEXT_TOKEN)


def test_several_eval_sets_count_as_one_and_small_ones_are_taken_whole():
    one, other = Dataset.from_list(make_rows(5)), Dataset.from_list(make_rows(4, seed=1))
    source, rows = find_eval_rows({"one": one, "other": other}, 200, seed=0, kind=NEXT_TOKEN)
    assert sorted(rows) == list(range(9))
    assert source[8]["input_ids"] == other[3]["input_ids"]
    assert len(find_eval_rows(one, 3, seed=0, kind=NEXT_TOKEN)[1]) == 3
    source, rows = find_eval_rows({"one": make_rows(3), "other": one}, 200, seed=0, kind=NEXT_TOKEN)
    assert sorted(rows) == list(range(8)) and dict(source[7]) == dict(one[4])
    for nothing in (None, {}):
        with pytest.raises(LayerselError, match="val_source: 'eval' needs an eval set"):
            find_eval_rows(nothing, 3, seed=0, kind=NEXT_TOKEN)


def test_labels_count_in_any_format():
    rows = make_rows(8)
    for row in rows[:5]:
        row["labels"] = [-100] * len(row["input_ids"])
    for kind in ("torch", "numpy"):
        assert sorted(hold_out(Dataset.from_list(rows).with_format(kind), 3, 2, seed=0, kind=NEXT_TOKEN)[1]) == [
            5,
            6,
            7,
        ]


@pytest.mark.parametrize("make", [Dataset.from_list, list])
def test_taken_rows_keep_their_order(make):
    rows = make_rows(8)
    assert [dict(row) for row in take_rows(make(rows), [1, 5, 6])] == [rows[1], rows[5], rows[6]]


@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 3))
def test_micro_batches_go_through_all_rows_in_turn(count, size, seed):
    batches = list(itertools.islice(draw_micro_batches(count, None, size, seed), 3 * count))
    assert all(len(batch) == size for batch in batches)
    drawn = [row for batch in batches for row in batch]
    for start in range(0, 3 * count, count):
        assert sorted(drawn[start : start + count]) == list(range(count))


def test_two_processes_share_the_rows_that_one_has():
    one = list(itertools.islice(draw_micro_batches(7, None, 4, seed=1), 10))
    two = list(itertools.islice(draw_micro_batches(7, None, 2, seed=1), 20))
    assert one == [first + second for first, second in zip(two[::2], two[1::2])]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=9), st.integers(1, 40))
def test_packed_micro_batches_hold_as_much_as_fits(lengths, size):
    batches = list(itertools.islice(draw_micro_batches(len(lengths), lengths, size, seed=0), 20))
    for batch, following in itertools.pairwise(batches):
        tokens = sum(lengths[row] for row in batch)
        assert tokens <= size or len(batch) == 1
        assert tokens + lengths[following[0]] > size
    drawn = [row for batch in batches for row in batch][: len(lengths)]
    assert len(set(drawn)) == len(drawn)


def test_labels_that_the_loss_is_the_mean_over_are_counted():
    labels = torch.tensor([[5, -100, 7, 8], [5, 6, -100, -100]])
    assert count_targets({"labels": labels}, NEXT_TOKEN) == 3
    assert count_targets({"labels": labels}, SAME_TOKEN) == 5
    assert count_targets({"labels": torch.tensor([1, 0, -100])}, ROW) == 2
    assert count_targets({"input_ids": labels}, NEXT_TOKEN) == 2
