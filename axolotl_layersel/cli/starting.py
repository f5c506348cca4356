"""The choice of a launcher for ``axolotl-layersel plan``. A launcher costs a further import of torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from axolotl_layersel.config.engines import find_engine_name


def find_launcher(data: Mapping[str, Any], arguments: Sequence[str]) -> str:
    """Return the default launcher of a plan: accelerate or python.

    Args:
        data: the content of the YAML file. DeepSpeed and FSDP2 need the environment that accelerate sets.
        arguments: arguments for the launcher.
    """
    if arguments or find_engine_name(data) is not None:
        return "accelerate"
    import torch
    from accelerate.commands.config.config_args import default_config_file

    # The file of `accelerate config` has the number of processes.
    several = torch.accelerator.device_count() > 1
    return "accelerate" if several or Path(default_config_file).is_file() else "python"
