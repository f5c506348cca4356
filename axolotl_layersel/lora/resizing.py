"""Change the ranks of LoRA modules before training."""

import copy
import math
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.lora.modules import count_experts, find_key, get_linears
from axolotl_layersel.lora.patterns import scale_by_rank, write_pattern
from axolotl_layersel.lora.run import Run
from axolotl_layersel.lora.weights import initialize_module


@torch.no_grad()
def set_ranks(run: Run, ranks: dict[str, int], seed: int, continues_adapter: bool, exponent: float = 0) -> None:
    """Set the ranks of LoRA modules and draw new weights from ``seed``.

    Args:
        run: a run without an optimizer or a built engine.
        ranks: ranks by module; other modules are unchanged.
        seed: seed of the initial weights.
        continues_adapter: the weights are those of a trained adapter, which must have these ranks.
        exponent: how the scaling follows the rank, see ``patterns.scale_by_rank``; 0 leaves it as it is.

    Raises:
        LayerselError: if a trained adapter has other ranks.
    """
    adapter, modules = run.adapter, run.lora_modules
    for name, rank in ranks.items():
        module = modules[name]
        experts = count_experts(module)
        down, up = get_linears(module, adapter)
        if continues_adapter:
            check_trained_rank(name, module.r[adapter], rank)
        if run.engine.find_shape(down.weight)[0] == rank * experts:
            continue
        scaling = scale_by_rank(module.scaling[adapter], module.r[adapter], rank, exponent)
        resize_linear(down, 0, rank * experts)
        resize_linear(up, 1, rank * experts)
        module.r[adapter] = rank
        set_scaling(module, adapter, scaling)
        initialize_module(run.model, name, module, seed)
    run.model.peft_config[adapter] = describe_ranks(run.config, modules, adapter)


def set_scaling(module: LoraLayer, adapter: str, scaling: float) -> None:
    """Set the scaling of a LoRA module, and its alpha accordingly."""
    module.scaling[adapter] = scaling
    module.lora_alpha[adapter] = scaling * module.r[adapter]


def check_trained_rank(name: str, trained: int, planned: int) -> None:
    """Raise LayerselError if a module of a continued adapter does not have the rank of the plan."""
    if trained != planned:
        raise LayerselError(
            f"lora_model_dir: the adapter has rank {trained} in {name}, but the plan says {planned}. Give the plan "
            "of that adapter, or start without lora_model_dir."
        )


def resize_linear(linear: nn.Linear, dim: int, rank: int) -> None:
    """Resize A (``dim`` 0) or B (``dim`` 1) to ``rank`` components of zeros."""
    shape = list(linear.weight.shape)
    shape[dim] = rank
    linear.weight = nn.Parameter(linear.weight.new_zeros(shape), requires_grad=linear.weight.requires_grad)
    if dim == 0:
        linear.out_features = rank
    else:
        linear.in_features = rank


def describe_ranks(config: LoraConfig, modules: dict[str, LoraLayer], adapter: str) -> LoraConfig:
    """Return a configuration from which PEFT builds modules of these ranks and scalings.

    If all modules share a scaling, ``lora_alpha`` / ``r`` equals it, so programs that ignore both patterns scale
    correctly. Programs that divide ``lora_alpha`` by the rank of a module's tensors do not; they need an export. With
    a ``scaling_exponent`` of 1 it is the reverse, and between 0 and 1 both need one.
    """
    config = copy.copy(config)
    keyed = {find_key(name, module): module for name, module in modules.items()}
    ranks = {key: module.r[adapter] for key, module in keyed.items()}
    alphas = {key: round_whole(module.scaling[adapter] * module.r[adapter]) for key, module in keyed.items()}
    highest = max(ranks, key=lambda name: ranks[name])
    top: Any = alphas[highest]  # PEFT declares a whole number and takes any
    config.r, config.lora_alpha = ranks[highest], top
    config.use_rslora = False
    config.rank_pattern = write_pattern({name: rank for name, rank in ranks.items() if rank != config.r})
    # With one alpha for all modules, scalings that follow the rank differ from it by rounding.
    others = {name: alpha for name, alpha in alphas.items() if not math.isclose(alpha, top, rel_tol=1e-12)}
    config.alpha_pattern = write_pattern(others)
    return config


def round_whole(value: float) -> float:
    """Return an alpha as an integer if it is one up to rounding: some programs read no other number."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-12) else value
