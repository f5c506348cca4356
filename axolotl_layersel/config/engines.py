"""Ways to distribute a model: which engine a YAML file chooses, and which ways the plugin refuses."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from axolotl_layersel.common.errors import raise_first
from axolotl_layersel.config.strict_block import as_mapping, as_whole, quote

# Keys that are refused above 1, and how the message goes on after "splits". Under tensor parallelism each device holds
# its own rows of B, or columns of A, as plain tensors (PEFT 0.20.0), and only the first device's are saved (seen with
# axolotl 0.19.0 and plain LoRA on two processes). Axolotl needs ring-flash-attn to split rows, and DeepEP to split
# experts.
ROWS = "rows across devices, which the plugin is untested with; Axolotl supports it on GPUs only"
PARALLELISM = {
    "tensor_parallel_size": "LoRA's matrices across devices, but only one device's part is saved, and PEFT cannot load "
    "it",
    "context_parallel_size": ROWS,
    "sequence_parallel_degree": ROWS,
    "expert_parallel_size": "experts across devices, which the plugin is untested with; Axolotl supports it on GPUs "
    "only",
}
# The keys under which Axolotl reads FSDP2's own activation checkpointing.
CHECKPOINTING = ("activation_checkpointing", "fsdp_activation_checkpointing")
# How messages call the engines that split weights.
LABELS = {"zero3": "ZeRO-3", "fsdp2": "FSDP2"}


def find_engine_faults(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message for each way of distributing the model that the plugin does not support."""
    yield from find_parallelism_faults(data)
    yield from find_fsdp_faults(data)
    yield from find_disk_faults(read_zero(data.get("deepspeed")), moves_state(as_mapping(data.get("layersel"))))


def find_fsdp_faults(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message for each setting of FSDP that the plugin does not support."""
    fsdp_config = data.get("fsdp_config") or {}
    if not isinstance(fsdp_config, Mapping):
        yield f"fsdp_config: {quote(fsdp_config)} is not a mapping. Write its keys on lines of their own below it."
        return
    if data.get("fsdp") or fsdp_config:
        version = data.get("fsdp_version") or fsdp_config.get("fsdp_version") or fsdp_config.get("version")
        if str(version) != "2":
            yield f"fsdp_version: {version!r} is not supported by the plugin. Set `fsdp_version: 2`."
        checkpoints = next((key for key in CHECKPOINTING if fsdp_config.get(key)), None)
        if checkpoints and data.get("gradient_checkpointing"):
            yield (
                f"fsdp_config.{checkpoints}: {fsdp_config[checkpoints]!r} and gradient_checkpointing: "
                f"{data['gradient_checkpointing']!r} ask for the same thing. Remove one of them."
            )


def check_parallelism(data: Mapping[str, Any]) -> None:
    """Raise LayerselError if a key of ``PARALLELISM`` is above 1 or is not a whole number."""
    raise_first(find_parallelism_faults(data))


def find_parallelism_faults(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message for each key of ``PARALLELISM`` that is above 1 or is not a whole number."""
    for key, what in PARALLELISM.items():
        value = as_whole(data.get(key))
        if value is None and data.get(key) is not None:
            yield f"{key}: {quote(data[key])} is not a whole number. Set it to 1."
        if value is not None and value > 1:
            yield f"{key}: {value} splits {what}. Set it to 1."


def moves_state(block: Mapping[str, Any]) -> bool:
    """Return whether a ``layersel`` block asks for a feature that edits weights and optimizer state during training."""
    return "l1ra" in block or as_mapping(block.get("selection")).get("method") == "flexora"


def check_disk(zero: Mapping[str, Any], writes: bool) -> None:
    """Raise LayerselError if DeepSpeed offloads tensors to NVMe that the plugin reads or writes.

    Args:
        zero: ``zero_optimization`` of the DeepSpeed file.
        writes: whether the plugin also writes fp32 masters and Adam moments.
    """
    raise_first(find_disk_faults(zero, writes))


def find_disk_faults(zero: Mapping[str, Any], writes: bool) -> Iterator[str]:
    """Yield a message for each kind of tensor on NVMe, see ``check_disk``."""
    for key in ("offload_param", "offload_optimizer") if writes else ("offload_param",):
        if as_mapping(zero.get(key)).get("device") == "nvme":
            yield (
                f"deepspeed: zero_optimization.{key}.device: nvme in its file keeps tensors on disk that layersel must "
                "read and write in memory. Use `cpu` or `none`."
            )


def read_zero(deepspeed: Any) -> Mapping[str, Any]:
    """Return ``zero_optimization`` of the DeepSpeed file.

    Args:
        deepspeed: the value of the ``deepspeed`` key: a path, or the content of the file.

    Returns:
        An empty mapping if the file cannot be read: Axolotl reports that.
    """
    try:
        content = deepspeed if isinstance(deepspeed, Mapping) else json.loads(Path(str(deepspeed)).read_text())
        return as_mapping(content["zero_optimization"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def find_zero_stage(deepspeed: Any) -> int | None:
    """Return the ZeRO stage that the ``deepspeed`` key sets, see ``read_zero``; None if it sets none."""
    try:
        return int(read_zero(deepspeed)["stage"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return None


def find_engine_name(data: Mapping[str, Any]) -> str | None:
    """Return the name of the engine that a YAML file chooses; None for one process, DDP and unreadable files."""
    stage = find_zero_stage(data.get("deepspeed"))
    if stage is not None:
        return f"zero{stage}"
    return "fsdp2" if data.get("fsdp") or as_mapping(data.get("fsdp_config")) else None


def find_shards(data: Mapping[str, Any]) -> str | None:
    """Return the name of the engine that a YAML file chooses if it splits weights across processes, else None."""
    name = find_engine_name(data)
    return name if name in LABELS else None


def writes_whole_state(data: Mapping[str, Any]) -> bool:
    """Return whether a YAML file asks FSDP2 for FULL_STATE_DICT, under either name that Axolotl reads."""
    config = as_mapping(data.get("fsdp_config"))
    kind = config.get("state_dict_type") or config.get("fsdp_state_dict_type")
    return isinstance(kind, str) and kind.upper() == "FULL_STATE_DICT"
