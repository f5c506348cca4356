"""LoRA on the experts of a mixture, which transformers 5 keeps as 3-D parameters: what does not go with it.

Each refusal is one sentence, whether the fact comes from the YAML file or from a model; nothing here imports torch.
"""

from collections.abc import Mapping
from typing import Any

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.engines import find_engine_name
from axolotl_layersel.config.initialisation import PLAIN, normalise

KEY = "lora_target_parameters"


def check_expert_file(data: Mapping[str, Any]) -> None:
    """Raise LayerselError for what in a YAML file does not go with LoRA on expert parameters."""
    if not data.get(KEY):
        return
    if isinstance(data[KEY], str):
        raise LayerselError(
            f"{KEY}: {data[KEY]!r} is one name, and PEFT takes a list of them. Set it to [{data[KEY]}]."
        )
    initial = data.get("peft_init_lora_weights")
    if normalise(initial) not in PLAIN:
        raise LayerselError(
            f"peft_init_lora_weights: {initial!r} does not go with {KEY}: PEFT has it for linear modules alone. Remove "
            "it, or use `gaussian`."
        )
    if find_engine_name(data) == "zero3":
        raise LayerselError(describe_sharded_experts(KEY))


def describe_gated_experts(setting: str) -> str:
    """Return the message for gates, which ``setting`` asks for, where all LoRA is on expert parameters."""
    return (
        f"{KEY}: all LoRA is on the parameters of experts, and {setting} puts gates on linear modules only. Add some "
        "to `lora_target_modules`, such as q_proj and v_proj, or use `layersel.selection` with `method: gradient`."
    )


def describe_sharded_experts(key: str) -> str:
    """Return the message for LoRA on expert parameters, which ``key`` asks for, under ZeRO-3."""
    return (
        f"{key}: PEFT cannot put LoRA on expert parameters under ZeRO-3, which has split them before PEFT sees "
        "their shape. Use ZeRO-2 or FSDP2, or `lora_target_modules` without experts."
    )
