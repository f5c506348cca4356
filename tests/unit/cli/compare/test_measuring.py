"""The measuring plugin: how it divides rows, and what it relies on in Axolotl."""

import inspect
import json
from types import SimpleNamespace

import pytest
from axolotl.cli.train import do_train
from axolotl.core.builders import HFCausalTrainerBuilder
from axolotl.loaders import ModelLoader
from axolotl.train import setup_model_and_trainer
from axolotl.utils.data import shared
from axolotl.utils.dict import DictDefault
from datasets import Dataset

from axolotl_layersel.cli.compare import measuring
from axolotl_layersel.cli.compare.measuring import MeasuringPlugin, divide, hash_rows, place_evaluations, read_general
from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.textual import MEASURING

MEASURE = {"arm": "lora", "data_seed": 7}


def make_rows(number: int) -> Dataset:
    return Dataset.from_dict({"input_ids": [[row, row + 1] for row in range(number)]})


def test_every_other_held_out_row_is_a_test_row():
    validation, test = divide(make_rows(5))
    assert [row[0] for row in validation["input_ids"]] == [0, 2, 4]
    assert [row[0] for row in test["input_ids"]] == [1, 3]


@pytest.mark.parametrize("rows", [None, make_rows(3)])
def test_too_few_held_out_rows_are_refused(rows):
    with pytest.raises(LayerselError, match=r"val_set_size: [03] held-out rows are too few to compare with"):
        divide(rows)


@pytest.mark.parametrize(
    ("steps", "most", "places"),
    [(100, 8, {12, 25, 38, 50, 62, 75, 88}), (4, 8, {1, 2, 3}), (12, 1, set()), (9, 0, set())],
)
def test_evaluations_are_evenly_spaced(steps, most, places):
    assert place_evaluations(steps, most) == places


def test_the_digest_of_rows_depends_on_their_tokens_and_their_order():
    rows = make_rows(4)
    assert hash_rows(rows) == hash_rows(Dataset.from_dict(rows.to_dict()))
    assert hash_rows(rows) != hash_rows(rows.select([1, 0, 2, 3]))
    assert hash_rows(rows.select([0, 1]), rows.select([2, 3])) != hash_rows(rows.select([0]), rows.select([1, 2, 3]))
    assert hash_rows(Dataset.from_dict({"text": ["a"]})) != hash_rows(Dataset.from_dict({"text": ["b"]}))


def test_general_text_is_a_line_each_or_json(tmp_path):
    def tokenizer(text):
        return {"input_ids": list(range(len(text.split())))}

    (tmp_path / "text.txt").write_text("one two three\n\nword\nfour five\n")
    rows = read_general(str(tmp_path / "text.txt"), tokenizer, 2)
    assert rows["input_ids"] == rows["labels"] == [[0, 1], [0, 1]], "cut, and without the row of one token"
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "a b\nc"}) + "\n")
    assert read_general(str(tmp_path / "text.jsonl"), tokenizer, 9)["input_ids"] == [[0, 1, 2]]
    (tmp_path / "text.jsonl").write_text('{"text": "a\u2028b c"}\r\n\n{"text": "a\x85b"}', "utf-8")
    assert read_general(str(tmp_path / "text.jsonl"), tokenizer, 9)["input_ids"] == [[0, 1, 2], [0, 1]]
    for content, fault in (({"content": "a b"}, ""), ({"text": 5}, r" \(ValueError: the text 5 is not a string\)")):
        (tmp_path / "wrong.jsonl").write_text(json.dumps(content) + "\n")
        with pytest.raises(LayerselError, match=rf"--general: .*wrong\.jsonl is damaged{fault}"):
            read_general(str(tmp_path / "wrong.jsonl"), tokenizer, 9)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(LayerselError, match="has no text"):
        read_general(str(tmp_path / "empty.txt"), tokenizer, 9)


def test_rows_are_loaded_with_the_seed_of_the_comparison_and_trained_with_the_runs_own():
    plugin, cfg = MeasuringPlugin(), DictDefault({"seed": 43, "layersel_measure": MEASURE})
    plugin.load_datasets(cfg)
    assert cfg.seed == 7
    plugin.pre_model_load(cfg)
    plugin.pre_model_load(cfg)  # once more for a reference model
    assert cfg.seed == 43


def test_the_plugin_is_refused_without_its_key_and_for_answers_that_are_generated():
    with pytest.raises(LayerselError, match="layersel_measure: the key is missing"):
        MeasuringPlugin().load_datasets(DictDefault({"seed": 43}))
    with pytest.raises(LayerselError, match="rl: 'grpo' has no loss on held-out rows"):
        MeasuringPlugin().load_datasets(DictDefault({"rl": "grpo", "layersel_measure": MEASURE}))


def test_the_real_steps_are_those_of_the_file_or_of_its_epochs():
    rows, held_out = make_rows(90), make_rows(5)
    trainer = SimpleNamespace(train_dataset=rows, eval_dataset=held_out)
    cfg = DictDefault({"rl": "dpo", "num_epochs": 2, "batch_size": 4})

    def find(**values):
        return measuring.find_real_steps(cfg, trainer, measuring.MeasureConfig(**MEASURE, **values))

    assert find(max_steps=1000) == 1000
    assert find() == 45
    assert find(held_out_trains=True) == 50, "the user's own run trains on the held-out rows too"


# --- Axolotl ----------------------------------------------------------------------------------------------------------


def test_the_name_of_the_plugin_is_its_place():
    assert f"{MeasuringPlugin.__module__}.{MeasuringPlugin.__name__}" == MEASURING


def test_axolotl_orders_rows_by_the_seed_and_splits_them_in_that_order():
    rows = make_rows(20)
    cfgs = [DictDefault({"seed": seed, "shuffle_merged_datasets": True}) for seed in (1, 1, 2)]
    merged = [shared.merge_datasets([rows], cfg)["input_ids"] for cfg in cfgs]
    assert merged[0] == merged[1] != merged[2]
    train, held_out = shared.create_train_validation_split(rows, cfgs[0], 0.2)
    assert [row[0] for row in [*train["input_ids"], *held_out["input_ids"]]] == list(range(20))


def test_axolotl_calls_the_hooks_in_the_order_that_is_relied_on():
    def find(function, *words):
        source = inspect.getsource(function)
        places = [source.index(word) for word in words]
        assert places == sorted(places)

    loads = ("plugin_manager.load_datasets(cfg", "load_datasets_fn(cfg=cfg")
    find(do_train, *loads, "train_fn(cfg=cfg", "post_train_unload(cfg")
    find(ModelLoader.load, "pre_model_load(", "_build_model(")
    find(setup_model_and_trainer, "setup_trainer(", "post_trainer_create(cfg, trainer)")
    assert "get_post_trainer_create_callbacks(trainer)" in inspect.getsource(HFCausalTrainerBuilder.build)
