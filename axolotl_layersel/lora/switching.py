"""Keep frozen LoRA frozen when PEFT switches or loads adapters."""

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

from axolotl_layersel.lora.modules import TRAINED_ADAPTER, get_active_adapter


def keep_trained_alone(model: PeftModel) -> None:
    """Make sure that what trains now is what trains whenever the adapter is active, whatever PEFT is asked to do.

    PEFT 0.20.0 makes every LoRA weight of an adapter train when it switches the adapter on, frozen ones too, and stops
    all of them when it loads another adapter. Trainers that compare with a reference switch adapters in every loss.
    """
    tuner: Any = model.base_model
    vars(tuner)[TRAINED_ADAPTER] = get_active_adapter(model)
    vars(tuner).pop(KEPT_WEIGHTS, None)  # of another adapter, which trained before
    # Methods, not closures: a deep copy of the model switches its own adapter off.
    for name, method in KEEPING_METHODS.items():
        setattr(tuner, name, types.MethodType(method, tuner))


def keep_through(name: str) -> Callable[..., Any]:
    """Return what takes the place of a tuner's method ``name``, after which the same weights train as before.

    Where the call leaves the adapter switched off or inactive, they train again once it is back.
    """

    @functools.wraps(getattr(LoraModel, name))
    def method(tuner: BaseTuner, *args: Any, **options: Any) -> Any:
        before = list_trained(tuner) if is_switched_on(tuner) else None
        result = getattr(type(tuner), name)(tuner, *args, **options)
        if is_switched_on(tuner):
            let_train(tuner, before)
        elif before is not None:
            vars(tuner).setdefault(KEPT_WEIGHTS, before)
        return result

    return method


@functools.wraps(LoraModel.set_requires_grad)
def set_requires_grad(tuner: BaseTuner, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Let an adapter's weights train or not; of the adapter in training, only those train again that did."""
    before = list_trained(tuner)
    type(tuner).set_requires_grad(tuner, adapter_names, requires_grad)
    names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
    if vars(tuner)[TRAINED_ADAPTER] not in names or not is_switched_on(tuner):
        return
    if requires_grad:
        let_train(tuner, before)
    else:
        vars(tuner).setdefault(KEPT_WEIGHTS, before)


def is_switched_on(tuner: BaseTuner) -> bool:
    """Return whether the adapter in training takes part in a forward pass."""
    layers = (module for module in tuner.modules() if isinstance(module, BaseTunerLayer))
    return tuner.active_adapters == [vars(tuner)[TRAINED_ADAPTER]] and not any(
        layer.disable_adapters for layer in layers
    )


def list_trained(tuner: BaseTuner) -> set[str]:
    """Return the names of the parameters that train."""
    return {name for name, parameter in tuner.named_parameters() if parameter.requires_grad}


def let_train(tuner: BaseTuner, before: set[str] | None) -> None:
    """Let those parameters train that did when the adapter was switched off, or else those ``before``, and no other."""
    names = vars(tuner).pop(KEPT_WEIGHTS, before)
    for name, parameter in tuner.named_parameters() if names is not None else ():
        if parameter.requires_grad != (name in names) and parameter.is_leaf:  # FSDP2 may have left other tensors
            parameter.requires_grad_(name in names)


KEPT_WEIGHTS = "layersel_trained"
# By all of these methods of PEFT 0.20.0's tuners weights train that did not, or the other way round.
SWITCHES = ("disable_adapter_layers", "enable_adapter_layers", "set_adapter", "inject_adapter", "delete_adapter")
KEEPING_METHODS: dict[str, Callable[..., Any]] = {
    **{name: keep_through(name) for name in SWITCHES},
    "set_requires_grad": set_requires_grad,
}
