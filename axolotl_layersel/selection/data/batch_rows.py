"""Rows that become tokens and pixels only as the trainer's own collator makes a batch of them, as in multimodal runs.

Relied on in transformers 5.16.1: what models make hidden states of images and videos from is called ``pixel_values``,
or begins with that. A row is a batch of its own, for what batches of several rows look like depends on the collator.
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
    """Let all global random streams begin with ``seed`` and a row's place alone."""
    drawn = random.Random(f"{seed} {row}").getrandbits(32)
    random.seed(drawn)
    numpy.random.seed(drawn)
    torch.manual_seed(drawn)


def collate_row(dataset: Any, row: int, collate: Collate, seed: int) -> dict[str, Any]:
    """Return what ``collate`` makes of one row of a data set, the same each time, without what fills it up.

    What has a value for each token is (1, tokens). The global random streams do not move.

    Raises:
        LayerselError: if the collator makes no tokens of it.
    """
    # Some collators change rows in place, and images are opened as they are read.
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
    """Return one row of a data set as a sample, whose pixels are made again each time that they are needed.

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
    """Return what the model is given of a row, whatever the collator returns, but for the labels."""
    batch = collate_row(dataset, row, collate, seed)
    return {key: value for key, value in batch.items() if key not in LABEL_COLUMNS}


def digest_pixels(batch: Mapping[str, Any]) -> str | None:
    """Return the SHA-256 of the pixels in a batch, None where it has none."""
    names = sorted(name for name, value in batch.items() if name.startswith(PIXELS) and value is not None)
    if not names:
        return None
    digest = hashlib.sha256()
    for name in names:
        for tensor in [batch[name]] if isinstance(batch[name], torch.Tensor) else batch[name]:
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()
