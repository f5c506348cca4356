"""The rows that models train and are tested on, and general text that tells what they forget."""

import csv
import json
import random
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

IGNORED = -100


def read_rows(path: Path, tokenizer: Any, longest: int) -> list[dict[str, Any]]:
    """Return the rows of a file, questions with answers or sentences with labels, as tokens and labels."""
    if path.suffix == ".tsv":
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file, delimiter="\t"))
        ids = tokenizer([line["sentence"] for line in lines], truncation=True, max_length=longest)["input_ids"]
        return [make_row(tokens, int(line["label"])) for tokens, line in zip(ids, lines)]
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        question = tokenizer(f"Question: {row['question']}\nAnswer:", add_special_tokens=False)["input_ids"]
        answer = tokenizer(f" {row['answer']}", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        if len(question) < longest:
            labels = [IGNORED] * len(question) + answer
            rows.append(make_row((question + answer)[:longest], labels[:longest]))
    return rows


def read_text(path: Path, tokenizer: Any, longest: int, count: int) -> list[dict[str, Any]]:
    """Return ``count`` pieces of a text of ``longest`` tokens each, evenly spread over it, with labels for all tokens.

    Raises:
        ValueError: if the text is too short for them.
    """
    ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < count * longest:
        raise ValueError(f"{path}: the text has {len(ids)} tokens, but {count} pieces of {longest} are asked for.")
    starts = [piece * (len(ids) // count) for piece in range(count)]
    return [make_row(ids[start : start + longest], ids[start : start + longest]) for start in starts]


def draw_rows(rows: list[dict[str, Any]], count: int, seed: int, drawn: bool) -> list[dict[str, Any]]:
    """Return the rows to train on: drawn by the seed if ``drawn``, otherwise the first ones.

    Raises:
        ValueError: if there are fewer.
    """
    if drawn and count > len(rows):
        raise ValueError(f"--rows: {count} is more than the {len(rows)} rows that are not held out.")
    return random.Random(seed).sample(rows, count) if drawn else rows[:count]


def make_row(ids: list[int], labels: int | list[int]) -> dict[str, Any]:
    """Return a row of a dataset."""
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return rows as a batch, padded on the right."""
    if isinstance(batch[0]["labels"], int):
        fill = {"input_ids": 0, "attention_mask": 0}
    else:
        fill = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    filled = {key: pad_sequence([torch.tensor(row[key]) for row in batch], True, value) for key, value in fill.items()}
    return {"labels": torch.tensor([row["labels"] for row in batch])} | filled if len(fill) == 2 else filled
