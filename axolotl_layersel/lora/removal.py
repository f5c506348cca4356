"""Remove or freeze the LoRA of modules."""

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.initialisation import RESTORED, changes_base, describe_rounding
from axolotl_layersel.engines import edits
from axolotl_layersel.lora.config import name_exactly
from axolotl_layersel.lora.layers import LayerStack
from axolotl_layersel.lora.modules import find_key, get_linears
from axolotl_layersel.lora.run import Run
from axolotl_layersel.lora.weights import get_initialisation, lora_parameters


def find_others(stack: LayerStack, kept: list[str]) -> list[str]:
    """Return the names of the layers' LoRA modules without those ``kept``."""
    staying = set(kept)
    return [name for name in stack.list_modules(stack.lora_modules) if name not in staying]


def remove_unselected(run: Run, stack: LayerStack, kept: list[str]) -> None:
    """Replace the layers' LoRA modules by their base modules, except those ``kept``."""
    remove_modules(run, find_others(stack, kept))


def remove_modules(run: Run, removed: list[str]) -> None:
    """Replace the LoRA modules named ``removed`` by their base modules, before LoRA has trained.

    A module that another adapter uses keeps that adapter's LoRA. Afterwards the configuration names exactly the modules
    that carry the adapter, so that stock PEFT rebuilds them.

    Raises:
        LayerselError: if PEFT has changed a base weight that cannot be restored, or that another adapter reads.
    """
    base, lora = run.base, run.lora_modules
    restores, gone = changes_base(run.config.init_lora_weights), set(removed)
    if restores and removed:
        check_base_unshared(run)
    for name in removed:
        parent, _, child = name.rpartition(".")
        if child == "base_layer" and parent in lora:
            assert parent in gone, "LoRA on the parameters of one module is removed together"
            continue  # removed together with the module around it
        if restores:
            restore_base(run, name, lora[name])
        freeze_bias(run, lora[name])
        if has_others(lora[name], run.adapter):
            remove_adapter(lora[name], run.adapter)
        else:
            setattr(base.get_submodule(parent), child, lora[name].get_base_layer())
    keys = {find_key(name, lora[name]) for name in removed if not has_others(lora[name], run.adapter)}
    tuner: Any = run.model.base_model
    tuner.targeted_module_names = [name for name in tuner.targeted_module_names if name not in keys]
    tuner.targeted_parameter_names = [name for name in tuner.targeted_parameter_names if name not in keys]
    name_exactly(run.config, base, run.adapter)


def has_others(module: LoraLayer, adapter: str) -> bool:
    return any(name != adapter for name in module.r)


def remove_adapter(module: LoraLayer, adapter: str) -> None:
    """Remove the LoRA of ``adapter`` from a module that other adapters use, without activating one of them."""
    parts: Any = module  # LoraLayer is not typed as an nn.Module
    trained = [parameter for parameter in parts.parameters() if parameter.requires_grad]
    module.set_adapter([])  # also stops the other adapters from training
    module.delete_adapter(adapter)
    module.set_adapter([adapter])
    for parameter in trained:
        parameter.requires_grad_(True)


def check_base_unshared(run: Run) -> None:
    """Raise LayerselError if another adapter reads the base weights that would be restored."""
    others = [name for name in run.model.peft_config if name != run.adapter]
    if others:
        raise LayerselError(
            f"layersel.selection.unselected: remove undoes the change that {run.config.init_lora_weights!r} made to "
            f"base weights, which would change the output of the adapter {others[0]!r} in the same model. Set "
            "`unselected: freeze`, or delete that adapter first."
        )


def freeze_bias(run: Run, module: LoraLayer) -> None:
    """Freeze the bias of a module that ``bias: lora_only`` trains with its LoRA."""
    bias = getattr(module.get_base_layer(), "bias", None)
    if run.config.bias == "lora_only" and isinstance(bias, nn.Parameter):
        bias.requires_grad_(False)


@torch.no_grad()
def restore_base(run: Run, name: str, module: LoraLayer) -> None:
    """Add the product of the initial factors, which PEFT subtracted, back to the base weight of a module.

    Raises:
        LayerselError: if that would not restore the original weight.
    """
    weight, method = module.get_base_layer().get_parameter("weight"), get_initialisation(run.config)
    if method not in RESTORED:
        raise LayerselError(
            f"peft_init_lora_weights: {method!r} has changed the base weight of {name} irreversibly. "
            "Set `unselected: freeze`, or remove peft_init_lora_weights."
        )
    if weight.dtype != torch.float32:
        raise LayerselError(describe_rounding(method, f"that of {name} is {str(weight.dtype).removeprefix('torch.')}"))
    transposed = getattr(module, "fan_in_fan_out", False)
    if transposed and method == "olora":
        raise LayerselError(
            f"peft_init_lora_weights: 'olora' initialises {name}, a {type(module.get_base_layer()).__name__}, from "
            "the transpose of its weight, so PEFT computes a wrong output from the start. Use `pissa`, or remove it."
        )
    down, up = (linear.weight.float() for linear in get_linears(module, run.adapter))
    product = module.scaling[run.adapter] * (up @ down)
    product = product.T if transposed else product
    run.engine.edit_weight(weight, edits.add(product))


def freeze_unselected(run: Run, stack: LayerStack, kept: list[str]) -> None:
    """Freeze the layers' LoRA weights, and the biases of these modules, except in the modules ``kept``."""
    lora = run.lora_modules
    for name in find_others(stack, kept):
        bias = getattr(lora[name].get_base_layer(), "bias", None)  # may train, see LoraConfig.bias
        for parameter in [*lora_parameters(run, name), *([bias] if isinstance(bias, nn.Parameter) else [])]:
            parameter.requires_grad_(False)
