"""What must hold of a prepared model until it has trained and was saved: its adapter trains, and all of that is saved.

Each fault is one sentence, raised on every process before a step is lost.
"""

import math
from collections.abc import Iterable

from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.root import describe_unscaled
from axolotl_layersel.engines import collectives
from axolotl_layersel.lora.run import Run
from axolotl_layersel.lora.weights import adapter_parameters, find_adapter, lora_parameters

DEFAULT_NAME = "default"  # of the adapter that PEFT 0.20.0 saves to the folder itself
ANEW = "Build the model and the trainer anew, and prepare the trainer last."


def refuse_together(fault: str | None) -> None:
    """Raise LayerselError on every process where any has a fault, naming the process where not all have one.

    Every process must call this.
    """
    faults = {rank: other for rank, other in enumerate(collectives.gather_from_all(fault)) if other}
    if not faults:
        return
    first = min(faults)
    where = "" if len(faults) == collectives.count_ranks() else f" It is so on process {first}, and not on all."
    raise LayerselError(faults[first] + where)


def check_trains(run: Run) -> None:
    """Raise LayerselError, on every process, unless LoRA trains, and the adapter's file holds all that trains.

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


def find_name_fault(run: Run) -> str | None:
    """Return why the file of the run's adapter would be another one's, None where it would not."""
    if run.adapter == DEFAULT_NAME or DEFAULT_NAME not in run.model.peft_config:
        return None
    return (
        f"adapter: {run.adapter!r} trains, and {DEFAULT_NAME!r} in the same model would be saved to the same files. "
        f"Give the adapter that trains the name {DEFAULT_NAME!r}, or delete the other one."
    )


def find_idle_fault(run: Run) -> str | None:
    """Return why no LoRA weight of the run's adapter trains, None where one does."""
    weights = [parameter for name in run.lora_modules for parameter in lora_parameters(run, name)]
    if any(parameter.requires_grad and math.prod(run.engine.find_shape(parameter)) for parameter in weights):
        return None
    fault = f"adapter: none of the {len(weights)} LoRA matrices of {run.adapter!r} requires a gradient, so nothing "
    if run.config.inference_mode:
        return (
            f"{fault}would train: it was loaded for inference. Load it with `is_trainable=True` "
            "(`PeftModel.from_pretrained(base, folder, is_trainable=True)`)."
        )
    if len(run.model.peft_config) > 1:
        return (
            f"{fault}would train. PEFT stops an adapter from training when it loads another one for inference: call "
            f"`model.set_adapter({run.adapter!r})` after that."
        )
    return f"{fault}would train. Let those of the selected layers require gradients before the trainer is prepared."


def find_scaling_fault(adapter: str, modules: dict[str, LoraLayer]) -> str | None:
    """Return which module computes with a scaling under which it cannot train, None where none does."""
    for name, module in modules.items():
        scaling, alpha = module.scaling[adapter], module.lora_alpha[adapter]
        if scaling == 0 and len({other.lora_alpha[adapter] for other in modules.values()}) == 1:
            return describe_unscaled(alpha)
        if scaling == 0 or not math.isfinite(scaling):
            return (
                f"lora_alpha: LoRA on {name} has the scaling {scaling}, so it cannot train. Mend `lora_alpha` or its "
                "pattern, or leave the module out of lora_target_modules."
            )
    return None


def find_buffer_fault(run: Run) -> str | None:
    """Return which module of ``modules_to_save`` has more than parameters to save, None where none has."""
    for name, wrapper in run.model.named_modules():
        if not isinstance(wrapper, ModulesToSaveWrapper) or run.adapter not in wrapper.modules_to_save:
            continue
        module = wrapper.modules_to_save[run.adapter]
        buffers = sorted(module.state_dict().keys() - dict(module.named_parameters(remove_duplicate=False)).keys())
        if buffers:
            return (
                f"modules_to_save: {name.removeprefix('base_model.model.')} has {buffers[0]}, a buffer that may "
                "change as it trains, and only parameters are written. Name modules without buffers."
            )
    return None


def find_unsaved(run: Run, saved: Iterable[nn.Parameter]) -> list[str]:
    """Return the names of the parameters that train and are not among those ``saved``."""
    held = {id(parameter) for parameter in saved}
    return [name for name, each in run.model.named_parameters() if each.requires_grad and id(each) not in held]


def describe_unsaved(names: list[str]) -> str | None:
    """Return the message for parameters that train and that no adapter file holds, None where there are none."""
    if not names:
        return None
    name = names[0].removeprefix("base_model.model.")
    return (
        f"adapter: {name} trains ({len(names)} such parameters), and PEFT does not write it into the adapter, which "
        "would compute something else than the model in training. Name its module in `modules_to_save` "
        "(`lora_modules_to_save`), or set its requires_grad to False."
    )


class Readiness:
    """Sees to it that the adapter is still the one that was prepared, as training begins and before each save.

    TRL's trainers switch adapters in the middle of a loss and back again; between two steps it is the prepared one.

    Args:
        run: a prepared one.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.modules = list(run.lora_modules)

    def check_start(self) -> None:
        """Raise LayerselError, on every process, unless training may begin; every process must call this.

        It comes before the engine is built, in which processes that differ would wait for each other.
        """
        self.check()
        check_trains(self.run)

    def check(self) -> None:
        """Raise LayerselError, on every process, if the adapter is another one; every process must call this."""
        refuse_together(self.find_fault())

    def find_fault(self) -> str | None:
        """Return what has become of the adapter, and what to do; None where it is as it was prepared."""
        model, adapter = self.run.model, self.run.adapter
        if adapter not in model.peft_config:
            return f"adapter: {adapter!r}, which was prepared to train, was deleted from the model. {ANEW}"
        modules = self.run.lora_modules
        if not modules:
            return (
                f"adapter: {adapter!r}, which was prepared to train, is no longer in the model (merge_and_unload or "
                f"unload). {ANEW} Merge the saved adapter into a base model of its own."
            )
        if any(module.merged for module in modules.values()):
            return (
                f"adapter: {adapter!r} is merged into the base weights, under which it does not train. Call "
                "`model.unmerge_adapter()`, and merge when training is over and the adapter is saved."
            )
        if model.active_adapters != [adapter]:
            active = ", ".join(map(repr, model.active_adapters)) or "none"
            return (
                f"adapter: {adapter!r} was prepared to train, and {active} is active. Call "
                f"`model.set_adapter({adapter!r})` before training and saving, or prepare a trainer for the other one."
            )
        if any(module.disable_adapters for module in modules.values()):
            return f"adapter: {adapter!r} is switched off. Call `model.base_model.enable_adapter_layers()`."
        changed = sorted(modules.keys() ^ set(self.modules))
        if changed:
            return f"adapter: LoRA of {adapter!r} was put on or taken off {changed[0]} after it was prepared. {ANEW}"
        return None
