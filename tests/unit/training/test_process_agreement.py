"""Ranks that were not started alike: every one ends with the sentence that names rank and key, and none hangs."""

import json

from helpers.models import make_rows

from axolotl_layersel.training import process_agreement

# --- Without Axolotl, two processes -------------------------------------------------------------------------------


def test_the_first_difference_is_found_however_deep_it_lies():
    ours = {"layersel": {"selection": {"method": "cka", "seed": None}, "l1ra": None}, "seed": 1}
    assert process_agreement.find_difference(ours, json.loads(json.dumps(ours))) is None
    theirs = {"layersel": {"selection": {"method": "cka", "seed": 3}, "l1ra": None}, "seed": 1}
    assert process_agreement.find_difference(ours, theirs) == ("layersel.selection.seed", None, 3)
    assert process_agreement.find_difference(ours, {**ours, "extra": 1}) == ("extra", None, 1)


def test_a_dataset_is_described_alike_whatever_form_it_gives_its_rows(tmp_path):
    from datasets import Dataset

    rows = make_rows()
    dataset = Dataset.from_list(rows)
    described = process_agreement.describe_rows(dataset, seed=3)
    assert described["number of rows"] == len(rows)
    assert process_agreement.describe_rows(dataset.with_format("torch"), seed=3) == described
    assert process_agreement.describe_rows(Dataset.from_list(rows[::-1]), seed=3) != described
    assert process_agreement.describe_rows(dataset.to_iterable_dataset(), seed=3) is None
    assert process_agreement.describe_rows({"a": rows}, seed=3) == {"a": {"number of rows": len(rows)}}
