"""Labels that the trainer's collator makes, as for masked language models."""

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
    """Return the samples with the labels that the trainer's collator makes for those without any.

    The mask of a row depends only on ``seed`` and the row. The global random streams, and that of a collator with its
    own seed, do not change. Samples without labels from the collator are unchanged. ``has_decoder``: see
    ``calibration.read_samples``.

    Raises:
        LayerselError: if the collator needs labels.
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
    """Return one sample with labels, see ``label_samples``; this changes the random streams."""
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
