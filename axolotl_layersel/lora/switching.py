"""Keep frozen LoRA frozen when PEFT switches or loads adapters."""

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

from axolotl_layersel.lora.modules import TRAINED_ADAPTER, get_active_adapter


def preserve_trained(model: PeftModel) -> None:
    """Train exactly the weights that train now whenever the adapter is active, whatever PEFT is asked to do.

    PEFT 0.20.0 unfreezes every LoRA weight of an adapter that it switches on, and freezes all of them when it loads
    another adapter. Trainers that compare with a reference model switch adapters in every loss.
    """
    tuner: Any = model.base_model
    vars(tuner)[TRAINED_ADAPTER] = get_active_adapter(model)
    vars(tuner).pop(KEPT_WEIGHTS, None)  # left by an adapter that trained before
    # Bound methods, not closures, so that a deep copy of the model switches its own adapter.
    for name, method in KEEPING_METHODS.items():
        setattr(tuner, name, types.MethodType(method, tuner))


def preserving(name: str) -> Callable[..., Any]:
    """Return a replacement of the tuner's method ``name`` that keeps the same weights training.

    If the call leaves the adapter inactive, the weights train again once it is active.
    """

    @functools.wraps(getattr(LoraModel, name))
    def method(tuner: BaseTuner, *args: Any, **options: Any) -> Any:
        before = list_trained(tuner) if is_switched_on(tuner) else None
        result = getattr(type(tuner), name)(tuner, *args, **options)
        if is_switched_on(tuner):
            set_trained(tuner, before)
        elif before is not None:
            vars(tuner).setdefault(KEPT_WEIGHTS, before)
        return result

    return method


@functools.wraps(LoraModel.set_requires_grad)
def set_requires_grad(tuner: BaseTuner, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Set ``requires_grad`` of an adapter's weights; frozen weights of the adapter in training stay frozen."""
    before = list_trained(tuner)
    type(tuner).set_requires_grad(tuner, adapter_names, requires_grad)
    names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
    if vars(tuner)[TRAINED_ADAPTER] not in names or not is_switched_on(tuner):
        return
    if requires_grad:
        set_trained(tuner, before)
    else:
        vars(tuner).setdefault(KEPT_WEIGHTS, before)


def is_switched_on(tuner: BaseTuner) -> bool:
    layers = (module for module in tuner.modules() if isinstance(module, BaseTunerLayer))
    return tuner.active_adapters == [vars(tuner)[TRAINED_ADAPTER]] and not any(
        layer.disable_adapters for layer in layers
    )


def list_trained(tuner: BaseTuner) -> set[str]:
    return {name for name, parameter in tuner.named_parameters() if parameter.requires_grad}


def set_trained(tuner: BaseTuner, before: set[str] | None) -> None:
    """Train exactly the parameters that trained when the adapter was switched off, by default those ``before``."""
    names = vars(tuner).pop(KEPT_WEIGHTS, before)
    for name, parameter in tuner.named_parameters() if names is not None else ():
        if (
            parameter.requires_grad != (name in names) and parameter.is_leaf
        ):  # FSDP2 may leave tensors that are not leaves
            parameter.requires_grad_(name in names)


KEPT_WEIGHTS = "layersel_trained"
# The methods of PEFT 0.20.0's tuners that change which weights train.
SWITCHES = ("disable_adapter_layers", "enable_adapter_layers", "set_adapter", "inject_adapter", "delete_adapter")
KEEPING_METHODS: dict[str, Callable[..., Any]] = {
    **{name: preserving(name) for name in SWITCHES},
    "set_requires_grad": set_requires_grad,
}
