"""LoRA modules of other ranks than the one that they were built with, before anything trains."""

import copy

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.lora.modules import count_experts, find_key, get_linears
from axolotl_layersel.lora.patterns import write_pattern
from axolotl_layersel.lora.run import Run
from axolotl_layersel.lora.weights import initialize_module


@torch.no_grad()
def set_ranks(run: Run, ranks: dict[str, int], seed: int, continues_adapter: bool) -> None:
    """Give LoRA modules their ranks, with new weights drawn from ``seed``; their scaling stays what it is.

    Args:
        run: before its optimizer and its engine are built.
        ranks: by module; those that are not listed stay as they are.
        seed: of the initial weights.
        continues_adapter: the weights are a trained adapter's, and must have these ranks.

    Raises:
        LayerselError: if they have not.
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
        scaling = module.scaling[adapter]
        resize_linear(down, 0, rank * experts)
        resize_linear(up, 1, rank * experts)
        module.r[adapter] = rank
        module.lora_alpha[adapter] = scaling * rank
        initialize_module(run.model, name, module, seed)
    run.model.peft_config[adapter] = describe_ranks(run.config, modules, adapter)


def check_trained_rank(name: str, trained: int, planned: int) -> None:
    """Raise LayerselError where a module of an adapter that is continued has another rank than the plan gives it."""
    if trained != planned:
        raise LayerselError(
            f"lora_model_dir: the adapter has rank {trained} in {name}, and the plan gives it {planned}. Give the plan "
            "of that adapter, or start without lora_model_dir."
        )


def resize_linear(linear: nn.Linear, dim: int, rank: int) -> None:
    """Let ``linear``, which is A with ``dim`` 0 or B with ``dim`` 1, have ``rank`` components, all zero."""
    shape = list(linear.weight.shape)
    shape[dim] = rank
    linear.weight = nn.Parameter(linear.weight.new_zeros(shape), requires_grad=linear.weight.requires_grad)
    if dim == 0:
        linear.out_features = rank
    else:
        linear.in_features = rank


def describe_ranks(config: LoraConfig, modules: dict[str, LoraLayer], adapter: str) -> LoraConfig:
    """Return a configuration from which PEFT builds modules of these ranks and scalings.

    ``lora_alpha`` over ``r`` is the scaling of all modules, where they have one: programs that read no patterns, and
    take a module's rank from its tensors, are right too.
    """
    config = copy.copy(config)
    ranks = {find_key(name, module): module.r[adapter] for name, module in modules.items()}
    alphas = {find_key(name, module): module.scaling[adapter] * module.r[adapter] for name, module in modules.items()}
    highest = max(ranks, key=lambda name: ranks[name])
    config.r, config.lora_alpha = ranks[highest], alphas[highest]
    config.use_rslora = False
    config.rank_pattern = write_pattern({name: rank for name, rank in ranks.items() if rank != config.r})
    config.alpha_pattern = write_pattern({name: alpha for name, alpha in alphas.items() if alpha != config.lora_alpha})
    return config
