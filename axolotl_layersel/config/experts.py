"""Settings that conflict with LoRA on the experts of a mixture, which transformers 5 stores as 3-D parameters.

A refusal has the same words whether the YAML file or the model shows the reason.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from axolotl_layersel.config.engines import find_engine_name
from axolotl_layersel.config.initialisation import PLAIN, normalise

KEY = "lora_target_parameters"


def find_expert_faults(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield what conflicts with LoRA on expert parameters in a YAML file."""
    if not data.get(KEY):
        return
    if isinstance(data[KEY], str):
        yield f"{KEY}: {data[KEY]!r} is one name, but PEFT expects a list. Set it to [{data[KEY]}]."
    initial = data.get("peft_init_lora_weights")
    if normalise(initial) not in PLAIN:
        yield (
            f"peft_init_lora_weights: {initial!r} cannot be combined with {KEY}: PEFT supports it for linear modules "
            "only. Remove it, or use `gaussian`."
        )
    if find_engine_name(data) == "zero3":
        yield describe_sharded_experts(KEY)


def describe_gated_experts(setting: str) -> str:
    """Return the message for ``setting``, which needs gates, in a model whose LoRA is all on expert parameters."""
    return (
        f"{KEY}: all LoRA is on expert parameters, but {setting} can put gates on linear modules only. Add linear "
        "modules to `lora_target_modules`, such as q_proj and v_proj, or use `layersel.selection` with "
        "`method: gradient`."
    )


def describe_sharded_experts(key: str) -> str:
    """Return the message for LoRA on expert parameters under ZeRO-3; ``key`` is the setting that asks for it."""
    return (
        f"{key}: PEFT cannot put LoRA on expert parameters under ZeRO-3, which splits them before PEFT sees their "
        "shape. Use ZeRO-2 or FSDP2, or `lora_target_modules` without experts."
    )
