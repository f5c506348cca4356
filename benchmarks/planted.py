"""A task whose answer is known: two layers of a pre-trained model are damaged, and training has to repair them.

The base learns word problems, with one token per character. It is small enough to need all of its layers.
"""

import random

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from demo.prepare import write_problems

LAYERS, LENGTH = 8, 96
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_text() -> torch.Tensor:
    """Return the tokens that the base is trained on: (characters,), int64."""
    problems = (f"{row['instruction']}\n{row['output']}\n" for row in write_problems(6000, seed=5))
    return torch.tensor(list("".join(problems).encode()))


def draw_passages(text: torch.Tensor, count: int, seed: int) -> list[list[int]]:
    """Return ``count`` passages of ``LENGTH`` tokens."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - LENGTH, (count,), generator=generator).tolist()
    return [text[start : start + LENGTH].tolist() for start in starts]


def make_rows(text: torch.Tensor, count: int, seed: int) -> list[dict[str, list[int]]]:
    """Return passages as rows of a training set."""
    passages = draw_passages(text, count, seed)
    return [{"input_ids": ids, "attention_mask": [1] * LENGTH, "labels": ids} for ids in passages]


def make_model() -> LlamaForCausalLM:
    """Return the base before pre-training."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def pretrain(text: torch.Tensor) -> dict[str, torch.Tensor]:
    """Pre-train the base for half a minute on one CPU core, and return its weights.

    Raises:
        RuntimeError: if the loss stays too high.
    """
    model, steps, batch = make_model(), 300, 8
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 20) * (1 - 0.9 * step / steps)
    )
    passages = torch.tensor(draw_passages(text, steps * batch, seed=0))
    for rows in passages.split(batch):
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    if loss.item() >= 0.7:
        raise RuntimeError(f"the base ended at a loss of {loss.item():.3f}, not below 0.7")
    return model.state_dict()


def draw_damaged(seed: int) -> list[int]:
    """Return the two layers that are damaged."""
    return sorted(random.Random(seed).sample(range(LAYERS), 2))


@torch.no_grad()
def make_damaged(base: dict[str, torch.Tensor], seed: int) -> LlamaForCausalLM:
    """Return the base with two damaged layers.

    A random matrix of rank 8 and of twice the weight's norm is added to each linear weight of them.
    """
    model = make_model()
    model.load_state_dict(base)
    generator = torch.Generator().manual_seed(seed)
    for layer in draw_damaged(seed):
        for module in model.model.layers[layer].modules():
            if isinstance(module, nn.Linear):
                rows, columns = module.weight.shape
                noise = torch.randn(rows, 8, generator=generator) @ torch.randn(8, columns, generator=generator)
                module.weight += noise * (2 * module.weight.norm() / noise.norm())
    return model
