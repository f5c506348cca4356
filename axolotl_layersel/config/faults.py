"""Everything that refuses a YAML file, in place of the first thing; Axolotl's commands show that one.

Nothing here imports torch or Axolotl.
"""

from collections.abc import Mapping
from typing import Any

from axolotl_layersel.common.errors import find_fault
from axolotl_layersel.config.root import (
    LayerselConfig,
    find_blank_blocks,
    find_block_faults,
    find_run_faults,
    missing_block,
)
from axolotl_layersel.config.strict_block import as_mapping, list_plugins, read_leniently
from axolotl_layersel.config.textual import NAMES, PLUGIN, check_folder, check_listed

WAY_OUT = f"Add it, and `- {PLUGIN}` below `plugins:`."


def list_faults(data: Mapping[str, Any], with_folder: bool = True) -> tuple[LayerselConfig | None, list[str]]:
    """Return the ``layersel`` block without the values that are refused, and all messages that refuse the file.

    The first message is the one that a command of Axolotl's ends with. The block is None if it cannot be read.

    Args:
        data: the content of the file.
        with_folder: whether the run will write to the output folder.
    """
    faults = [*find_fault(check_listed, data)]
    given, block = data.get("layersel"), None
    if given is None:
        if not faults:
            listed = any(name in NAMES for name in list_plugins(data))
            faults.append(missing_block(data) if listed else f"layersel: the block is missing. {WAY_OUT}")
    else:
        faults += find_blank_blocks(as_mapping(given))
        block, found = read_leniently(LayerselConfig, given)
        faults += found
    if with_folder:
        faults += find_fault(check_folder, data)
    faults += find_run_faults(data)
    if block is not None:
        faults += find_block_faults(data, block)
    return block, list(dict.fromkeys(faults))
