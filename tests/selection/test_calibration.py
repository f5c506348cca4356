import pytest
import torch

from axolotl_layersel.errors import LayerselError
from axolotl_layersel.selection.calibration import (
    Sample,
    collate,
    count_shared_suffix,
    draw_rows,
    find_token_positions,
    fingerprint,
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
    assert count_shared_suffix(samples) == 2
    assert find_token_positions(samples, "auto") == [2, 1, 4]
    assert find_token_positions(samples, "last") == [4, 3, 6]
    assert find_token_positions(samples, "cls") == [0, 0, 0]
    assert find_token_positions(samples, "mean") is None


def test_auto_stays_inside_a_row_that_is_all_ending():
    assert find_token_positions(make_samples([1, 2], [7, 1, 2]), "auto") == [0, 0]


def test_rows_are_padded_on_the_right_and_masked():
    batch = collate(make_samples([5, 6, 7], [8]), 99, torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 99, 99]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_a_preference_row_stands_for_its_prompt_and_chosen_answer():
    sample = read_sample({"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]}, 0)
    assert (sample.input_ids, sample.labels) == ([1, 2, 3, 4], [-100, -100, 3, 4])


def test_a_row_without_tokens_is_an_error_that_names_its_columns():
    with pytest.raises(LayerselError, match=r"columns \['images', 'messages'\], without token ids"):
        read_sample({"messages": [], "images": []}, 0)
    with pytest.raises(LayerselError, match="row 7 has no tokens"):
        read_sample({"input_ids": []}, 7)


def test_the_fingerprint_changes_with_the_data():
    first, second = make_samples([1, 2], [3]), make_samples([1, 2], [4])
    assert fingerprint(first) == fingerprint(make_samples([1, 2], [3])) != fingerprint(second)
