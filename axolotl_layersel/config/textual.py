"""The checks of a YAML file before Axolotl reads it: whether the plugin is listed, and its block.

Nothing here imports torch or Axolotl, so that a mistake is reported within seconds.
"""

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.files import check_output
from axolotl_layersel.config.root import LayerselConfig, check_blank_blocks, missing_block
from axolotl_layersel.config.strict_block import as_mapping, as_whole, list_plugins, quote

PLUGIN = "axolotl_layersel.LayerSelectionPlugin"
NAMES = (PLUGIN, "axolotl_layersel.plugin.LayerSelectionPlugin")
# The plugin that measures the runs of `axolotl layersel compare`, which may train plain LoRA.
MEASURING = "axolotl_layersel.cli.compare.measuring.MeasuringPlugin"
# Names with at least this similarity to the plugin's, as difflib measures it, count as misspelt.
NEAR = 0.6
# The default of ``output_dir`` in Axolotl 0.19.0, and the log that Axolotl opens in the folder first.
DEFAULT_OUTPUT = "./model-out"
DEFAULT_SEED = 42  # the Trainer's, without `seed`
LOG_FILE = "debug.log"


def check_file(path: Path, with_folder: bool = True) -> None:
    """Check a YAML file, see ``check_text``; Axolotl refuses a file that cannot be read."""
    data = read_yaml(path)
    if data is not None:
        check_text(data, with_folder)


def check_path(path: Path) -> None:
    """Raise LayerselError unless ``path`` is that of a file."""
    if os.path.isdir(path):
        raise LayerselError(f"{path} is a folder. Give the path of an Axolotl YAML file.")
    if not os.path.isfile(path):
        raise LayerselError(f"{path} does not exist. Give the path of an Axolotl YAML file.")


def check_plugin(path: Path) -> None:
    """Raise LayerselError unless a YAML file lists the plugin and has its block, whose content is not checked."""
    data = read_mapping(path)
    check_listed(data)
    if data.get("layersel") is None:
        listed = any(name in NAMES for name in list_plugins(data))
        raise LayerselError(missing_block(data) if listed else f"layersel: {path} has no such block. Add it.")


def read_yaml(path: Path) -> Mapping[str, Any] | None:
    """Return the content of a YAML file; None if it is not a mapping, which Axolotl refuses."""
    try:
        data = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    return data if isinstance(data, Mapping) else None


def read_mapping(path: Path) -> Mapping[str, Any]:
    """Return the content of a YAML file, and raise LayerselError if it is not a mapping."""
    data = read_yaml(path)
    if data is None:
        raise LayerselError(f"CONFIG: {path} is not a YAML file with a mapping. Give the path of an Axolotl YAML file.")
    return data


def find_seed(data: Mapping[str, Any]) -> int:
    """Return the seed of the run of a YAML file."""
    seed = as_whole(data.get("seed"))
    return DEFAULT_SEED if seed is None else seed


def check_text(data: Mapping[str, Any], with_folder: bool = True) -> None:
    """Check the plugin, its block and the output folder.

    Args:
        data: the content of the file.
        with_folder: whether the run will write to the output folder.

    Raises:
        LayerselError: if the block or the plugin is missing, or the output folder cannot be written to.
        pydantic.ValidationError: if the block is invalid.
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
    """Raise LayerselError for a ``layersel`` block, also a misspelt one, in a file that does not list the plugin.

    Axolotl ignores a plugin that it cannot import and a block that no plugin reads, and would train plain LoRA.
    """
    key = find_block(data)
    listed = data.get("plugins")
    names = [name for name in list_plugins(data) if name != MEASURING]
    if key is None and not any("layersel" in name for name in names):
        return
    if isinstance(listed, str) and listed in NAMES:
        raise LayerselError(f"plugins: {quote(listed)} is not a list. Write `- {listed}` on a line below it.")
    if any(name in NAMES for name in names):
        return
    slip = next((name for name in names if is_slip(name)), None)
    if slip is not None:
        raise LayerselError(
            f"plugins: {quote(slip)} is not a plugin of axolotl-layersel, so the run would train plain LoRA. "
            f"Write `{PLUGIN}`."
        )
    found = "the key is missing" if listed is None else f"{quote(listed)} does not list axolotl-layersel"
    raise LayerselError(
        f"plugins: {found}, so `{key}` would be ignored and the run would train plain LoRA. "
        f"Write `- {PLUGIN}` on a line below `plugins:`, or remove `{key}`."
    )


def find_block(data: Mapping[str, Any]) -> str | None:
    """Return the key of the ``layersel`` block, which may be misspelt; None if there is no such block."""
    if "layersel" in data:
        return "layersel"
    near = difflib.get_close_matches("layersel", [key for key in data if isinstance(key, str)], n=3, cutoff=NEAR)
    return next((key for key in near if {"selection", "l1ra"} & set(as_mapping(data[key]))), None)


def is_slip(name: str) -> bool:
    """Return whether a name looks like that of this package's plugin."""
    return "layersel" in name.lower() or bool(difflib.get_close_matches(name, NAMES, n=1, cutoff=NEAR))


def check_folder(data: Mapping[str, Any]) -> None:
    """Raise LayerselError if the output folder, or Axolotl's log in it, cannot be written to."""
    folder = data.get("output_dir", DEFAULT_OUTPUT)
    if not isinstance(folder, str):
        return
    check_output(folder, ())
    log = Path(folder) / LOG_FILE
    if log.is_dir():
        raise LayerselError(
            f"output_dir: {log} is a folder, but Axolotl writes its log there. Move it, or set another output_dir."
        )
