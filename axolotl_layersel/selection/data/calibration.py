"""The calibration sample: the training rows that are scored, and their batches."""

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import IterableDataset
from torch.nn.utils.rnn import pad_sequence

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.selection import Token
from axolotl_layersel.selection.data.label_alignment import IGNORED_LABEL, get_labels

# The prefix of the columns of images and videos.
PIXELS = "pixel_values"


@dataclass(frozen=True)
class Sample:
    """One training row, without padding.

    Attributes:
        row: its position in the training set.
        input_ids: its tokens.
        labels: of its tokens, −100 where not trained on, or of the whole row; None without any.
        token_type_ids: of its tokens, if the data set has them.
        decoder_input_ids: the input of a decoder with an encoder, see ``decoder_inputs``, which the labels belong to.
        pixels: the SHA-256 of its images, None without any.
        make_inputs: for rows that only a collator can tokenise, returns the model's inputs as a batch of one, see
            ``batch_rows``.
    """

    row: int
    input_ids: list[int]
    labels: Any = None
    token_type_ids: list[int] | None = None
    decoder_input_ids: list[int] | None = None
    pixels: str | None = None
    make_inputs: Callable[[], dict[str, Any]] | None = field(default=None, compare=False)

    def list_tokens(self, side: str = "") -> list[int]:
        """Return the tokens that one side of the model reads, see ``layers.Side``.

        A decoder without tokens of its own reads the row's, as in BART's classifier.
        """
        own = self.decoder_input_ids if side == "decoder" else None
        return self.input_ids if own is None else own


def draw_rows(num_rows: int, num_samples: int, seed: int) -> list[int]:
    """Return ``num_samples`` different rows of ``num_rows`` in the order drawn by ``seed``.

    Raises:
        LayerselError: if there are fewer rows.
    """
    if num_rows < num_samples:
        raise LayerselError(
            f"layersel.selection.num_samples: {num_samples} is more than the {num_rows} rows of the training set. "
            f"Set it to at most {num_rows}, or leave it out: by default all rows of a small set are scored."
        )
    return random.Random(seed).sample(range(num_rows), num_samples)


def read_samples(
    dataset: Any,
    num_samples: int,
    seed: int,
    has_decoder: bool = False,
    read_untokenised: Callable[[int], Sample] | None = None,
) -> list[Sample]:
    """Return the calibration sample of a training set.

    Args:
        dataset: a training set.
        num_samples: the number of rows to draw.
        seed: draws them.
        has_decoder: whether the model has an encoder and a decoder, so that labels belong to the decoder's tokens.
        read_untokenised: returns a row, by position, as a sample if it has no tokens, or has images too.

    Raises:
        LayerselError: if the set cannot be indexed, is too small, or its rows are not tokenised.
    """
    check_indexable(dataset, "datasets")
    rows = draw_rows(len(dataset), num_samples, seed)
    return [read_row(dataset, row, has_decoder, read_untokenised) for row in rows]


def read_row(
    dataset: Any, row: int, has_decoder: bool = False, read_untokenised: Callable[[int], Sample] | None = None
) -> Sample:
    """Return one row of a training set as ``read_samples`` does."""
    values = dataset[row]
    if read_untokenised is not None and (not has_tokens(values) or has_pixels(values)):
        return read_untokenised(row)
    return read_sample(values, row, has_decoder)


def check_indexable(dataset: object, key: str) -> None:
    """Raise LayerselError, naming ``key``, for a dataset whose rows cannot be drawn."""
    if dataset is None or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise LayerselError(
            f"{key}: {type(dataset).__name__} cannot be sampled by row. Load the dataset whole (no streaming), or "
            "use a method that needs no data: random, first, last, explicit."
        )


def has_tokens(values: Mapping[str, Any]) -> bool:
    """Return whether a row is tokenised; rows of multimodal sets only are once they become a batch."""
    return bool({"input_ids", "chosen_input_ids", "chosen_ids", "completion_ids"} & values.keys())


def has_pixels(values: Mapping[str, Any]) -> bool:
    """Return whether a row has preprocessed images."""
    return any(name.startswith(PIXELS) for name in values)


def read_sample(values: Mapping[str, Any], row: int, has_decoder: bool = False) -> Sample:
    """Return one row as a sample: of a preference row, its prompt and chosen answer.

    ``has_decoder``: see ``read_samples``.

    Raises:
        LayerselError: if the row has no tokens.
    """
    if not has_tokens(values):
        raise LayerselError(
            f"datasets: training rows have the columns {sorted(values)}, without token ids (multimodal sets, for "
            "one, are tokenised batch by batch). Use a method that needs no data: random, first, last, explicit."
        )
    columns = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in values.items()}
    types = decoder_ids = None
    if "input_ids" in columns:
        ids, labels, types = columns["input_ids"], get_labels(columns), columns.get("token_type_ids")
        mask, given = columns.get("attention_mask"), columns.get("decoder_input_ids") if has_decoder else None
        if has_decoder:
            ids, types = drop_padding(mask, ids, types)
            decoder_ids, labels = drop_padding(columns.get("decoder_attention_mask"), given, labels)
        else:
            ids, labels, types = drop_padding(mask, ids, labels, types)
    elif "chosen_input_ids" in columns:  # prompt and answer, of ORPO and SimPO
        ids, labels = columns["chosen_input_ids"], columns.get("chosen_labels")
    elif "prompt_ids" in columns:  # of DPO, and of KTO, whose answer may be a bad one
        prompt, answer = columns["prompt_ids"], columns["chosen_ids" if "chosen_ids" in columns else "completion_ids"]
        ids, labels = [*prompt, *answer], [*[IGNORED_LABEL] * len(prompt), *answer]
    else:  # prompt and answer, of reward models, which learn from pairs and have no labels
        ids, labels = columns["chosen_ids"], None
    if len(ids) == 0:
        raise LayerselError(f"datasets: training row {row} has no tokens. Remove empty rows.")
    return Sample(row=row, input_ids=list(ids), labels=labels, token_type_ids=types, decoder_input_ids=decoder_ids)


def drop_padding(mask: list[int] | None, *columns: Any) -> list[Any]:
    """Drop padding, where ``mask`` is 0, from each column; columns that are not per-token lists are unchanged."""
    if mask is None or all(mask):
        return list(columns)
    return [
        [value for value, is_token in zip(column, mask) if is_token]
        if isinstance(column, list) and len(column) == len(mask)
        else column
        for column in columns
    ]


def fingerprint(samples: list[Sample]) -> str:
    """Return the SHA-256 of the samples' token ids and images, in their order."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(repr(sample.input_ids).encode())
        if sample.pixels is not None:
            digest.update(sample.pixels.encode())
    return f"sha256:{digest.hexdigest()}"


def are_most(count: int, samples: int) -> bool:
    """Return whether ``count`` is nearly all of ``samples``: nine in ten."""
    return 10 * count >= 9 * samples


def find_ending(samples: list[Sample], side: str = "") -> list[int]:
    """Return the longest sequence of tokens that nearly all samples end in, each after at least one more token.

    A row that was cut at ``sequence_len`` lacks the ending of the others. ``side``: see ``Sample.list_tokens``.
    """
    ending: list[int] = []
    alike = [sample.list_tokens(side) for sample in samples]
    while True:
        place = len(ending) + 1
        longer = [ids for ids in alike if len(ids) > place]
        token, count = max(Counter(ids[-place] for ids in longer).items(), key=lambda item: item[1], default=(0, 0))
        if not are_most(count, len(samples)):
            return ending
        ending.insert(0, token)
        alike = [ids for ids in longer if ids[-place] == token]


def place_token(samples: list[Sample], token: Token, side: str = "") -> tuple[list[Sample], list[int] | None]:
    """Return the samples that can be compared at ``token``, and the position that stands for each of them.

    Positions are None for the mean over all tokens. ``ending`` is the last position before the ending that nearly all
    samples share: the embedding of a token that all rows end in says nothing about a row. Samples without that ending
    are left out, because their last token is of another kind.

    Args:
        samples: the samples.
        token: a result of ``row_token.find_token``.
        side: see ``Sample.list_tokens``.
    """
    if token == "mean":
        return samples, None
    if token == "cls":
        return samples, [0] * len(samples)
    ending = {"ending": lambda: find_ending(samples, side), "last": list}[token]()
    rows = [(sample, sample.list_tokens(side)) for sample in samples]
    kept = [(sample, ids) for sample, ids in rows if len(ids) > len(ending) and ids[len(ids) - len(ending) :] == ending]
    return [sample for sample, _ in kept], [len(ids) - len(ending) - 1 for _, ids in kept]


def place_tokens(samples: list[Sample], tokens: Mapping[str, Token]) -> tuple[list[Sample], list[list[int] | None]]:
    """Return the samples that can be compared in all sides of a model, and their positions for each side.

    ``tokens``: the token that stands for a row, by side; see ``place_token``.
    """
    placed = [place_token(samples, token, side) for side, token in tokens.items()]
    rows = [{sample.row: i for i, sample in enumerate(kept)} for kept, _ in placed]
    compared = [sample for sample in samples if all(sample.row in places for places in rows)]
    return compared, [
        positions and [positions[places[sample.row]] for sample in compared]
        for places, (_, positions) in zip(rows, placed)
    ]


def count_most_common(samples: list[Sample], positions: list[int], side: str = "") -> int:
    """Return how many samples have the same token at their position, of the token of which most do.

    ``side``: whose tokens, see ``Sample.list_tokens``.
    """
    return max(Counter(sample.list_tokens(side)[i] for sample, i in zip(samples, positions)).values())


def cut_sample(sample: Sample, tokens: int) -> Sample:
    """Return the first ``tokens`` tokens of a sample, without labels.

    The last of them is the row's own last one, which some classifiers look for.
    """

    def cut(values: list[int] | None) -> list[int] | None:
        return values if values is None or len(values) <= tokens else [*values[: tokens - 1], values[-1]]

    ids = cut(sample.input_ids)
    assert ids is not None, "a row has tokens"
    return Sample(
        sample.row, ids, token_type_ids=cut(sample.token_type_ids), decoder_input_ids=cut(sample.decoder_input_ids)
    )


def collate(samples: list[Sample], pad_token_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Return ``input_ids`` and ``attention_mask`` of shape (samples, longest), int64, padded on the right.

    ``token_type_ids`` too, where the samples have them, and ``decoder_input_ids`` and ``decoder_attention_mask``.
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
    if any(sample.decoder_input_ids is not None for sample in samples):
        rows = [sample.list_tokens("decoder") for sample in samples]
        batch["decoder_input_ids"] = pad(rows, pad_token_id)
        batch["decoder_attention_mask"] = pad([[1] * len(row) for row in rows], 0)
    return batch
