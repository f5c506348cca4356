"""The calibration sample: which training rows are scored, and how they become batches."""

import hashlib
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from datasets import IterableDataset
from torch.nn.utils.rnn import pad_sequence

from axolotl_layersel.errors import LayerselError
from axolotl_layersel.selection.args import Token
from axolotl_layersel.targets import IGNORED_LABEL, get_labels


@dataclass(frozen=True)
class Sample:
    """One training row, without padding.

    Attributes:
        row: its place in the training set.
        input_ids: its tokens.
        labels: of its tokens, −100 where not trained on; or of the whole row; None where it has none.
        token_type_ids: of its tokens, where the data set has them.
    """

    row: int
    input_ids: list[int]
    labels: Any = None
    token_type_ids: list[int] | None = None


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


def read_samples(dataset: Any, num_samples: int, seed: int) -> list[Sample]:
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


def has_tokens(values: Mapping[str, Any]) -> bool:
    """Return whether a row is tokenised: most are, those of multimodal sets only when they become a batch."""
    return bool({"input_ids", "chosen_input_ids", "chosen_ids", "completion_ids"} & values.keys())


def read_sample(values: Mapping[str, Any], row: int) -> Sample:
    """Return one row as a sample; a preference row stands for its prompt and chosen answer.

    Raises:
        LayerselError: if the row has no tokens.
    """
    if not has_tokens(values):
        raise LayerselError(
            f"datasets: training rows have the columns {sorted(values)}, without token ids (multimodal sets, for "
            "one, are tokenised batch by batch). Use a method that needs no data: random, first, last, explicit."
        )
    columns = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in values.items()}
    types = None
    if "input_ids" in columns:
        ids, labels, types = columns["input_ids"], get_labels(columns), columns.get("token_type_ids")
        ids, labels, types = drop_padding(columns.get("attention_mask"), ids, labels, types)
    elif "chosen_input_ids" in columns:  # prompt and answer, of ORPO and SimPO
        ids, labels = columns["chosen_input_ids"], columns.get("chosen_labels")
    elif "prompt_ids" in columns:  # of DPO, and of KTO, whose answer may be a bad one
        prompt, answer = columns["prompt_ids"], columns["chosen_ids" if "chosen_ids" in columns else "completion_ids"]
        ids, labels = [*prompt, *answer], [*[IGNORED_LABEL] * len(prompt), *answer]
    else:  # prompt and answer, of reward models, which learn from pairs and have no labels
        ids, labels = columns["chosen_ids"], None
    if len(ids) == 0:
        raise LayerselError(f"datasets: training row {row} has no tokens. Remove empty rows.")
    return Sample(row=row, input_ids=list(ids), labels=labels, token_type_ids=types)


def drop_padding(mask: list[int] | None, *columns: Any) -> list[Any]:
    """Return ``columns`` without the tokens where ``mask`` is 0; what is not a list of as many entries stays."""
    if mask is None or all(mask):
        return list(columns)
    return [
        [value for value, is_token in zip(column, mask) if is_token]
        if isinstance(column, list) and len(column) == len(mask)
        else column
        for column in columns
    ]


def fingerprint(samples: list[Sample]) -> str:
    """Return the SHA-256 of the samples' token ids, in their order."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(repr(sample.input_ids).encode())
    return f"sha256:{digest.hexdigest()}"


def are_most(count: int, samples: int) -> bool:
    """Return whether ``count`` of so many samples are nearly all of them: nine in ten."""
    return 10 * count >= 9 * samples


def find_ending(samples: list[Sample]) -> list[int]:
    """Return the longest run of tokens that nearly all samples end in, each after a token of its own.

    Nearly all and not all, for a row that was cut at ``sequence_len`` lacks the ending of the others.
    """
    ending: list[int] = []
    alike = [sample.input_ids for sample in samples]
    while True:
        place = len(ending) + 1
        longer = [ids for ids in alike if len(ids) > place]
        token, count = max(Counter(ids[-place] for ids in longer).items(), key=lambda item: item[1], default=(0, 0))
        if not are_most(count, len(samples)):
            return ending
        ending.insert(0, token)
        alike = [ids for ids in longer if ids[-place] == token]


def place_token(samples: list[Sample], token: Token) -> tuple[list[Sample], list[int] | None]:
    """Return the samples that can be compared at ``token``, and the position that stands for each of them.

    ``token`` is one that ``pooling.find_token`` returns. Positions are None for the mean over all tokens. ``ending`` is
    the last position before the ending that nearly all samples share: prepared rows end alike, and where all do, the
    embedding of that token says nothing. Samples without that ending are left out: their last token is not one of the
    same kind.
    """
    if token == "mean":
        return samples, None
    if token == "cls":
        return samples, [0] * len(samples)
    ending = {"ending": lambda: find_ending(samples), "last": list}[token]()
    ended = [sample for sample in samples if sample.input_ids[len(sample.input_ids) - len(ending) :] == ending]
    kept = [sample for sample in ended if len(sample.input_ids) > len(ending)]
    return kept, [len(sample.input_ids) - len(ending) - 1 for sample in kept]


def count_most_common(samples: list[Sample], positions: list[int]) -> int:
    """Return how many samples have the same token at their position, of the token of which most do."""
    return max(Counter(sample.input_ids[i] for sample, i in zip(samples, positions)).values())


def cut_sample(sample: Sample, tokens: int) -> Sample:
    """Return the first ``tokens`` tokens of a sample, without labels."""
    types = sample.token_type_ids and sample.token_type_ids[:tokens]
    return Sample(sample.row, sample.input_ids[:tokens], token_type_ids=types)


def collate(samples: list[Sample], pad_token_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Return ``input_ids`` and ``attention_mask`` of shape (samples, longest), int64, padded on the right.

    ``token_type_ids`` too, where the samples have them.
    """

    def pad(rows: list[list[int]], value: int) -> torch.Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value).to(device)

    batch = {
        "input_ids": pad([sample.input_ids for sample in samples], pad_token_id),
        "attention_mask": pad([[1] * len(sample.input_ids) for sample in samples], 0),
    }
    if any(sample.token_type_ids for sample in samples):
        types = [sample.token_type_ids or [0] * len(sample.input_ids) for sample in samples]
        batch["token_type_ids"] = pad(types, 0)
    return batch
