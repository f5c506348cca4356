"""LoRA on the experts of a mixture, which transformers 5 keeps as 3-D parameters: what does not go with it.

Each refusal is one sentence, whether the fact comes from the YAML file or from a model; nothing here imports torch.
"""

from collections.abc import Mapping
from typing import Any

from axolotl_layersel.block import as_mapping
from axolotl_layersel.engines.refusals import find_engine_name
from axolotl_layersel.errors import LayerselError
from axolotl_layersel.initialisation import PLAIN, normalise

KEY = "lora_target_parameters"


def check_expert_file(data: Mapping[str, Any]) -> None:
    """Raise LayerselError for what in a YAML file does not go with LoRA on expert parameters."""
    if not data.get(KEY):
        return
    if isinstance(data[KEY], str):
        raise LayerselError(
            f"{KEY}: {data[KEY]!r} is one name, and PEFT takes a list of them. Set it to [{data[KEY]}]."
        )
    block = as_mapping(data.get("layersel"))
    if block.get("l1ra") is not None:
        raise LayerselError(describe_gated_experts("layersel.l1ra"))
    selection = as_mapping(block.get("selection"))
    if selection.get("method") == "flexora" and selection.get("plan") is None:
        raise LayerselError(describe_gated_experts("layersel.selection.method: flexora"))
    initial = data.get("peft_init_lora_weights")
    if normalise(initial) not in PLAIN:
        raise LayerselError(
            f"peft_init_lora_weights: {initial!r} does not go with {KEY}: PEFT has it for linear modules alone. Remove "
            "it, or use `gaussian`."
        )
    if find_engine_name(data) == "zero3":
        raise LayerselError(
            f"{KEY}: PEFT cannot put LoRA on expert parameters under ZeRO-3, which has split them before PEFT sees "
            "their shape. Use ZeRO-2 or FSDP2, or `lora_target_modules` without experts."
        )


def describe_gated_experts(setting: str) -> str:
    """Return the message for gates, which ``setting`` asks for, on LoRA on expert parameters."""
    return (
        f"{KEY}: {setting} puts a gate on what LoRA computes of a module's input, and LoRA on expert parameters "
        "changes their weights instead. Use `layersel.selection` with `method: gradient`, or `lora_target_modules`."
    )
