"""Static shapes, dynamic ranks: modules built at the highest rank they may reach, before any engine exists."""

import copy

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from axolotl_layersel import adapters, engines
from axolotl_layersel.errors import LayerselError
from axolotl_layersel.layers import find_lora_modules
from axolotl_layersel.layouts import Factors, find_used, order_pattern


def check_modules(model: PeftModel) -> None:
    """Raise LayerselError for a LoRA module that is more than B·A·x·scaling with linear A and B."""
    adapter = adapters.get_adapter_name(model)
    method = adapters.get_initialisation(adapters.get_config(model))
    if method not in adapters.SEEDED_INITIALISATIONS:
        raise LayerselError(
            f"peft_init_lora_weights: {method!r} is not supported by layersel.l1ra: components that are added later "
            "could not start like the first ones. Remove it, or use `gaussian`."
        )
    for name, module in find_lora_modules(model.get_base_model()).items():
        linear = adapter in module.lora_A and isinstance(module.lora_A[adapter], nn.Linear)
        if not linear or module.lora_A[adapter].weight.dim() != 2:
            raise LayerselError(
                f"lora_target_modules: {name} is a {type(module.get_base_layer()).__name__}, whose rank layersel.l1ra "
                "cannot move. Target linear modules, such as q_proj and down_proj."
            )
        if module.lora_variant.get(adapter) is not None or module.lora_bias.get(adapter):
            raise LayerselError(
                f"lora_target_modules: LoRA on {name} is not plain LoRA (DoRA, aLoRA, lora_bias or the like), which "
                "layersel.l1ra does not support. Use plain LoRA."
            )


def grow_modules(model: PeftModel, max_rank: int, scaling: float | None = None) -> dict[str, list[int]]:
    """Give every LoRA module ``max_rank`` components, the new ones zero, without changing what it computes.

    Call it before the optimizer or an engine exists. Padding of an adapter that was loaded is made room of.

    Args:
        model: with plain linear LoRA modules, see ``check_modules``.
        max_rank: the capacity of a module.
        scaling: the scaling that all modules get, B being adapted; None: each keeps its own.

    Returns:
        The slots in use of each module, by its name.

    Raises:
        LayerselError: if a module uses more than ``max_rank``.
    """
    adapter = adapters.get_adapter_name(model)
    modules = find_lora_modules(model.get_base_model())

    def find_components() -> dict[str, list[int]]:
        components = {
            name: find_used(Factors(module.lora_A[adapter].weight, module.lora_B[adapter].weight)).nonzero()
            for name, module in modules.items()
        }
        return {name: found.flatten().tolist() for name, found in components.items()}

    # With FSDP's cpu_ram_efficient_loading the other ranks hold no weights.
    components = engines.decide_on_rank_zero(find_components)
    for name, module in modules.items():
        used = components[name]
        if len(used) > max_rank:
            raise LayerselError(
                f"layersel.l1ra.max_rank: {max_rank} is less than the rank {len(used)} that {name} has. "
                f"Set max_rank to at least {max(map(len, components.values()))}."
            )
        rescale = 1.0 if scaling is None else module.scaling[adapter] / scaling
        grow_linear(module.lora_A[adapter], 0, used, max_rank, 1.0)
        grow_linear(module.lora_B[adapter], 1, used, max_rank, rescale)
        module.scaling[adapter] /= rescale
        module.r[adapter] = max_rank
        module.lora_alpha[adapter] = module.scaling[adapter] * max_rank
    model.peft_config[adapter] = describe_capacity(adapters.get_config(model), modules, adapter, max_rank)
    return {name: list(range(len(used))) for name, used in components.items()}


@torch.no_grad()
def grow_linear(linear: nn.Linear, dim: int, used: list[int], rank: int, factor: float) -> None:
    """Let ``linear``, which is A with ``dim`` 0 or B with ``dim`` 1, have ``rank`` components, ``used`` ones first."""
    weight = linear.weight
    shape = list(weight.shape)
    shape[dim] = rank
    grown = weight.new_zeros(shape)
    index = torch.tensor(used, dtype=torch.long, device=weight.device)
    grown.narrow(dim, 0, len(used)).copy_(weight.index_select(dim, index) * factor)
    linear.weight = nn.Parameter(grown, requires_grad=weight.requires_grad)
    if dim == 0:
        linear.out_features = rank
    else:
        linear.in_features = rank


def describe_capacity(config: LoraConfig, modules: dict[str, LoraLayer], adapter: str, max_rank: int) -> LoraConfig:
    """Return a configuration that says what the grown modules are: whoever saves them as they are is right."""
    config = copy.copy(config)
    alphas = {name: module.lora_alpha[adapter] for name, module in modules.items()}
    config.r = max_rank
    config.lora_alpha = next(iter(alphas.values()))
    config.use_rslora = False
    config.rank_pattern = {}
    same = len(set(alphas.values())) == 1
    config.alpha_pattern = {} if same else order_pattern(alphas)
    return config
