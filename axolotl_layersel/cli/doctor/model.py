"""The model of a YAML file with LoRA, built from its configuration on the meta device, where weights take no memory.

Relied on, as seen in axolotl 0.19.0 (``tests/unit/cli/doctor/test_model.py`` fails when one of them changes):
``axolotl.loaders.adapter._build_peft_lora_config``, which makes PEFT's configuration of the YAML keys, and the modules
that ``lora_target_linear`` leaves out.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from axolotl_layersel.cli.doctor.configuration import DEFAULT_RANK
from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.facts import find_text_config, read_fact
from axolotl_layersel.config.selection import DEFAULT_STACKS, ResolvedSelection, SelectionConfig
from axolotl_layersel.config.strict_block import as_mapping, as_number, as_whole
from axolotl_layersel.lora.backward_end import check_limit
from axolotl_layersel.lora.layers import LayerStack, find_layer_stack
from axolotl_layersel.lora.modules import find_lora_modules, get_adapter_name, get_base_model, list_parameters
from axolotl_layersel.lora.step_time import read_size
from axolotl_layersel.selection.candidates import count_kept, find_candidates
from axolotl_layersel.selection.units import Unit, find_units

# The modules that ``lora_target_linear`` leaves out, by kind of model.
OUTPUTS = {"gpt_neox": "embed_out"}
DEFAULT_OUTPUT = "lm_head"


@dataclass(frozen=True)
class Model:
    """A PEFT model without weights, and the choice that the settings ask for in it.

    Attributes:
        peft: the model.
        stack: its layers.
        units: the units that may be chosen, lowest first; None without a selection.
        kept: how many of them are kept; None if gates decide it.
        faults: why the settings do not fit the model.
    """

    peft: PeftModel
    stack: LayerStack
    units: list[Unit] | None
    kept: int | None
    faults: list[str]

    @functools.cached_property
    def base(self) -> PreTrainedModel:
        return get_base_model(self.peft)

    @functools.cached_property
    def lora_modules(self) -> dict[str, LoraLayer]:
        return find_lora_modules(self.base, get_adapter_name(self.peft))

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """The number of LoRA parameters of each module with ``lora_r``."""
        adapter = get_adapter_name(self.peft)
        return {
            name: sum(each.numel() for each in list_parameters(self.base, adapter, name)) for name in self.lora_modules
        }

    @functools.cached_property
    def component_sizes(self) -> dict[str, int]:
        """The number of parameters of one rank of each module."""
        adapter = get_adapter_name(self.peft)
        return {name: self.sizes[name] // module.r[adapter] for name, module in self.lora_modules.items()}

    @functools.cached_property
    def base_parameters(self) -> dict[str, nn.Parameter]:
        """The weights of the base model, each once, by name."""
        return {name: each for name, each in self.base.named_parameters() if ".lora_" not in name}

    @property
    def text_config(self) -> PreTrainedConfig:
        return find_text_config(self.base.config)

    def read_size(self, name: str) -> int:
        """Return a size of the model that reads tokens, such as ``hidden_size``; 0 if its configuration lacks it."""
        return read_size(self.base, name)


def read_config(content: Mapping[str, Any]) -> PreTrainedConfig:
    """Return the configuration of transformers with the content of a config.json.

    Raises:
        LayerselError: for a kind of model that transformers does not have.
    """
    try:
        return AutoConfig.for_model(**content)
    except (TypeError, ValueError) as error:
        kind = content["model_type"]
        raise LayerselError(f"base_model: its config.json has model_type: {kind!r}, but {error}") from None


def build_model(
    content: Mapping[str, Any], data: Mapping[str, Any], chosen: SelectionConfig | None, seed: int
) -> Model:
    """Return the model of a YAML file with LoRA, without weights.

    Args:
        content: the configuration of the base model.
        data: the content of the YAML file.
        chosen: its ``selection`` block.
        seed: of the run.

    Raises:
        LayerselError: if the model has no LoRA or no layers to choose from.
    """
    config = read_config(content)
    with torch.device("meta"):
        base = find_class(config, data).from_config(config)
        peft = add_lora(base, data)
    stack = find_layer_stack(peft, (chosen and chosen.stacks) or DEFAULT_STACKS)
    if chosen is None or chosen.plan is not None:
        return Model(peft, stack, None, None, [])
    faults: list[str] = []
    units, kept = None, None
    try:
        settings = chosen.resolve(seed)
        removed = [name for names in stack.towers.values() for name in names]
        check_limit(peft, stack, settings, removed if settings.outside_layers == "remove" else [])
        units = find_units(stack, settings.granularity, find_candidates(settings, stack))
        kept = find_kept(chosen, settings, units)
    except LayerselError as error:
        faults.append(str(error))
    return Model(peft, stack, units, kept, faults)


def find_kept(chosen: SelectionConfig, settings: ResolvedSelection, units: list[Unit]) -> int | None:
    """Return how many units are kept; None if gates decide it."""
    if settings.layers is not None:
        return len(settings.layers)
    if settings.num_layers is None and settings.num_units is None and settings.ratio is None:
        return None
    if len(units) == 1 and not any((chosen.ratio, chosen.num_layers, chosen.num_units)):
        return 1  # see ``fitting.fit_to_units``
    return count_kept(settings, len(units), f"{settings.granularity}s")


def find_class(config: PreTrainedConfig, data: Mapping[str, Any]) -> Any:
    """Return the class of transformers that Axolotl loads the model by."""
    import transformers

    if data.get("reward_model") or data.get("num_labels"):
        return transformers.AutoModelForSequenceClassification
    if data.get("processor_type") and read_fact(config, "vision_config"):
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def add_lora(base: PreTrainedModel, data: Mapping[str, Any]) -> PeftModel:
    """Return ``base`` with the LoRA modules that the YAML file asks for.

    Raises:
        LayerselError: if PEFT finds none.
    """
    targets: Any = data.get("lora_target_modules") or []
    if data.get("lora_target_linear"):
        given = targets if isinstance(targets, list) else [targets]
        targets = sorted({*given, *find_linear_names(base)})
    options: dict[str, Any] = {
        "lora_alpha": as_number(data.get("lora_alpha")) or DEFAULT_RANK,
        "rank_pattern": dict(as_mapping(data.get("lora_rank_pattern"))),
        "target_parameters": data.get("lora_target_parameters") or None,
        "layers_to_transform": data.get("peft_layers_to_transform"),
        "layers_pattern": data.get("peft_layers_pattern"),
        "exclude_modules": data.get("lora_exclude_modules") or None,
        "modules_to_save": data.get("lora_modules_to_save") or None,
        "use_dora": bool(data.get("peft_use_dora")),
    }
    kind = "SEQ_CLS" if "SequenceClassification" in type(base).__name__ else "CAUSAL_LM"
    config = LoraConfig(
        r=max(as_whole(data.get("lora_r")) or DEFAULT_RANK, 1),
        target_modules=targets or None,
        task_type=kind,
        **options,
    )
    try:
        model = get_peft_model(base, config, low_cpu_mem_usage=True)
    except (TypeError, ValueError) as error:
        raise LayerselError(f"lora_target_modules: {error}") from None
    assert isinstance(model, PeftModel), "it is not mixed"
    return model


def find_linear_names(base: nn.Module) -> Iterator[str]:
    """Yield the last part of the name of each linear module that ``lora_target_linear`` stands for."""
    output = OUTPUTS.get(str(read_fact(getattr(base, "config", None), "model_type")), DEFAULT_OUTPUT)
    for name, module in base.named_modules():
        last = name.rpartition(".")[2]
        if "Linear" in type(module).__name__ and last != output:
            yield last
