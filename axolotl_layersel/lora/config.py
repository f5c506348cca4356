"""The LoRA configuration in training: complete it, and make it name exactly the modules that carry LoRA."""

import re

from peft import LoraConfig
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.experts import KEY as EXPERTS_KEY
from axolotl_layersel.lora.layouts import sort_sets
from axolotl_layersel.lora.modules import carries, find_key, find_lora_modules
from axolotl_layersel.lora.patterns import list_ends
from axolotl_layersel.lora.run import Run

# PEFT takes the first number in a module's name as its layer.
NUMBERED_LAYER = re.compile(r".*?\.(?P<list>[^.]*)\.(?P<number>\d+)\.")


def complete_config(run: Run) -> None:
    """Add the fields that PEFT fills in when it saves, and sort sets so that every run writes the same bytes.

    Call it before the engine is built, because FSDP2 renames the model's class.
    """
    config, base = run.config, run.base
    if not config.base_model_name_or_path:
        # PEFT 0.20.0 writes an empty name for a model without one, 0.21.2 writes None.
        config.base_model_name_or_path = base.__dict__.get("name_or_path") or None
    if config.task_type is None:
        config.auto_mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    sort_sets(config)


def name_exactly(config: LoraConfig, base: nn.Module, adapter: str | None = None) -> None:
    """Make ``config`` name exactly the LoRA modules of ``base``, or only those of ``adapter``.

    Use the first exact form of three: name ends such as ``q_proj`` with layer numbers, which PEFT loads fastest; full
    names; a regular expression. vLLM and SGLang read name ends and find the layers in the file's tensors. SGLang
    refuses regular expressions.
    """
    lora, others = find_lora_modules(base, adapter), list_other_modules(base, adapter)
    present = [name for name, module in lora.items() if not isinstance(module, ParamWrapper)]
    if len(present) < len(lora):
        config.target_parameters = sorted(find_key(name, lora[name]) for name in lora.keys() - set(present))
    elif config.target_parameters:
        config.target_parameters = None
    if not present:
        config.target_modules, config.layers_to_transform, config.layers_pattern = [], None, None
        return
    # Name ends with layer numbers are exact if PEFT would find the same modules by them.
    layers = [layer for name in present if (layer := NUMBERED_LAYER.match(name))]
    if len(layers) == len(present):
        config.target_modules = sorted({name.rpartition(".")[2] for name in present})
        config.layers_to_transform = sorted({int(layer["number"]) for layer in layers})
        config.layers_pattern = sorted({layer["list"] for layer in layers})
        if find_targets(config, base, adapter) == list(lora):
            return
    config.target_modules = sorted(present)
    config.layers_to_transform = None
    config.layers_pattern = None
    # PEFT also matches a full name at the end of a longer one; a regular expression then tells them apart.
    names = set(present)
    if not all(names.isdisjoint(list_ends(name)) for name in others):
        config.target_modules = "|".join(map(re.escape, sorted(present)))


def find_targets(config: LoraConfig, base: nn.Module, adapter: str | None = None) -> list[str]:
    """Return the names of the modules that PEFT would put LoRA on under ``config``, those that carry it first.

    ``adapter``: the adapter that counts as LoRA; default: any. A parameter that would get LoRA and has none is listed
    by its own name.
    """
    lora, others = find_lora_modules(base, adapter), list_other_modules(base, adapter)
    targets = set(config.target_parameters or [])

    def is_target(key: str) -> bool:
        return not targets.isdisjoint(list_targets(key))

    found = []
    for name in (*lora, *others):
        if isinstance(lora.get(name), ParamWrapper):
            hit = is_target(find_key(name, lora[name]))
        else:
            hit = bool(check_target_module_exists(config, name))
        found += [name] if hit else []
    owners = others if targets else []
    bare = [f"{name}.{key}" for name in owners for key, _ in base.get_submodule(name).named_parameters(recurse=False)]
    return [*found, *filter(is_target, bare)]


def list_targets(key: str) -> list[str]:
    """Return the entries of PEFT's ``target_parameters`` that match the parameter ``key``."""
    return [key, *list_ends(key)]


def list_other_modules(base: nn.Module, adapter: str | None = None) -> list[str]:
    """Return the names of the modules that do not carry ``adapter`` (default: any) and are not inside a LoRA module."""
    others, inside = [], "."
    for name, module in base.named_modules():
        if name.startswith(inside):
            continue
        if isinstance(module, LoraLayer):
            inside = f"{name}."
        if not isinstance(module, LoraLayer) or not carries(module, adapter):
            others.append(name)
    return others


def check_target_parameters(run: Run) -> None:
    """Raise LayerselError for an entry of ``target_parameters`` without a parameter, which PEFT 0.20.0 ignores."""
    meant = {target for name, module in run.lora_modules.items() for target in list_targets(find_key(name, module))}
    unknown = [target for target in run.config.target_parameters or [] if target not in meant]
    if unknown:
        names = {name for name, parameter in run.base.named_parameters() if parameter.dim() > 2}
        ends = sorted({".".join(name.replace(".base_layer", "").split(".")[-3:]) for name in names})
        raise LayerselError(
            f"{EXPERTS_KEY}: {unknown[0]!r} matches no parameter of this model that can carry LoRA. "
            + (f"Use names of its experts, such as {', '.join(ends[:4])}." if ends else "The model has no experts.")
        )
