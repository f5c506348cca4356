"""Ranks in proportion to the sensitivity of the weights, as GoRA (arXiv 2502.12171, section 3.2) scores them.

The sensitivity of a weight W is the mean of |W ∘ G| over its entries, where G is the gradient of the mean loss by W. It
needs the whole gradient of every weight, as much memory as the model, so it is here to be compared and not a method of
the package.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from axolotl_layersel.selection.ranks import share_by_score
from benchmarks.held_out.rows import collate

HIGHEST = 4  # times lora_r, as in the package
LOWEST = 1


def find_ranks(base: Any, targets: Collection[str], lora_r: int, rows: list[dict[str, Any]]) -> dict[str, int]:
    """Return the rank of each target module by its name, with at most the parameters of LoRA with ``lora_r`` in all."""
    modules = {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and any(f".{name}".endswith(f".{target}") for target in targets)
    }
    costs = {name: module.in_features + module.out_features for name, module in modules.items()}
    scores = measure_sensitivity(base, modules, rows)
    return share_by_score(scores, costs, lora_r * sum(costs.values()), LOWEST, HIGHEST * lora_r)


def measure_sensitivity(base: Any, modules: dict[str, nn.Linear], rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the mean of |W ∘ G| of each module; G is the mean gradient over ``rows`` of a row's mean loss."""
    weights = [module.weight for module in modules.values()]
    gradients = [torch.zeros_like(weight) for weight in weights]
    base.eval()
    for row in rows:
        batch = {key: value.to(base.device) for key, value in collate([row]).items()}
        for sum_of, gradient in zip(gradients, torch.autograd.grad(base(**batch).loss, weights)):
            sum_of += gradient / len(rows)
    return {
        name: float((weight.detach() * gradient).abs().mean())
        for name, weight, gradient in zip(modules, weights, gradients)
    }
