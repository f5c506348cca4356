"""The calibration sample: which training rows are scored, and how they become batches."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from datasets import IterableDataset
from torch.nn.utils.rnn import pad_sequence

from axolotl_layersel.errors import LayerselError

IGNORED_LABEL = -100


@dataclass(frozen=True)
class Sample:
    """One training row: its place in the training set, its token ids and labels (−100 where not trained on)."""

    row: int
    input_ids: list[int]
    labels: list[int] | None


def draw_rows(num_rows: int, num_samples: int, seed: int) -> list[int]:
    """Return ``num_samples`` different rows of ``num_rows``, drawn by ``seed``, in the order drawn.

    Raises:
        LayerselError: if there are fewer rows.
    """
    if num_rows < num_samples:
        raise LayerselError(
            f"layersel.selection.num_samples: {num_samples} is more than the {num_rows} rows of the training set. "
            f"Set it to at most {num_rows}, or give more data."
        )
    return random.Random(seed).sample(range(num_rows), num_samples)


def read_samples(dataset: object, num_samples: int, seed: int) -> list[Sample]:
    """Return the calibration sample of a tokenised training set.

    Raises:
        LayerselError: if the set cannot be indexed, is too small, or its rows are not tokenised.
    """
    check_indexable(dataset, "datasets")
    return [read_sample(dataset[row], row) for row in draw_rows(len(dataset), num_samples, seed)]


def check_indexable(dataset: object, key: str) -> None:
    """Raise LayerselError, naming ``key``, for a dataset whose rows cannot be drawn."""
    if dataset is None or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise LayerselError(
            f"{key}: {type(dataset).__name__} cannot be sampled by row. Load the dataset whole (no streaming), or "
            "use a method that needs no data: random, first, last, explicit."
        )


def read_sample(values: dict, row: int) -> Sample:
    """Return one row as a sample; a preference row stands for its prompt and chosen answer.

    Raises:
        LayerselError: if the row has no tokens.
    """
    if "input_ids" in values:
        ids, labels = values["input_ids"], values.get("labels")
    elif "prompt_ids" in values and ("chosen_ids" in values or "completion_ids" in values):
        prompt, chosen = list(values["prompt_ids"]), list(values.get("chosen_ids") or values["completion_ids"])
        ids, labels = prompt + chosen, [IGNORED_LABEL] * len(prompt) + chosen
    else:
        raise LayerselError(
            f"datasets: training rows have the columns {sorted(values)}, without token ids (multimodal sets, for "
            "one, are tokenised batch by batch). Use a method that needs no data: random, first, last, explicit."
        )
    if len(ids) == 0:
        raise LayerselError(f"datasets: training row {row} has no tokens. Remove empty rows.")
    labels = list(labels) if isinstance(labels, Sequence) and len(labels) == len(ids) else None
    return Sample(row=row, input_ids=list(ids), labels=labels)


def fingerprint(samples: list[Sample]) -> str:
    """Return the SHA-256 of the samples' token ids, in their order."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(repr(sample.input_ids).encode())
    return f"sha256:{digest.hexdigest()}"


def count_shared_suffix(samples: list[Sample]) -> int:
    """Return how many tokens at the end are the same in all samples (at most the shortest sample's length)."""
    reversed_ids = [sample.input_ids[::-1] for sample in samples]
    shared = 0
    for tokens in zip(*reversed_ids):
        if any(token != tokens[0] for token in tokens):
            break
        shared += 1
    return shared


def find_token_positions(samples: list[Sample], token: str) -> list[int] | None:
    """Return the position of the token that stands for each sample, or None for the mean of all its tokens.

    ``auto`` is the last position before the suffix that all samples share: prepared rows end alike, and where
    all do, the embedding of that token says nothing.
    """
    if token == "mean":
        return None
    if token == "cls":
        return [0] * len(samples)
    skipped = count_shared_suffix(samples) if token == "auto" else 0
    return [max(len(sample.input_ids) - 1 - skipped, 0) for sample in samples]


def collate(samples: list[Sample], pad_token_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Return ``input_ids`` and ``attention_mask`` of shape (samples, longest), int64, padded on the right."""
    ids = [torch.tensor(sample.input_ids) for sample in samples]
    masks = [torch.ones(len(row), dtype=torch.int64) for row in ids]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_token_id).to(device),
        "attention_mask": pad_sequence(masks, batch_first=True, padding_value=0).to(device),
    }
