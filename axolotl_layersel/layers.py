"""Find the stack of layers of a model's language model, and the LoRA modules in it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from axolotl_layersel.errors import LayerselError


@dataclass(frozen=True)
class LayerStack:
    """The layers of the language model.

    Attributes:
        name: where they are in the base model, such as ``model.layers``.
        layers: the layers, lowest first.
        owner: the module that runs them and ends in the final norm, if the model has one.
        lora_modules: names in the base model of the LoRA modules of each layer that carries any, by layer.
        towers: names of the LoRA modules outside of the layers, by the place that they are in, such as
            ``model.vision_tower``, ``model.multi_modal_projector``, the other side's ``encoder``, or ``lm_head``.
    """

    name: str
    layers: nn.ModuleList
    owner: nn.Module
    lora_modules: dict[int, list[str]]
    towers: dict[str, list[str]]

    def list_modules(self, layers: Iterable[int]) -> list[str]:
        """Return the names of the LoRA modules of ``layers``, in their order."""
        return [name for layer in layers for name in self.lora_modules[layer]]


def get_adapter_name(model: PeftModel) -> str:
    """Return the name of the adapter in training.

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
    if not isinstance(config, LoraConfig):
        raise LayerselError(f"adapter: {config.peft_type} is not supported. Use `adapter: lora` or `adapter: qlora`.")
    return config


def get_base_model(model: PeftModel) -> PreTrainedModel:
    """Return the transformers model that carries the adapter."""
    return cast(PreTrainedModel, model.get_base_model())


def find_lora_modules(model: nn.Module) -> dict[str, LoraLayer]:
    """Return the LoRA modules of ``model`` by name, in the order of ``named_modules``."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def get_linears(module: LoraLayer, adapter: str) -> tuple[nn.Linear, nn.Linear]:
    """Return A and B of a LoRA module that is linear."""
    down, up = module.lora_A[adapter], module.lora_B[adapter]
    assert isinstance(down, nn.Linear) and isinstance(up, nn.Linear), "LoRA on other modules was refused"
    return down, up


def count_component_parameters(module: LoraLayer, adapter: str) -> int:
    """Return how many parameters one rank of a LoRA module that is linear takes."""
    down, up = get_linears(module, adapter)
    return down.in_features + up.out_features


def find_layer_stack(model: PeftModel) -> LayerStack:
    """Return the language model's layers that carry LoRA; a vision or audio tower is never taken for them.

    Raises:
        LayerselError: if no stack, or more than one, could be meant.
    """
    base = get_base_model(model)
    check_layers_apart(base)
    expected = list_layer_counts(base.config.get_text_config())
    lora_names = list(find_lora_modules(base))
    found = {name: module for name, module in base.named_modules() if isinstance(module, nn.ModuleList)}
    language_model = {id(module) for module in find_language_model(base).modules()}
    carrying = {
        name: module
        for name, module in found.items()
        if len(module) in expected
        and id(module) in language_model
        and any(lora.startswith(f"{name}.") for lora in lora_names)
    }
    # A mixture of experts may have as many experts as layers: the outer list is the stack.
    outermost = [name for name in carrying if not any(name.startswith(f"{other}.") for other in carrying)]
    if len(outermost) != 1:
        lists = ", ".join(f"{name} ({len(module)})" for name, module in found.items()) or "none"
        problem = "more than one stack of layers carries LoRA" if outermost else "no stack of layers that carries LoRA"
        counts = " or ".join(map(str, expected)) or "no number of"
        raise LayerselError(
            f"lora_target_modules: {problem} was found in {type(base).__name__}, whose configuration says {counts} "
            f"layers (lists of modules in it: {lists}). Target linear modules inside the language model's layers, such "
            "as q_proj and v_proj; other architectures are not supported."
        )
    name = outermost[0]
    modules: dict[int, list[str]] = {}
    towers: dict[str, list[str]] = {}
    for lora in lora_names:
        if lora.startswith(f"{name}."):
            modules.setdefault(int(lora[len(name) + 1 :].split(".", 1)[0]), []).append(lora)
        else:
            towers.setdefault(find_tower(lora, name), []).append(lora)
    owner = base.get_submodule(name.rpartition(".")[0])
    return LayerStack(name=name, layers=carrying[name], owner=owner, lora_modules=modules, towers=towers)


def check_layers_apart(base: PreTrainedModel) -> None:
    """Raise LayerselError where layers share their weights, as in ALBERT."""
    config = base.config.get_text_config()
    groups, layers = getattr(config, "num_hidden_groups", None), config.num_hidden_layers
    if groups is not None and groups < layers:
        sets = "one set" if groups == 1 else f"{groups} sets"
        raise LayerselError(
            f"base_model: the {layers} layers of {type(base).__name__} share {sets} of weights, so LoRA there is in "
            "all of them at once, and none of them can be chosen or left out. Use a model whose layers have weights of "
            "their own, such as BERT, or `l1ra` without `selection`, which moves rank between the modules they share."
        )


def find_language_model(base: PreTrainedModel) -> nn.Module:
    """Return the part of a model that reads tokens: of a multimodal one the language model alone.

    Of a text model it is all of it or its body. Transformers 5.16.1 looks for it by names, ``decoder`` among them,
    which is what ModernBERT calls the output layer of its masked language model.
    """
    found = base.get_decoder()
    has_layers = any(isinstance(module, nn.ModuleList) for module in found.modules())
    return found if has_layers else base.base_model


def list_layer_counts(config: PreTrainedConfig) -> list[int]:
    """Return how many layers the language model may have: those of a decoder may be others than those of an encoder.

    GPT-2 and others map their own name to ``num_hidden_layers``; T5 and BART have the others for their decoders.
    """
    names = ("num_hidden_layers", "num_decoder_layers", "decoder_layers")
    return list(dict.fromkeys(getattr(config, name) for name in names if getattr(config, name, None)))


def find_tower(module: str, stack: str) -> str:
    """Return the outermost part of the model around ``module`` that does not hold the layers at ``stack`` too."""
    parts, others = module.split("."), stack.split(".")
    shared = next(i for i, part in enumerate(parts) if others[i : i + 1] != [part])
    return ".".join(parts[: shared + 1])
