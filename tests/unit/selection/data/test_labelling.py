"""Labels that the trainer's collator makes: of rows for masked and for causal language models that have none."""

import random

import numpy
import pytest
import torch
from datasets import Dataset
from helpers.models import make_lora, make_rows, make_small_bert, make_small_llama
from transformers import (
    BertTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from axolotl_layersel import LayerselConfig, LayerselError, SelectionConfig, prepare_trainer
from axolotl_layersel.selection.data.calibration import read_samples
from axolotl_layersel.selection.data.collator_labels import label_samples

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(92))]
MASK = WORDS.index("[MASK]")


@pytest.fixture(scope="module")
def tokenizer() -> BertTokenizer:
    return BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)})


def make_unlabelled() -> list[dict]:
    """Return rows without labels, whose tokens are words."""
    rows = [row["input_ids"][:-1] for row in make_rows()]
    return [
        {"input_ids": [2, *(max(token, 5) for token in ids), 3], "attention_mask": [1] * (len(ids) + 2)} for ids in rows
    ]


def make(model, folder, collator) -> Trainer:
    arguments = TrainingArguments(str(folder), use_cpu=True, per_device_train_batch_size=4, report_to=[], seed=3)
    return Trainer(model, arguments, train_dataset=Dataset.from_list(make_unlabelled()), data_collator=collator)


@pytest.mark.parametrize("method", ["fisher", "gradient"])
@pytest.mark.parametrize("masked", [True, False])
def test_rows_without_labels_are_scored_on_those_that_the_collator_makes(method, masked, tokenizer, tmp_path):
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=masked, mlm_probability=0.4 if masked else None)
    plans = []
    for folder in ("one", "other"):
        model = make_lora(make_small_bert(), ["query", "value"]) if masked else make_lora(make_small_llama())
        config = LayerselConfig(selection=SelectionConfig(method=method, num_samples=12))
        plans.append(prepare_trainer(make(model, tmp_path / folder, collator), config))
    assert plans[0].layers == plans[1].layers, "the seed says what is masked"
    assert any(choice.score for choice in plans[0].layers)
    unlabelled = read_samples(Dataset.from_list(make_unlabelled()), 12, seed=3)
    assert plans[0].calibration_rows == [sample.row for sample in unlabelled]


def test_masked_tokens_have_labels_and_others_have_none(tokenizer):
    samples = read_samples(Dataset.from_list(make_unlabelled()), 12, seed=5)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.4, pad_to_multiple_of=32, seed=1)
    found = label_samples(samples, collator, seed=5)
    masked = 0
    for sample, labelled in zip(samples, found):
        assert labelled.row == sample.row
        assert len(labelled.input_ids) == len(labelled.labels) == len(sample.input_ids), "padding is taken off again"
        for before, after, label in zip(sample.input_ids, labelled.input_ids, labelled.labels):
            assert label in (-100, before)
            assert after == before or label == before
            masked += after == MASK
    assert masked > 12
    # A row's mask is its own: neither other rows nor their order change it.
    assert label_samples(samples[::-1], collator, seed=5) == found[::-1]
    assert label_samples(samples, collator, seed=6) != found
    assert collator.generator is None, "training draws what it would have drawn"


def test_random_streams_stay_where_they_were(tokenizer):
    samples = read_samples(Dataset.from_list(make_unlabelled()), 4, seed=5)
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    label_samples(samples, DataCollatorForLanguageModeling(tokenizer), seed=5)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == before[1:]


def test_labels_that_rows_have_are_theirs(tokenizer):
    samples = read_samples(Dataset.from_list(make_rows()), 4, seed=5)
    assert label_samples(samples, DataCollatorForLanguageModeling(tokenizer), seed=5) == samples


def test_a_collator_that_makes_no_labels_leaves_the_method_to_refuse(tokenizer, tmp_path):
    trainer = make(make_lora(make_small_bert(), ["query"]), tmp_path, DataCollatorWithPadding(tokenizer))
    with pytest.raises(LayerselError, match=r"fisher needs labels of tokens, training row \d+ has none"):
        prepare_trainer(trainer, LayerselConfig(selection=SelectionConfig(method="fisher", num_samples=8)))


def test_a_collator_that_needs_labels_is_named(tmp_path):
    def collate(batch: list[dict]) -> dict:
        return {"labels": torch.tensor([row["labels"] for row in batch])}

    trainer = make(make_lora(make_small_bert(), ["query"]), tmp_path, collate)
    message = r"^data_collator: training row \d+ has no labels, and function makes no batch without them \(KeyError"
    with pytest.raises(LayerselError, match=message):
        prepare_trainer(trainer, LayerselConfig(selection=SelectionConfig(method="fisher", num_samples=8)))
