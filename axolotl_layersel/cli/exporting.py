"""Protect an adapter from being overwritten by an export of another one."""

import json
import os
from pathlib import Path

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.files import parse_json, write_atomically

RECORD = "layersel_export.json"  # next to the adapter's files
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")


def check_target(source: Path, output: Path) -> None:
    """Raise LayerselError if ``output`` holds an adapter that is not an earlier export of ``source``."""
    held = next((name for name in ADAPTER_FILES if os.path.lexists(output / name)), None)
    if held is not None and read_record(output) != find_source(source, output):
        raise LayerselError(
            f"--output: {output} holds an {held} that is not an earlier export of {source}. Give another folder, or "
            "overwrite it with --force."
        )


def find_source(source: Path, output: Path) -> str:
    """Return the path of the source from the exported adapter, which stays true if both are moved together."""
    return os.path.relpath(os.path.realpath(source), os.path.realpath(output))


def read_record(output: Path) -> str | None:
    """Return the source in the record of an earlier export; None without one."""
    try:
        content = parse_json((output / RECORD).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content.get("source") if isinstance(content, dict) else None


def write_record(source: Path, output: Path, layout: str) -> None:
    """Record in ``output`` which adapter was exported to it."""
    content = json.dumps({"source": find_source(source, output), "layout": layout}, indent=2)
    write_atomically(output / RECORD, f"{content}\n".encode())
