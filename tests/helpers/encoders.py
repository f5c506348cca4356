"""Small random encoders of every architecture and task, with rows that have the task's labels."""

import copy
import functools

import pytest
import torch
import transformers

from helpers.models import make_lora

TOKENS = {"vocab_size": 97, "max_position_embeddings": 64, "pad_token_id": 0}
SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 4, **TOKENS}
# As in the checkpoints of DeBERTa-v3.
DEBERTA = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "type_vocab_size": 0,
    "pooler_hidden_size": 32,
}
MODERN = {"global_attn_every_n_layers": 3, "local_attention": 8, "bos_token_id": 2, "eos_token_id": 3}
DISTILLED = {"dim": 32, "hidden_dim": 48, "n_heads": 4, "n_layers": 4, **TOKENS}
# By the names of transformers' classes: the settings, the modules that get LoRA, and the path of the layers.
ARCHITECTURES = {
    "Bert": (SIZE, ["query", "value"], "bert.encoder.layer"),
    "Roberta": (SIZE, ["query", "value"], "roberta.encoder.layer"),
    "DebertaV2": ({**SIZE, **DEBERTA}, ["query_proj", "value_proj"], "deberta.encoder.layer"),
    "Electra": ({**SIZE, "embedding_size": 16}, ["query", "value"], "electra.encoder.layer"),
    "ModernBert": (
        {**SIZE, **MODERN, "cls_token_id": 2, "sep_token_id": 3},
        ["attn.Wqkv", "attn.Wo"],
        "model.layers",
    ),
    "DistilBert": (DISTILLED, ["q_lin", "v_lin"], "distilbert.transformer.layer"),
    "XLMRoberta": (SIZE, ["query", "value"], "roberta.encoder.layer"),
}
ALBERT = {"Albert": ({**SIZE, "embedding_size": 16}, ["query", "value"], "albert.encoder")}
# By the end of the name of a class of transformers: the task type of PEFT.
TASKS = {"SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS", "MaskedLM": None}


@functools.cache
def make_base(name: str, task: str):
    settings, _, _ = {**ARCHITECTURES, **ALBERT}[name]
    torch.manual_seed(0)
    # Weights so large that layers differ, and that the logits change without one.
    config = getattr(transformers, f"{name}Config")(num_labels=3, initializer_range=0.1, **settings)
    return getattr(transformers, f"{name}For{task}")(config)


def make_encoder(name: str, task: str):
    """Return a new model without LoRA, the same each time."""
    return copy.deepcopy(make_base(name, task))


def make_lora_encoder(name: str, task: str):
    """Return a model with LoRA, as PEFT puts it on a model for this task, and a classifier that trains whole."""
    return make_lora(make_encoder(name, task), {**ARCHITECTURES, **ALBERT}[name][1], task_type=TASKS[task])


def make_task_rows(task: str, count: int = 12) -> list[dict]:
    """Return rows of different lengths, from token 2 to token 3, with the labels of ``task``."""
    generator, rows = torch.Generator().manual_seed(1), []
    for number in range(count):
        length = int(torch.randint(6, 14, (1,), generator=generator))
        ids = [2, *torch.randint(5, 97, (length,), generator=generator).tolist(), 3]
        labels = {
            "SequenceClassification": number % 3,
            "TokenClassification": [-100, *[token % 3 for token in ids[1:-1]], -100],
            "MaskedLM": [token if place % 3 == 1 else -100 for place, token in enumerate(ids)],
        }[task]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return rows


def check_gradients(squares: torch.Tensor, sketches: list[torch.Tensor], found: list[tuple[torch.Tensor, ...]]) -> None:
    """Compare the results of fisher, by sample and module, and of gradient, by module, with gradients of each sample.

    Sketches are as wide as the modules' inputs, so they have the norm of the gradient.
    """
    for measured, gradients in zip(squares, found, strict=True):
        expected = [value.square().sum().item() for value in gradients]
        assert measured.tolist() == pytest.approx(expected, rel=1e-4)
        assert min(expected) > 0
    for sketch, gradients in zip(sketches, zip(*found, strict=True), strict=True):
        assert float(sketch.sum(dim=0).norm()) == pytest.approx(float(sum(gradients).norm()), rel=1e-4)
