"""Labels that rows do not have by themselves: the trainer's collator makes them, as for masked language models."""

import copy
from collections.abc import Callable
from typing import Any

from transformers import DataCollatorForLanguageModeling

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.randomness import keep_random_state
from axolotl_layersel.selection.data.batch_rows import seed_by_row
from axolotl_layersel.selection.data.calibration import Sample, drop_padding


def label_samples(
    samples: list[Sample], collate: Callable[[list[dict[str, Any]]], Any], seed: int, has_decoder: bool = False
) -> list[Sample]:
    """Return the samples with labels: those without any as the trainer's collator makes a batch of each of them.

    What is masked in a row is drawn from ``seed`` and the row alone. Neither the global random streams nor that of a
    collator with a seed of its own move. Samples that the collator gives no labels either are returned as they are.
    ``has_decoder``: see ``calibration.read_samples``.

    Raises:
        LayerselError: if the collator cannot do without labels.
    """
    collate = copy.copy(collate)
    if isinstance(collate, DataCollatorForLanguageModeling):
        collate.seed = collate.generator = None
    with keep_random_state():
        return [
            label_sample(sample, collate, seed, has_decoder)
            if sample.labels is None and sample.make_inputs is None
            else sample
            for sample in samples
        ]


def label_sample(
    sample: Sample, collate: Callable[[list[dict[str, Any]]], Any], seed: int, has_decoder: bool = False
) -> Sample:
    """Return one sample as ``collate`` makes a batch of it, see ``label_samples``; this moves the random streams."""
    length = len(sample.input_ids)
    row: dict[str, Any] = {"input_ids": sample.input_ids, "attention_mask": [1] * length}
    if sample.token_type_ids is not None:
        row["token_type_ids"] = sample.token_type_ids
    seed_by_row(seed, sample.row)
    try:
        batch = collate([row])
    except (KeyError, TypeError, ValueError) as error:
        raise LayerselError(
            f"data_collator: training row {sample.row} has no labels, and {type(collate).__name__} makes no batch "
            f"without them ({type(error).__name__}: {error}). Give the rows labels, or use a method that reads none, "
            "such as cka."
        ) from error
    labels, ids = batch.get("labels"), batch["input_ids"][0].tolist()
    if labels is None:
        return sample
    mask = batch["attention_mask"][0].tolist() if "attention_mask" in batch else None
    labels = labels[0].tolist()
    (ids,) = drop_padding(mask, ids)
    if not has_decoder:
        (labels,) = drop_padding(mask, labels)
    return Sample(sample.row, ids, labels, sample.token_type_ids, sample.decoder_input_ids)
