"""Small models and rows of every kind of label."""

import torch

from helpers.models import make_lora, make_rows, make_small_bert, make_small_llama


def make_rows_of(kind: str) -> list[dict]:
    """Return rows with labels for models of ``kind``, and with two segments for BERT."""
    rows = make_rows()
    for number, row in enumerate(rows):
        length = len(row["input_ids"])
        if "Bert" in kind:
            row["token_type_ids"] = [0] * 3 + [1] * (length - 3)
        if kind == "BertForMaskedLM":
            row["labels"] = [token if i % 3 == 1 else -100 for i, token in enumerate(row["input_ids"])]
        elif kind == "BertForTokenClassification":
            row["labels"] = [token % 3 if i % 2 else -100 for i, token in enumerate(row["input_ids"])]
        elif kind.endswith("several classes"):
            row["labels"] = [float(number % 2), 1.0, 0.0]
        elif kind.endswith("a number"):
            row["labels"] = number / 10
        elif "Sequence" in kind:
            row["labels"] = number % 3
    return rows


def make_labelled(kind: str):
    """Return a small model of ``kind`` with LoRA."""
    name = kind.split(":")[0]
    if name == "LlamaForSequenceClassification":
        from transformers import LlamaConfig, LlamaForSequenceClassification

        torch.manual_seed(0)
        size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 4}
        base = LlamaForSequenceClassification(
            LlamaConfig(vocab_size=97, num_labels=3, pad_token_id=0, num_key_value_heads=2, **size)
        )
    elif "Bert" in name:
        base = make_small_bert(name, num_labels=1 if kind.endswith("a number") else 3)
    else:
        base = make_small_llama()
    return make_lora(base, ["query", "value"] if "Bert" in name else ["q_proj", "v_proj", "down_proj"])


# The number of terms in the model's own mean loss of one row.
TERMS = {
    "LlamaForCausalLM": lambda labels: (labels[:, 1:] != -100).sum(),
    "BertForMaskedLM": lambda labels: (labels != -100).sum(),
    "BertForTokenClassification": lambda labels: (labels != -100).sum(),
    "LlamaForSequenceClassification": lambda labels: 1,
    "BertForSequenceClassification: a class": lambda labels: 1,
    "BertForSequenceClassification: several classes": lambda labels: 3,
    "BertForSequenceClassification: a number": lambda labels: 1,
}
