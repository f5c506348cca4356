"""Rows that only the trainer's collator makes tokens and pixels of, as in multimodal runs.

Relied on in transformers 5.16.1: the names of image and video inputs begin with ``pixel_values``. Each row is a batch
of its own, because the layout of larger batches depends on the collator.
"""

import copy
import functools
import hashlib
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy
import torch

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.randomness import keep_random_state
from axolotl_layersel.selection.data.calibration import PIXELS, Sample
from axolotl_layersel.selection.data.label_alignment import LABEL_COLUMNS

Collate = Callable[[list[dict[str, Any]]], Any]


def seed_by_row(seed: int, row: int) -> None:
    """Seed all global random streams by ``seed`` and the position of a row."""
    drawn = random.Random(f"{seed} {row}").getrandbits(32)
    random.seed(drawn)
    numpy.random.seed(drawn)
    torch.manual_seed(drawn)


def collate_row(dataset: Any, row: int, collate: Collate, seed: int) -> dict[str, Any]:
    """Return the batch that ``collate`` makes of one row of a data set, the same each time, without padding.

    Tensors with a value for each token are (1, tokens). The global random streams do not change.

    Raises:
        LayerselError: if the collator makes no tokens of it.
    """
    # A copy, because some collators change rows in place.
    with keep_random_state():
        seed_by_row(seed, row)
        try:
            batch = dict(collate([copy.deepcopy(dataset[row])]))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise LayerselError(
                f"datasets: training row {row} has no token ids, and {type(collate).__name__} makes no batch of it "
                f"({type(error).__name__}: {error}). Give the trainer a collator that does, or use a method that needs "
                "no data: random, first, last, explicit."
            ) from error
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or len(ids) != 1:
        raise LayerselError(
            f"datasets: {type(collate).__name__} makes no input_ids of one row out of training row {row} alone. Use a "
            "method that needs no data: random, first, last, explicit."
        )
    if not isinstance(mask, torch.Tensor) or mask.shape != ids.shape:
        return batch
    kept = mask[0].bool()
    return {
        key: value[:, kept] if isinstance(value, torch.Tensor) and value.shape == ids.shape else value
        for key, value in batch.items()
    }


def read_collated(dataset: Any, row: int, collate: Collate, seed: int) -> Sample:
    """Return one row of a data set as a sample, whose pixels are computed again whenever they are needed.

    Raises:
        LayerselError: if the collator makes no tokens of it.
    """
    batch = collate_row(dataset, row, collate, seed)
    labels = next((batch[column] for column in LABEL_COLUMNS if batch.get(column) is not None), None)
    return Sample(
        row=row,
        input_ids=batch["input_ids"][0].tolist(),
        labels=None if labels is None else labels[0].tolist(),
        pixels=digest_pixels(batch),
        make_inputs=functools.partial(make_inputs, dataset, row, collate, seed),
    )


def make_inputs(dataset: Any, row: int, collate: Collate, seed: int) -> dict[str, Any]:
    """Return the collator's batch of one row without the labels."""
    batch = collate_row(dataset, row, collate, seed)
    return {key: value for key, value in batch.items() if key not in LABEL_COLUMNS}


def digest_pixels(batch: Mapping[str, Any]) -> str | None:
    """Return the SHA-256 of the pixels in a batch, None without any."""
    names = sorted(name for name, value in batch.items() if name.startswith(PIXELS) and value is not None)
    if not names:
        return None
    digest = hashlib.sha256()
    for name in names:
        for tensor in [batch[name]] if isinstance(batch[name], torch.Tensor) else batch[name]:
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()
