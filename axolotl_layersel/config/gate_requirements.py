"""What gates need of the LoRA under them and of the run around it; nothing here imports torch.

A gate multiplies what a plain LoRA module computes. Each refusal is one sentence, whether the fact comes from the
YAML file or from a trainer.
"""

import logging
from collections.abc import Mapping
from typing import Any

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.initialisation import PLAIN, check_loftq, normalise

LOG = logging.getLogger("axolotl.layersel")

LORA_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
# Written in Triton (axolotl 0.19.0), which computes on GPUs only; the others run on a CPU too.
GPU_KERNELS = ("lora_mlp_kernel",)
# Trainers that generate the answers that they train on.
GENERATING_TRAINERS = ("grpo", "gdpo", "ebft")


def check_gated_run(
    setting: str, *, initialisation: bool | str | None, has_dora: bool, fp16: Any, restarts: bool
) -> None:
    """Raise LayerselError for what would make gates wrong.

    Args:
        setting: the YAML key that puts gates on LoRA.
        initialisation: ``peft_init_lora_weights``.
        has_dora: whether the adapter is DoRA.
        fp16: whether the loss is scaled, as training in fp16 does; the value of the key.
        restarts: whether training starts over with smaller batches where memory does not suffice.
    """
    if has_dora:
        raise LayerselError(
            f"peft_use_dora: true. DoRA ties its magnitudes to the whole adapter, of which {setting} cannot gate "
            "parts. Remove peft_use_dora."
        )
    if normalise(initialisation) not in PLAIN:
        raise LayerselError(
            f"peft_init_lora_weights: {initialisation!r} is not supported by {setting}, whose gates need an "
            "adapter that starts from nothing. Remove it, or use `gaussian`."
        )
    if fp16:
        raise LayerselError(
            f"fp16: {fp16!r} scales the loss, and with it the gradients of the gates of {setting}. "
            "Set `bf16: true` instead."
        )
    if restarts:
        raise LayerselError(
            f"auto_find_batch_size: true starts training over, which {setting} does not support. Remove it, and "
            "set `micro_batch_size`."
        )


def check_gated_file(data: Mapping[str, Any], setting: str) -> None:
    """Raise LayerselError for what would make gates wrong in a YAML file; ``setting`` is the key that asks for them."""
    check_gated_run(
        setting,
        initialisation=data.get("peft_init_lora_weights"),
        has_dora=bool(data.get("peft_use_dora")),
        fp16=data.get("fp16") if data.get("fp16") != "auto" else None,
        restarts=bool(data.get("auto_find_batch_size")),
    )
    check_loftq(data)


def check_generation(uses_vllm: bool) -> None:
    """Raise LayerselError where vLLM, and not the model in training itself, generates the answers for ``l1ra``."""
    if uses_vllm:
        raise LayerselError(
            "trl.use_vllm: true gives the adapter to vLLM while it trains, which layersel.l1ra was never run with. "
            "Remove it, so that the model itself generates, or use `selection` alone."
        )


def switch_off_kernels(data: dict[str, Any]) -> None:
    """Switch off the fused LoRA kernels that Axolotl would switch on by itself, where they cannot be given gates.

    Args:
        data: the YAML file's content as the user wrote it, which is changed.

    Raises:
        LayerselError: if the user switched one on.
    """
    for key in LORA_KERNELS:
        if data.get(key):
            raise LayerselError(
                f"{key}: {data[key]} bypasses the modules that layersel.l1ra looks into. Remove {key}, or that setting."
            )
        data[key] = False
    LOG.info("layersel: l1ra switches off the fused LoRA kernels: %s", ", ".join(LORA_KERNELS))


def keep_kernels_off(data: dict[str, Any]) -> None:
    """Keep Axolotl from switching on its fused LoRA kernels by itself where there is no GPU to run them.

    Args:
        data: the YAML file's content as the user wrote it, which is changed where it names none of them.
    """
    if data.get("adapter") in ("lora", "qlora") and all(data.get(key) is None for key in LORA_KERNELS):
        data.update(dict.fromkeys(LORA_KERNELS, False))
        LOG.info("layersel: there is no GPU, so Axolotl's fused LoRA kernels stay off: %s", ", ".join(LORA_KERNELS))


def check_kernels(data: Mapping[str, Any]) -> None:
    """Raise LayerselError for a fused LoRA kernel that needs a GPU and is on; called where there is none."""
    for key in GPU_KERNELS:
        if data.get(key):
            raise LayerselError(
                f"{key}: {data[key]} needs a GPU, and this process sees none, so training would fail after the layers "
                f"are chosen. Remove {key}, or set it to false."
            )
