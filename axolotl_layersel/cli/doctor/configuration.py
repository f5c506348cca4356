"""Find the configuration of a base model on this machine. Nothing is downloaded, and nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.files import read_json

FILE = "config.json"
DEFAULT_OPTIMIZER = "adamw_torch_fused"  # of Axolotl 0.19.0
DEFAULT_RANK = 8  # of PEFT's LoraConfig
WAY_OUT = "Give the config.json of the base model."


def find_configuration(data: Mapping[str, Any], given: Path | None) -> tuple[dict[str, Any] | None, str | None]:
    """Return the content of the configuration of the base model, or None and why it is not at hand.

    ``given``: a config.json; default: that of ``base_model``, a folder or a model in the cache of the hub.

    Raises:
        LayerselError: if the file cannot be read, or is none of transformers.
    """
    name, key = data.get("base_model"), "--model-config"
    if given is None:
        given, key = find_file(str(name)), "base_model"
    if given is None:
        return None, (
            f"The configuration of base_model: {name} is not on this machine. What depends on the model (layers, "
            "parameters, memory, step time, communication, disk and readers) needs it: give its config.json by "
            "--model-config, or set base_model to a local folder."
        )
    content = read_json(key, given, WAY_OUT)
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise LayerselError(f"{key}: {given} has no model_type, as every model of transformers does. {WAY_OUT}")
    return content, None


def find_file(name: str) -> Path | None:
    """Return the path of the configuration of a local folder, or of a model in the cache of the hub, or None."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    folder = Path(name) / FILE
    if folder.is_file():
        return folder
    try:
        cached = try_to_load_from_cache(name, FILE)
    except HFValidationError:  # a path
        return None
    return Path(cached) if isinstance(cached, str) else None
