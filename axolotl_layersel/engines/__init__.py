"""The engines that distribute a model: their table, and how a run's engine is found. Nothing here imports torch."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.engines import check_parallelism

if TYPE_CHECKING:
    from transformers import Trainer

    from axolotl_layersel.engines.base import Engine

# Fields of accelerate's ``ParallelismConfig``, by the YAML keys that set them.
SIZES = {"tensor_parallel_size": "tp_size", "context_parallel_size": "cp_size", "sequence_parallel_degree": "sp_size"}
# Module and class of each engine, by name.
ENGINES = {
    "single": ("base", "Engine"),
    "ddp": ("base", "Engine"),
    "zero0": ("zero", "DeepSpeedEngine"),
    "zero1": ("zero", "ZeroEngine"),
    "zero2": ("zero", "ZeroEngine"),
    "zero3": ("zero", "PartitionedEngine"),
    "fsdp2": ("fsdp2", "ShardedEngine"),
}


def find_engine(trainer: Trainer) -> Engine:
    """Return the engine of ``trainer``, which need not be built yet.

    Raises:
        LayerselError: if the engine is not supported.
    """
    accelerator = trainer.accelerator
    if accelerator.parallelism_config is not None:
        check_parallelism({key: getattr(accelerator.parallelism_config, name) for key, name in SIZES.items()})
    kind = accelerator.distributed_type.value
    if kind == "NO":
        name = "single"
    elif kind == "DEEPSPEED":
        name = f"zero{int(accelerator.state.deepspeed_plugin.zero_stage)}"
    elif kind == "FSDP" and accelerator.state.fsdp_plugin.fsdp_version == 2:
        name = "fsdp2"
    elif kind.startswith("MULTI_"):
        name = "ddp"
    else:
        raise LayerselError(
            f"layersel: the engine {kind} is not supported. Use one process, DDP, DeepSpeed ZeRO-1, 2 or 3, or FSDP2."
        )
    return load_class(name)(trainer, name)


def find_launched_class() -> type[Engine]:
    """Return the class of this process's engine before a trainer exists, from accelerate's environment variables."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return load_class(f"zero{int(os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', 0))}")
    return load_class("fsdp2" if os.environ.get("ACCELERATE_USE_FSDP") == "true" else "ddp")


def list_classes() -> list[type[Engine]]:
    """Return the distinct classes of all engines."""
    return list(dict.fromkeys(load_class(name) for name in ENGINES))


def load_class(name: str) -> type[Engine]:
    """Return the class of the engine ``name``, a key of ``ENGINES``."""
    module, kind = ENGINES[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), kind)
