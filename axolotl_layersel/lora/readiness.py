"""Check that a prepared model trains its adapter, and that all trained weights are saved.

Each fault is raised on every process before a step is lost.
"""

import math
from collections.abc import Iterable

from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from axolotl_layersel.common.digests import hash_json
from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.root import describe_unscaled
from axolotl_layersel.engines import collectives
from axolotl_layersel.lora.run import Run
from axolotl_layersel.lora.weights import adapter_parameters, find_adapter, lora_parameters

DEFAULT_NAME = "default"  # PEFT 0.20.0 saves only this adapter to the folder itself
ANEW = "Build a new model and trainer, and prepare the trainer last."


def refuse_together(fault: str | None) -> None:
    """Raise LayerselError on every process if any has a fault; every process must call this."""
    faults = {process: other for process, other in enumerate(collectives.gather_from_all(fault)) if other}
    if not faults:
        return
    first = min(faults)
    where = (
        "" if len(faults) == collectives.count_ranks() else f" Process {first} is affected, but not all processes are."
    )
    raise LayerselError(faults[first] + where)


def check_trains(run: Run) -> None:
    """Raise LayerselError on every process unless LoRA trains and the adapter file holds all trained weights.

    Every process must call this, before the engine is built or as training begins.
    """
    fault = (
        find_name_fault(run)
        or find_idle_fault(run)
        or find_scaling_fault(run.adapter, run.lora_modules)
        or find_buffer_fault(run)
    )
    refuse_together(fault)
    unsaved = find_unsaved(run, adapter_parameters(run.model).values())
    if any(collectives.gather_from_all(unsaved)):
        refuse_together(describe_unsaved(find_unsaved(run, find_adapter(run).values())))


def check_alike(run: Run) -> None:
    """Raise LayerselError on every process unless all have the same adapters; every process must call this.

    Engines match the weights of processes by their order, so one that only some processes have shifts the others.
    """
    adapters = list(run.model.peft_config)
    shapes = [
        (name, list(run.engine.find_shape(parameter)))
        for name, parameter in run.model.named_parameters()
        if not set(adapters).isdisjoint(name.split("."))
    ]
    differing = collectives.find_differing_ranks(hash_json([adapters, shapes]).encode())
    if not differing:
        return
    everyone = collectives.gather_from_all((adapters, dict(shapes)))
    (own_order, ours), (other_order, theirs) = everyone[0], everyone[differing[0]]
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if names:
        here, there = (
            f"has the shape {held[names[0]]}" if names[0] in held else "is not there" for held in (ours, theirs)
        )
        found = f"{names[0].removeprefix('base_model.model.')} {here} on process 0 and {there}"
        count = f" ({len(names)} such parameters)"
    else:
        found, count = f"the adapters are {', '.join(own_order)} on process 0 and {', '.join(other_order)}", ""
    raise LayerselError(
        f"adapter: {found} on process {differing[0]}{count}. Engines match weights by their order, so processes would "
        "get the weights of others. Add and delete adapters on all processes, in the same order."
    )


def find_name_fault(run: Run) -> str | None:
    """Return why another adapter would be saved to the same files, None if none would."""
    if run.adapter == DEFAULT_NAME or DEFAULT_NAME not in run.model.peft_config:
        return None
    return (
        f"adapter: {run.adapter!r} trains, and {DEFAULT_NAME!r} in the same model would be saved to the same files. "
        f"Rename the trained adapter to {DEFAULT_NAME!r}, or delete the other one."
    )


def find_idle_fault(run: Run) -> str | None:
    """Return why no LoRA weight of the run's adapter trains, None if one does."""
    weights = [parameter for name in run.lora_modules for parameter in lora_parameters(run, name)]
    if any(parameter.requires_grad and math.prod(run.engine.find_shape(parameter)) for parameter in weights):
        return None
    if run.config.inference_mode:
        advice = (
            "The adapter was loaded for inference. Load it with `is_trainable=True` "
            "(`PeftModel.from_pretrained(base, folder, is_trainable=True)`)."
        )
    elif len(run.model.peft_config) > 1:
        advice = (
            "PEFT freezes an adapter when it loads another one for inference: call "
            f"`model.set_adapter({run.adapter!r})` afterwards."
        )
    else:
        advice = "Unfreeze those of the selected layers before you prepare the trainer."
    return (
        f"adapter: none of the {len(weights)} LoRA matrices of {run.adapter!r} requires a gradient, so nothing would "
        f"train. {advice}"
    )


def find_scaling_fault(adapter: str, modules: dict[str, LoraLayer]) -> str | None:
    """Return which module has a scaling under which it cannot train, None if none has."""
    for name, module in modules.items():
        scaling, alpha = module.scaling[adapter], module.lora_alpha[adapter]
        if scaling == 0 and len({other.lora_alpha[adapter] for other in modules.values()}) == 1:
            return describe_unscaled(alpha)
        if scaling == 0 or not math.isfinite(scaling):
            return (
                f"lora_alpha: LoRA on {name} has the scaling {scaling}, so it cannot train. Correct `lora_alpha` or "
                "`alpha_pattern`, or remove the module from lora_target_modules."
            )
    return None


def find_buffer_fault(run: Run) -> str | None:
    """Return which module of ``modules_to_save`` has buffers, which PEFT does not save, None if none has."""
    for name, wrapper in run.model.named_modules():
        if not isinstance(wrapper, ModulesToSaveWrapper) or run.adapter not in wrapper.modules_to_save:
            continue
        module = wrapper.modules_to_save[run.adapter]
        buffers = sorted(module.state_dict().keys() - dict(module.named_parameters(remove_duplicate=False)).keys())
        if buffers:
            return (
                f"modules_to_save: {name.removeprefix('base_model.model.')} has the buffer {buffers[0]}, which may "
                "change in training and is not saved. Name modules without buffers."
            )
    return None


def find_unsaved(run: Run, saved: Iterable[nn.Parameter]) -> list[str]:
    """Return the names of the trained parameters that are not among those ``saved``."""
    held = {id(parameter) for parameter in saved}
    return [name for name, each in run.model.named_parameters() if each.requires_grad and id(each) not in held]


def describe_unsaved(names: list[str]) -> str | None:
    """Return the message for trained parameters that no adapter file holds, None if there are none."""
    if not names:
        return None
    name = names[0].removeprefix("base_model.model.")
    return (
        f"adapter: {name} trains ({len(names)} such parameters), but PEFT does not save it, so the adapter would "
        "not compute what the model computes. Name its module in `modules_to_save` (`lora_modules_to_save`), or set "
        "its requires_grad to False."
    )


class Readiness:
    """Checks that the prepared adapter is still in place, as training begins and before each save.

    TRL's trainers switch adapters within a loss and back again; between two steps the prepared one is active.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.modules = list(run.lora_modules)

    def check_start(self) -> None:
        """Raise LayerselError on every process unless training may begin; every process must call this.

        Call it before the engine is built: building it would hang if the processes differed.
        """
        self.check()
        check_alike(self.run)
        check_trains(self.run)

    def check(self) -> None:
        """Raise LayerselError on every process if the adapter has changed; every process must call this."""
        refuse_together(self.find_fault())

    def find_fault(self) -> str | None:
        """Return what has happened to the prepared adapter, and what to do; None if it is unchanged."""
        model, adapter = self.run.model, self.run.adapter
        if adapter not in model.peft_config:
            return f"adapter: {adapter!r} was prepared for training and then deleted from the model. {ANEW}"
        modules = self.run.lora_modules
        if not modules:
            return (
                f"adapter: {adapter!r} was prepared for training and is no longer in the model (merge_and_unload or "
                f"unload). {ANEW} Merge the saved adapter into a separate base model."
            )
        if any(module.merged for module in modules.values()):
            return (
                f"adapter: {adapter!r} is merged into the base weights, so it does not train. Call "
                "`model.unmerge_adapter()`, and merge after training, when the adapter is saved."
            )
        if model.active_adapters != [adapter]:
            active = ", ".join(map(repr, model.active_adapters)) or "none"
            return (
                f"adapter: {adapter!r} was prepared for training, but {active} is active. Call "
                f"`model.set_adapter({adapter!r})` before training and saving, or prepare a trainer for the other one."
            )
        if any(module.disable_adapters for module in modules.values()):
            return f"adapter: {adapter!r} is switched off. Call `model.base_model.enable_adapter_layers()`."
        changed = sorted(modules.keys() ^ set(self.modules))
        if changed:
            return f"adapter: LoRA of {adapter!r} was added to or removed from {changed[0]} after preparation. {ANEW}"
        return None
