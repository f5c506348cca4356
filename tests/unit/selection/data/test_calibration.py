import pytest
import torch

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.selection.data.calibration import (
    Sample,
    are_most,
    collate,
    count_most_common,
    draw_rows,
    find_ending,
    fingerprint,
    place_token,
    read_sample,
)


def make_samples(*rows: list[int]) -> list[Sample]:
    return [Sample(row=i, input_ids=list(ids), labels=None) for i, ids in enumerate(rows)]


def test_rows_come_from_the_seed_and_differ():
    assert draw_rows(100, 20, 3) == draw_rows(100, 20, 3)
    assert draw_rows(100, 20, 3) != draw_rows(100, 20, 4)
    assert len(set(draw_rows(100, 100, 3))) == 100


def test_too_few_rows_are_an_error_that_says_how_many_there_are():
    with pytest.raises(LayerselError, match=r"num_samples: 128 is more than the 3 rows.*at most 3"):
        draw_rows(3, 128, 0)


def test_auto_takes_the_last_token_before_the_ending_that_all_share():
    samples = make_samples([5, 6, 7, 1, 2], [5, 9, 1, 2], [8, 4, 4, 4, 3, 1, 2])
    assert find_ending(samples) == [1, 2]
    assert place_token(samples, "ending") == (samples, [2, 1, 4])
    assert place_token(samples, "last") == (samples, [4, 3, 6])
    assert place_token(samples, "cls") == (samples, [0, 0, 0])
    assert place_token(samples, "mean") == (samples, None)


def test_auto_leaves_out_rows_that_were_cut_before_their_ending():
    whole = [[5, 10 + i, 30 + i, 1, 2] for i in range(18)]
    samples = make_samples(*whole[:7], [5, 10, 11, 12, 13], *whole[7:], [5, 10, 11, 12, 1])
    assert find_ending(samples) == [1, 2]
    kept, positions = place_token(samples, "ending")
    assert [sample.row for sample in kept] == [i for i in range(20) if i not in (7, 19)]
    assert positions == [2] * 18
    assert place_token(samples, "last")[0] == samples


def test_auto_takes_no_ending_that_more_than_a_tenth_of_the_rows_lack():
    samples = make_samples(*[[5, 10 + i, 1, 2] for i in range(17)], *[[5, 10 + i, 3, 4] for i in range(3)])
    assert find_ending(samples) == []
    assert place_token(samples, "ending") == (samples, [3] * 20)


def test_auto_leaves_out_a_row_that_is_all_ending():
    samples = make_samples([1, 2], *[[7 + i, 1, 2] for i in range(9)])
    assert place_token(samples, "ending") == (samples[1:], [0] * 9)
    equal = make_samples(*[[7, 8, 1]] * 4)
    assert place_token(equal, "ending") == (equal, [0] * 4)


def test_a_token_that_most_rows_share_is_counted():
    samples = make_samples([5, 6], [5, 7], [4, 7])
    assert count_most_common(samples, [0, 0, 0]) == 2
    assert count_most_common(samples, [0, 1, 0]) == 1
    assert are_most(9, 10) and not are_most(8, 9)


def test_rows_are_padded_on_the_right_and_masked():
    batch = collate(make_samples([5, 6, 7], [8]), 99, torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 99, 99]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_segments_are_padded_too():
    rows = [{"input_ids": [5, 6, 7], "token_type_ids": [0, 1, 1]}, {"input_ids": [8], "token_type_ids": [1]}]
    batch = collate([read_sample(row, i) for i, row in enumerate(rows)], 99, torch.device("cpu"))
    assert batch["token_type_ids"].tolist() == [[0, 1, 1], [1, 0, 0]]


def test_padding_of_the_data_set_is_left_out():
    row = {"input_ids": [9, 5, 6, 9], "attention_mask": [0, 1, 1, 0], "labels": [9, -100, 6, 9]}
    sample = read_sample({**row, "token_type_ids": [1, 0, 1, 1]}, 3)
    assert (sample.input_ids, sample.labels, sample.token_type_ids) == ([5, 6], [-100, 6], [0, 1])
    assert read_sample({**row, "labels": 1}, 3).labels == 1


def test_rows_may_be_arrays():
    row = {"input_ids": [5, 6], "attention_mask": [1, 1], "labels": [-100, 6]}
    arrays = {name: torch.tensor(value) for name, value in row.items()}
    assert read_sample(arrays, 0) == read_sample(row, 0)
    assert fingerprint([read_sample(arrays, 0)]) == fingerprint([read_sample(row, 0)])


@pytest.mark.parametrize(
    ("row", "labels"),
    [
        ({"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]}, [-100, -100, 3, 4]),
        ({"prompt_ids": [1, 2], "completion_ids": [3, 4], "label": False}, [-100, -100, 3, 4]),
        (
            {
                "prompt_input_ids": [1, 2],
                "chosen_input_ids": [1, 2, 3, 4],
                "chosen_labels": [-100, -100, 3, 4],
                "rejected_input_ids": [1, 2, 5],
            },
            [-100, -100, 3, 4],
        ),
        ({"chosen_ids": [1, 2, 3, 4], "rejected_ids": [1, 2, 5], "labels_chosen": 1.0}, None),
    ],
    ids=["DPO", "KTO", "ORPO", "reward"],
)
def test_a_preference_row_stands_for_its_prompt_and_chosen_answer(row, labels):
    sample = read_sample(row, 0)
    assert (sample.input_ids, sample.labels) == ([1, 2, 3, 4], labels)


def test_a_row_without_tokens_is_an_error_that_names_its_columns():
    with pytest.raises(LayerselError, match=r"columns \['images', 'messages'\], without token ids"):
        read_sample({"messages": [], "images": []}, 0)
    with pytest.raises(LayerselError, match="row 7 has no tokens"):
        read_sample({"input_ids": []}, 7)


def test_the_fingerprint_changes_with_the_data():
    first, second = make_samples([1, 2], [3]), make_samples([1, 2], [4])
    assert fingerprint(first) == fingerprint(make_samples([1, 2], [3])) != fingerprint(second)
