"""What a YAML file asks for that no engine can do together with this package; nothing here imports torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.strict_block import as_mapping, as_whole, quote

# Keys that split what this package sees as one, what that is, and why they are refused. Under tensor parallelism each
# device has its own rows of B, or columns of A, as plain tensors (PEFT 0.20.0), and the first one's are what is saved
# (seen with axolotl 0.19.0 and plain LoRA on two processes). Axolotl needs ring-flash-attn for rows, and DeepEP for
# experts.
ROWS = "rows over devices by attention that this plugin is untested with; Axolotl's runs on GPUs alone"
PARALLELISM = {
    "tensor_parallel_size": "LoRA's matrices over devices, of which one device's part alone is saved, and PEFT cannot "
    "load that",
    "context_parallel_size": ROWS,
    "sequence_parallel_degree": ROWS,
    "expert_parallel_size": "experts over devices in a way that this plugin is untested with; Axolotl's runs on GPUs "
    "alone",
}
# What FSDP2's own checkpointing of activations is called, as Axolotl reads it.
CHECKPOINTING = ("activation_checkpointing", "fsdp_activation_checkpointing")
# What the engines that split weights are called in messages, by their names.
LABELS = {"zero3": "ZeRO-3", "fsdp2": "FSDP2"}


def check_engine(data: Mapping[str, Any]) -> None:
    """Raise LayerselError for a way of distributing the model that the plugin does not support."""
    check_parallelism(data)
    fsdp_config = data.get("fsdp_config") or {}
    if not isinstance(fsdp_config, Mapping):
        raise LayerselError(
            f"fsdp_config: {quote(fsdp_config)} is not a mapping. Write its keys on lines of their own below it."
        )
    if data.get("fsdp") or fsdp_config:
        version = data.get("fsdp_version") or fsdp_config.get("fsdp_version") or fsdp_config.get("version")
        if str(version) != "2":
            raise LayerselError(f"fsdp_version: {version!r} is not supported by the plugin. Set `fsdp_version: 2`.")
        checkpoints = next((key for key in CHECKPOINTING if fsdp_config.get(key)), None)
        if checkpoints and data.get("gradient_checkpointing"):
            raise LayerselError(
                f"fsdp_config.{checkpoints}: {fsdp_config[checkpoints]!r} and gradient_checkpointing: "
                f"{data['gradient_checkpointing']!r} ask for the same. Remove one of them."
            )
    check_disk(read_zero(data.get("deepspeed")), moves_state(as_mapping(data.get("layersel"))))


def check_parallelism(data: Mapping[str, Any]) -> None:
    """Raise LayerselError where a key of ``PARALLELISM`` is above 1, or no number."""
    for key, what in PARALLELISM.items():
        value = as_whole(data.get(key))
        if value is None and data.get(key) is not None:
            raise LayerselError(f"{key}: {quote(data[key])} is not a whole number. Set it to 1.")
        if value is not None and value > 1:
            raise LayerselError(f"{key}: {value} splits {what}. Set it to 1.")


def moves_state(block: Mapping[str, Any]) -> bool:
    """Return whether a ``layersel`` block asks for what writes weights that are in training."""
    return "l1ra" in block or as_mapping(block.get("selection")).get("method") == "flexora"


def check_disk(zero: Mapping[str, Any], writes: bool) -> None:
    """Raise LayerselError where DeepSpeed keeps on an NVMe disk what the plugin reads or writes.

    Args:
        zero: ``zero_optimization`` of its file.
        writes: whether masters and moments are written too.
    """
    for key in ("offload_param", "offload_optimizer") if writes else ("offload_param",):
        if as_mapping(zero.get(key)).get("device") == "nvme":
            raise LayerselError(
                f"deepspeed: its file's zero_optimization.{key}.device nvme keeps on disk what layersel reads and "
                "writes in memory. Use `cpu` or `none`."
            )


def read_zero(deepspeed: Any) -> Mapping[str, Any]:
    """Return ``zero_optimization`` of the ``deepspeed`` key, a file's path or its content.

    It is empty where it is not to be seen: Axolotl itself says what is wrong with the file.
    """
    try:
        content = deepspeed if isinstance(deepspeed, Mapping) else json.loads(Path(str(deepspeed)).read_text())
        return as_mapping(content["zero_optimization"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def find_zero_stage(deepspeed: Any) -> int | None:
    """Return the ZeRO stage of the ``deepspeed`` key, see ``read_zero``; None where it is not to be seen."""
    try:
        return int(read_zero(deepspeed)["stage"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return None


def find_engine_name(data: Mapping[str, Any]) -> str | None:
    """Return the name of the engine that a YAML file chooses, None for one process and DDP, or where it is not seen."""
    stage = find_zero_stage(data.get("deepspeed"))
    if stage is not None:
        return f"zero{stage}"
    return "fsdp2" if data.get("fsdp") or as_mapping(data.get("fsdp_config")) else None


def find_shards(data: Mapping[str, Any]) -> str | None:
    """Return the name of the engine that a YAML file chooses, where that splits weights over the processes."""
    name = find_engine_name(data)
    return name if name in LABELS else None


def writes_whole_state(data: Mapping[str, Any]) -> bool:
    """Return whether a YAML file asks FSDP2 for FULL_STATE_DICT; Axolotl reads both names of the key."""
    config = as_mapping(data.get("fsdp_config"))
    kind = config.get("state_dict_type") or config.get("fsdp_state_dict_type")
    return isinstance(kind, str) and kind.upper() == "FULL_STATE_DICT"
