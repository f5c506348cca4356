"""What a YAML file says by itself, before Axolotl reads it: whether the plugin is listed, and what is in its block.

Nothing here imports torch or Axolotl, so that a slip is told within seconds.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.files import check_output
from axolotl_layersel.config.root import LayerselConfig, check_blank_blocks, missing_block
from axolotl_layersel.config.strict_block import as_mapping, list_plugins, quote

PLUGIN = "axolotl_layersel.LayerSelectionPlugin"
NAMES = (PLUGIN, "axolotl_layersel.plugin.LayerSelectionPlugin")
# How far a name may be from the plugin's, by difflib's measure, and still be a slip.
NEAR = 0.6
# Where Axolotl 0.19.0 writes without an ``output_dir``, and the log in it that it opens first.
DEFAULT_OUTPUT = "./model-out"
LOG_FILE = "debug.log"


def check_file(path: Path, with_folder: bool = True) -> None:
    """Check what a YAML file says by itself, see ``check_text``; what cannot be read at all Axolotl refuses itself."""
    data = read_yaml(path)
    if data is not None:
        check_text(data, with_folder)


def check_plugin(path: Path) -> None:
    """Raise LayerselError unless a YAML file has the plugin and its block, which may be wrong itself."""
    data = read_yaml(path)
    if data is None:
        raise LayerselError(f"CONFIG: {path} is no mapping in YAML. Give the path of an Axolotl YAML file.")
    check_listed(data)
    if data.get("layersel") is None:
        listed = any(name in NAMES for name in list_plugins(data))
        raise LayerselError(missing_block(data) if listed else f"layersel: {path} has no such block. Add it.")


def read_yaml(path: Path) -> Mapping[str, Any] | None:
    """Return the content of a YAML file as Axolotl reads it; None where it is none, which Axolotl says itself."""
    try:
        data = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    return data if isinstance(data, Mapping) else None


def check_text(data: Mapping[str, Any], with_folder: bool = True) -> None:
    """Check the plugin, its block and the output folder.

    ``with_folder``: whether the run will write to the folder that the file names.

    Raises:
        LayerselError: for a block without its plugin, a plugin without its block, and an output folder that cannot be.
        pydantic.ValidationError: for the block itself.
    """
    check_listed(data)
    if not any(name in NAMES for name in list_plugins(data)):
        return
    block = data.get("layersel")
    if block is None:
        raise LayerselError(missing_block(data))
    if isinstance(block, dict):
        check_blank_blocks(block)
    LayerselConfig.model_validate(block)
    if with_folder:
        check_folder(data)


def check_listed(data: Mapping[str, Any]) -> None:
    """Raise LayerselError for a ``layersel`` block, however it is spelt, without the plugin that reads it.

    Axolotl passes over a plugin that it cannot import and a block that no plugin reads, and trains plain LoRA.
    """
    key = find_block(data)
    listed = data.get("plugins")
    if key is None and not any("layersel" in name for name in list_plugins(data)):
        return
    if isinstance(listed, str) and listed in NAMES:
        raise LayerselError(f"plugins: {quote(listed)} is not a list. Write `- {listed}` on a line below it.")
    names = list_plugins(data)
    if any(name in NAMES for name in names):
        return
    slip = next((name for name in names if is_slip(name)), None)
    if slip is not None:
        raise LayerselError(
            f"plugins: {quote(slip)} is no plugin of axolotl-layersel, so the run would train plain LoRA. "
            f"Write `{PLUGIN}`."
        )
    found = "the key is missing" if listed is None else f"{quote(listed)} does not list axolotl-layersel"
    raise LayerselError(
        f"plugins: {found}, so `{key}` would be passed over and the run train plain LoRA. "
        f"Write `- {PLUGIN}` on a line below `plugins:`, or remove `{key}`."
    )


def find_block(data: Mapping[str, Any]) -> str | None:
    """Return the key of the ``layersel`` block, or of what looks like one under a misspelt key; None without."""
    if "layersel" in data:
        return "layersel"
    near = difflib.get_close_matches("layersel", [key for key in data if isinstance(key, str)], n=3, cutoff=NEAR)
    return next((key for key in near if {"selection", "l1ra"} & set(as_mapping(data[key]))), None)


def is_slip(name: str) -> bool:
    """Return whether the name of a plugin is meant to be this package's."""
    return "layersel" in name.lower() or bool(difflib.get_close_matches(name, NAMES, n=1, cutoff=NEAR))


def check_folder(data: Mapping[str, Any]) -> None:
    """Raise LayerselError where the output folder cannot be made or written to, as Axolotl's log would find first."""
    folder = data.get("output_dir", DEFAULT_OUTPUT)
    if not isinstance(folder, str):
        return
    check_output(folder, ())
    log = Path(folder) / LOG_FILE
    if log.is_dir():
        raise LayerselError(
            f"output_dir: {log} is a folder, where Axolotl writes its log. Move it, or set another output_dir."
        )
