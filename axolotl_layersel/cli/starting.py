"""Whether ``axolotl-layersel plan`` needs a launcher, which starts one process or more and imports torch once more."""

from collections.abc import Sequence
from pathlib import Path

from axolotl_layersel.config.engines import find_engine_name
from axolotl_layersel.config.textual import read_yaml


def find_launcher(config: Path, arguments: Sequence[str]) -> str:
    """Return what starts the processes that a plan needs where the user has not said it: accelerate or python.

    Args:
        config: the YAML file. DeepSpeed and FSDP2 need what accelerate tells a process.
        arguments: of the launcher.
    """
    if arguments or find_engine_name(read_yaml(config) or {}) is not None:
        return "accelerate"
    import torch
    from accelerate.commands.config.config_args import default_config_file

    # What `accelerate config` has written holds the number of processes, and more.
    several = torch.accelerator.device_count() > 1
    return "accelerate" if several or Path(default_config_file).is_file() else "python"
