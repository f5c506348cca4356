"""Faults of a checkpoint for one process of a run."""

from pathlib import Path

from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.engines import find_launched_class
from axolotl_layersel.training.checkpoints import find_faults, list_needed_files


def find_fault(checkpoint: Path, settings: LayerselConfig, process: int, world: int) -> str | None:
    """Return why ``process`` of ``world`` cannot resume from ``checkpoint``, or None."""
    needed = list_needed_files(checkpoint, settings, find_launched_class(), process, world, others=False)
    return next(iter(find_faults(checkpoint, settings, needed).values()), None)
