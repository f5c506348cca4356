"""Remove LoRA from modules, or freeze it there."""

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
    """Return the names of the LoRA modules of the layers, except those ``kept``."""
    staying = set(kept)
    return [name for name in stack.list_modules(stack.lora_modules) if name not in staying]


def remove_unselected(run: Run, stack: LayerStack, kept: list[str]) -> None:
    """Put the base modules back in place of the LoRA modules of the layers, except those ``kept``."""
    remove_modules(run, find_others(stack, kept))


def remove_modules(run: Run, removed: list[str]) -> None:
    """Put the base modules back in place of the LoRA modules named ``removed``.

    Where another adapter has LoRA in such a module, only that of the adapter in training is removed. The configuration
    then names exactly the modules that carry the adapter, so that stock PEFT rebuilds them. Call it before LoRA has
    trained.

    Raises:
        LayerselError: if PEFT has changed the weight of such a module, and it cannot be what it was, or another
            adapter reads it.
    """
    base, lora = run.base, run.lora_modules
    restores, gone = changes_base(run.config.init_lora_weights), set(removed)
    if restores and removed:
        check_base_unshared(run)
    for name in removed:
        parent, _, child = name.rpartition(".")
        if child == "base_layer" and parent in lora:
            assert parent in gone, "LoRA on the parameters of one module is removed together"
            continue  # it went with what was around it
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
    """Return whether another adapter than ``adapter`` has LoRA in a module."""
    return any(name != adapter for name in module.r)


def remove_adapter(module: LoraLayer, adapter: str) -> None:
    """Remove the LoRA of ``adapter`` from a module in which others have LoRA; none of them becomes active by that."""
    parts: Any = module  # LoRA modules are torch's, which the type does not say
    trained = [parameter for parameter in parts.parameters() if parameter.requires_grad]
    module.set_adapter([])  # which stops the others from training, too
    module.delete_adapter(adapter)
    module.set_adapter([adapter])
    for parameter in trained:
        parameter.requires_grad_(True)


def check_base_unshared(run: Run) -> None:
    """Raise LayerselError where base weights would be restored under another adapter, which reads them."""
    others = [name for name in run.model.peft_config if name != run.adapter]
    if others:
        raise LayerselError(
            f"layersel.selection.unselected: remove gives base weights back what {run.config.init_lora_weights!r} took "
            f"out of them, and the adapter {others[0]!r} in the same model would then compute something else. Set "
            "`unselected: freeze`, or delete that adapter first."
        )


def freeze_bias(run: Run, module: LoraLayer) -> None:
    """Stop the bias under a LoRA module, which ``bias: lora_only`` lets train with its LoRA, from training."""
    bias = getattr(module.get_base_layer(), "bias", None)
    if run.config.bias == "lora_only" and isinstance(bias, nn.Parameter):
        bias.requires_grad_(False)


@torch.no_grad()
def restore_base(run: Run, name: str, module: LoraLayer) -> None:
    """Give the base weight of a module back the product of the initial factors, which PEFT took out of it.

    Raises:
        LayerselError: if that would not be the weight that it was.
    """
    weight, method = module.get_base_layer().get_parameter("weight"), get_initialisation(run.config)
    if method not in RESTORED:
        raise LayerselError(
            f"peft_init_lora_weights: {method!r} has changed the base weight of {name}, which cannot be undone. "
            "Set `unselected: freeze`, or remove peft_init_lora_weights."
        )
    if weight.dtype != torch.float32:
        raise LayerselError(describe_rounding(method, f"that of {name} is {str(weight.dtype).removeprefix('torch.')}"))
    transposed = getattr(module, "fan_in_fan_out", False)
    if transposed and method == "olora":
        raise LayerselError(
            f"peft_init_lora_weights: 'olora' takes {name}, a {type(module.get_base_layer()).__name__}, for its "
            "transpose, so PEFT computes something else from the start. Use `pissa`, or remove it."
        )
    down, up = (linear.weight.float() for linear in get_linears(module, run.adapter))
    product = module.scaling[run.adapter] * (up @ down)
    product = product.T if transposed else product
    run.engine.edit_weight(weight, edits.add(product))


def freeze_unselected(run: Run, stack: LayerStack, kept: list[str]) -> None:
    """Stop the LoRA weights of the layers, and the biases under them, from training, except the modules ``kept``.

    Their values stay.
    """
    lora = run.lora_modules
    for name in find_others(stack, kept):
        bias = getattr(lora[name].get_base_layer(), "bias", None)  # trains too where the adapter's ``bias`` says so
        for parameter in [*lora_parameters(run, name), *([bias] if isinstance(bias, nn.Parameter) else [])]:
            parameter.requires_grad_(False)
