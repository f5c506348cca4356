"""The LoRA modules of a PEFT model: find them, name them, and count their parameters."""

from collections.abc import Mapping
from typing import cast

from peft import LoraConfig, PeftModel, PeftType
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import nn
from transformers import PreTrainedModel

from axolotl_layersel.common.errors import LayerselError

# The tuner's attribute with the name of the adapter in training, which may be inactive at times.
TRAINED_ADAPTER = "layersel_adapter"


def get_adapter_name(model: PeftModel) -> str:
    """Return the name of the adapter in training, or of the active one before preparation.

    Raises:
        LayerselError: if several are active.
    """
    return vars(model.base_model).get(TRAINED_ADAPTER) or get_active_adapter(model)


def get_active_adapter(model: PeftModel) -> str:
    """Return the name of the active adapter.

    Raises:
        LayerselError: if there are several.
    """
    names = model.active_adapters
    if len(names) != 1:
        raise LayerselError(f"adapter: {names} are active together; layer selection needs exactly one.")
    return names[0]


def get_config(model: PeftModel, adapter: str | None = None) -> LoraConfig:
    """Return the LoRA configuration of ``adapter``, by default of the one in training.

    Raises:
        LayerselError: if it is an adapter of another kind.
    """
    config = model.peft_config[adapter or get_adapter_name(model)]
    # AdaLoRA's configuration is a LoraConfig, but its modules have no A and B like LoRA's.
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise LayerselError(f"adapter: {kind} is not supported. Use `adapter: lora` or `adapter: qlora`.")
    return config


def get_base_model(model: PeftModel) -> PreTrainedModel:
    return cast(PreTrainedModel, model.get_base_model())


def find_lora_modules(model: nn.Module, adapter: str | None = None) -> dict[str, LoraLayer]:
    """Return the LoRA modules that carry ``adapter`` (default: any), by name, in the order of ``named_modules``."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and carries(module, adapter)
    }


def carries(module: LoraLayer, adapter: str | None) -> bool:
    """Return whether ``adapter`` has LoRA in a module; None stands for any."""
    return adapter is None or adapter in module.r


def get_linears(module: LoraLayer, adapter: str) -> tuple[nn.Linear, nn.Linear]:
    """Return A and B of a LoRA module with linear A and B."""
    down, up = module.lora_A[adapter], module.lora_B[adapter]
    assert isinstance(down, nn.Linear) and isinstance(up, nn.Linear), "other LoRA modules were refused"
    return down, up


def count_experts(module: LoraLayer) -> int:
    """Return the number of matrices that a LoRA module adapts: one per expert for expert parameters, otherwise 1.

    PEFT 0.20.0 keeps the A of all experts in one weight, (experts · rank, inputs), and the B in another, (outputs,
    rank · experts).
    """
    return module.num_experts if isinstance(module, ParamWrapper) else 1


def list_linear(modules: Mapping[str, LoraLayer]) -> dict[str, LoraLayer]:
    """Return the LoRA modules that are not on parameters such as those of experts, by name."""
    return {name: module for name, module in modules.items() if not isinstance(module, ParamWrapper)}


def find_key(name: str, module: LoraLayer) -> str:
    """Return the key of a LoRA module in ``target_parameters``, ``rank_pattern`` and ``alpha_pattern``.

    For a linear module this is the module name; for LoRA on a parameter, the parameter name. PEFT 0.20.0 nests several
    wrappers of one module (``experts.base_layer``), but looks them up without that suffix.
    """
    if not isinstance(module, ParamWrapper):
        return name
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return f"{name}.{module.parameter_name}"


def count_component_parameters(module: LoraLayer, adapter: str) -> int:
    down, up = get_linears(module, adapter)
    return (down.in_features + up.out_features) * count_experts(module)


def list_parameters(base: nn.Module, adapter: str, name: str) -> list[nn.Parameter]:
    """Return the parameters of ``adapter`` in the LoRA module ``name`` of ``base``."""
    named = base.get_submodule(name).named_parameters()
    return [each for key, each in named if not key.startswith("base_layer.") and adapter in key.split(".")]
