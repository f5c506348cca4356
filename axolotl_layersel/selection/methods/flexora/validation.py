"""The rows that the gates learn from, and their micro-batches."""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.flexora import describe_missing_eval_set
from axolotl_layersel.engines.collectives import get_rank
from axolotl_layersel.selection.data.calibration import check_indexable
from axolotl_layersel.selection.data.label_alignment import ROW, count_answered, get_labels

Row = dict[str, Any]


def hold_out(dataset: Sequence[Row], samples: int, least: int, seed: int, kind: str) -> tuple[list[int], list[int]]:
    """Return the rows to train on, ascending, and ``samples`` rows to validate on, in the order drawn by ``seed``.

    Args:
        dataset: tokenised rows; rows whose labels are all ignored are not validated on.
        samples: the number of validation rows.
        least: the number of rows that must be left to train on, see ``find_least``.
        seed: draws the rows.
        kind: the kind of labels, see ``label_alignment``.

    Raises:
        LayerselError: if too few rows are left.
    """
    key = "layersel.selection.flexora.val_samples"
    left, most = len(dataset) - samples, len(dataset) - least
    if left < least:
        third = max(min(len(dataset) // 3, most), 1)
        way_out = f"Set it to {third}, which leaves most of them to train on," if most > 0 else "Give more data,"
        raise LayerselError(
            f"{key}: {samples} of the {len(dataset)} training rows leaves {max(left, 0)} to train on, and the search "
            f"needs {least} or more. {way_out} or use `val_source: eval`."
        )
    validation = draw_labelled(dataset, samples, seed, kind)
    if len(validation) < samples:
        raise LayerselError(
            f"{key}: only {len(validation)} training rows have a label to learn, {samples} are to be held out. Lower "
            "it, or look at the labels of your data."
        )
    held = set(validation)
    return [row for row in range(len(dataset)) if row not in held], validation


def find_least(trainer: Trainer) -> int:
    """Return how many training rows a search needs: a batch of all processes, or half of a set of less than two.

    A loader that drops incomplete batches needs a whole one.
    """
    dataset: Any = trainer.train_dataset
    batch = trainer.args.train_batch_size * trainer.args.world_size
    return batch if trainer.args.dataloader_drop_last else min(batch, math.ceil(len(dataset) / 2))


def draw_labelled(dataset: Sequence[Row], samples: int, seed: int, kind: str) -> list[int]:
    """Return up to ``samples`` different rows with a label to learn, in an order drawn by ``seed``."""
    count = len(dataset)
    # Most rows have labels, so few rows of a large set are usually enough.
    drawn = min(count, 4 * samples)
    rows: list[int] = []
    for number in dict.fromkeys((drawn, count)):
        if len(rows) < samples:
            order = random.Random(seed).sample(range(count), number)
            rows = list(itertools.islice((row for row in order if has_target(dataset[row], kind)), samples))
    return rows


def has_target(row: Row, kind: str) -> bool:
    """Return whether a row has a label to learn, or no labels at all."""
    labels = get_labels(row)
    if labels is None:
        return True
    labels = torch.as_tensor(labels)
    if kind == ROW:
        return count_answered(labels.view(1, -1), kind) > 0
    return labels.dim() == 0 or count_answered(labels, kind) > 0


def find_eval_rows(eval_dataset: Any, samples: int, seed: int, kind: str) -> tuple[Sequence[Row], list[int]]:
    """Return the eval set, several as one, and up to ``samples`` of its rows drawn by ``seed``.

    Raises:
        LayerselError: if there is none, or it cannot be indexed.
    """
    key = "layersel.selection.flexora.val_source: 'eval'"
    parts = list_eval_sets(eval_dataset)
    if not parts:
        raise LayerselError(describe_missing_eval_set())
    for part in parts:
        check_indexable(part, key)
    eval_dataset = join_eval_sets(eval_dataset)
    rows = draw_labelled(eval_dataset, samples, seed, kind)
    if not rows:
        raise LayerselError(f"{key}: no row of the eval set has a label to learn. Use `val_source: train`.")
    return eval_dataset, rows


def list_eval_sets(eval_dataset: Any) -> list[Any]:
    """Return a trainer's eval sets."""
    parts = list(eval_dataset.values()) if isinstance(eval_dataset, dict) else [eval_dataset]
    return [part for part in parts if part is not None]


def join_eval_sets(eval_dataset: Any) -> Any:
    """Return a trainer's eval sets as one, or None without any, or if one cannot be indexed."""
    parts = list_eval_sets(eval_dataset)
    if not parts or not all(hasattr(part, "__len__") for part in parts):
        return None
    return parts[0] if len(parts) == 1 else torch.utils.data.ConcatDataset(parts)


def take_rows(dataset: Any, rows: list[int]) -> Any:
    """Return the part of ``dataset`` with these rows, in their order."""
    return dataset.select(rows) if isinstance(dataset, Dataset) else torch.utils.data.Subset(dataset, rows)


def draw_micro_batches(count: int, lengths: list[int] | None, size: int, seed: int) -> Iterator[list[int]]:
    """Yield micro-batches of the rows 0 to ``count`` − 1 endlessly, each pass over them in another order.

    Args:
        count: the number of rows.
        lengths: the tokens of each row, if rows are packed.
        size: the rows of a micro-batch, or with ``lengths`` its tokens; it has at least one row.
        seed: draws the orders.
    """
    generator = random.Random(seed)
    stream = (row for _ in itertools.count() for row in generator.sample(range(count), count))
    if lengths is None:
        while True:
            yield list(itertools.islice(stream, size))
    batch: list[int] = []
    tokens = 0
    for row in stream:
        if batch and tokens + lengths[row] > size:
            yield batch
            batch, tokens = [], 0
        batch.append(row)
        tokens += lengths[row]


class ValidationBatches:
    """An endless stream of validation micro-batches, collated as the trainer collates; each process has its share.

    Args:
        trainer: has the batch size and packing.
        rows: the validation rows.
        seed: draws their order.
    """

    def __init__(self, trainer: Trainer, rows: list[Row], seed: int) -> None:
        self.rows = rows
        arguments: Any = trainer.args
        lengths, size = None, arguments.per_device_train_batch_size
        if getattr(arguments, "sample_packing", False):
            lengths, size = [len(row["input_ids"]) for row in rows], size * arguments.max_seq_length
        stream = draw_micro_batches(len(rows), lengths, size, seed)
        self.stream = itertools.islice(stream, get_rank(), None, arguments.world_size)
        self.collate: Callable[[list[Row]], Any] | None = None
        self.columns: list[str] | None = None

    def follow(self, train_dataloader: Any) -> None:
        """Collate as ``train_dataloader`` does, with the columns of its rows."""
        self.collate = train_dataloader.collate_fn
        self.columns = getattr(train_dataloader.dataset, "column_names", None)

    def draw(self) -> Any:
        """Return this process's next micro-batch."""
        assert self.collate is not None, "follow a dataloader first"
        return self.collate([self.prepare(self.rows[index]) for index in next(self.stream)])

    def prepare(self, row: Row) -> Row:
        """Return a copy of ``row`` with the columns of the training rows; collators change rows in place."""
        if self.columns is None:
            return dict(row)
        row = {key: row[key] for key in self.columns if key in row}
        if "position_ids" in self.columns and "position_ids" not in row:
            # Rows of an eval set that is not packed have none; packed without them, rows would attend to each other.
            row["position_ids"] = list(range(len(row["input_ids"])))
        return row


def count_targets(inputs: Any, kind: str) -> int:
    """Return the number of labels, or of rows without labels, that the loss of a micro-batch averages over."""
    labels = inputs.get("labels")
    if labels is None:
        return len(next(value for value in inputs.values() if isinstance(value, torch.Tensor)))
    return count_answered(labels, kind)
