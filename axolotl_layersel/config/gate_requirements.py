"""Settings that conflict with gates, which multiply the output of plain LoRA modules.

A refusal has the same words whether the YAML file or the trainer shows the reason.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from axolotl_layersel.common.errors import LayerselError, find_fault, raise_first
from axolotl_layersel.common.terminal import is_first_process
from axolotl_layersel.config.initialisation import PLAIN, check_loftq, normalise

LOG = logging.getLogger("axolotl.layersel")

LORA_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
# Written in Triton (axolotl 0.19.0), which needs a GPU; the others also run on a CPU.
GPU_KERNELS = ("lora_mlp_kernel",)
# The values of `rl` whose trainers generate the answers that they train on.
GENERATING_TRAINERS = ("grpo", "gdpo", "ebft")


def check_gated_run(
    setting: str, *, initialisation: bool | str | None, has_dora: bool, fp16: Any, restarts: bool
) -> None:
    """Raise LayerselError for a setting under which gates would be wrong.

    Args:
        setting: the YAML key that puts gates on LoRA.
        initialisation: ``peft_init_lora_weights``.
        has_dora: whether the adapter is DoRA.
        fp16: the value of the key; training in fp16 scales the loss.
        restarts: whether training starts over with smaller batches when memory runs out.
    """
    raise_first(find_gate_faults(setting, initialisation, has_dora, fp16, restarts))


def find_gate_faults(
    setting: str, initialisation: bool | str | None, has_dora: bool, fp16: Any, restarts: bool
) -> Iterator[str]:
    """Yield a message for each setting under which gates would be wrong, see ``check_gated_run``."""
    if has_dora:
        yield (
            f"peft_use_dora: true cannot be combined with {setting}: DoRA's magnitudes depend on the whole adapter, "
            "so parts of it cannot be gated. Remove peft_use_dora."
        )
    if normalise(initialisation) not in PLAIN:
        yield (
            f"peft_init_lora_weights: {initialisation!r} is not supported by {setting}, whose gates need an adapter "
            "that adds nothing at the start. Remove it, or use `gaussian`."
        )
    if fp16:
        yield (
            f"fp16: {fp16!r} scales the loss, and so the gradients of the gates of {setting}. Set `bf16: true` instead."
        )
    if restarts:
        yield (
            f"auto_find_batch_size: true restarts training, which {setting} does not support. Remove it, and set "
            "`micro_batch_size`."
        )


def find_gated_file_faults(data: Mapping[str, Any], setting: str) -> Iterator[str]:
    """Yield what conflicts with gates in a YAML file; ``setting`` is the key that needs them."""
    yield from find_gate_faults(
        setting,
        initialisation=data.get("peft_init_lora_weights"),
        has_dora=bool(data.get("peft_use_dora")),
        fp16=data.get("fp16") if data.get("fp16") != "auto" else None,
        restarts=bool(data.get("auto_find_batch_size")),
    )
    yield from find_fault(check_loftq, data)


def check_generation(uses_vllm: bool) -> None:
    """Raise LayerselError if vLLM generates the answers that ``l1ra`` trains on."""
    if uses_vllm:
        raise LayerselError(
            "trl.use_vllm: true sends the adapter to vLLM while it trains, which layersel.l1ra is untested with. "
            "Remove it, so that the model in training generates, or use only `selection`."
        )


def switch_off_kernels(data: dict[str, Any]) -> None:
    """Switch off the fused LoRA kernels that Axolotl switches on by default; called where they cannot apply gates.

    Args:
        data: the content of the YAML file as the user wrote it, changed in place.

    Raises:
        LayerselError: if the file switches one on.
    """
    for key in LORA_KERNELS:
        if data.get(key):
            raise LayerselError(
                f"{key}: {data[key]} bypasses the modules that layersel.l1ra needs. Remove {key} or layersel.l1ra."
            )
        data[key] = False
    if is_first_process():
        LOG.info("layersel: l1ra switches off the fused LoRA kernels: %s", ", ".join(LORA_KERNELS))


def keep_kernels_off(data: dict[str, Any]) -> None:
    """Keep Axolotl from switching on its fused LoRA kernels; called where there is no GPU to run them.

    Args:
        data: the content of the YAML file as the user wrote it, changed in place if it sets none of them.
    """
    if data.get("adapter") in ("lora", "qlora") and all(data.get(key) is None for key in LORA_KERNELS):
        data.update(dict.fromkeys(LORA_KERNELS, False))
        if is_first_process():
            LOG.info("layersel: there is no GPU, so Axolotl's fused LoRA kernels stay off: %s", ", ".join(LORA_KERNELS))


def check_kernels(data: Mapping[str, Any]) -> None:
    """Raise LayerselError if a fused LoRA kernel that needs a GPU is on; called where there is no GPU."""
    for key in GPU_KERNELS:
        if data.get(key):
            raise LayerselError(
                f"{key}: {data[key]} needs a GPU, but this process sees none, so training would fail after the layers "
                f"are chosen. Remove {key}, or set it to false."
            )
