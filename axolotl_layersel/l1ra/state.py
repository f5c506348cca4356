"""What a checkpoint holds beside its plain adapter so that ranks, gates and weights resume exactly."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from axolotl_layersel.args import L1RAArgs
from axolotl_layersel.errors import LayerselError
from axolotl_layersel.files import FOLDER, replace_atomically

STATE_FILE = "state.safetensors"
SCHEMA_VERSION = "1"
# Names in the file: the weights in training, neither folded nor scaled, and the flat tensors of the gates.
ADAPTER_PREFIX = "adapter/"
GATE_PREFIX = "gates/"


def state_path(checkpoint: str | Path) -> Path:
    """Return where the state of a checkpoint lies."""
    return Path(checkpoint) / FOLDER / STATE_FILE


def write_state(
    path: Path, adapter: dict[str, torch.Tensor], gates: dict[str, torch.Tensor], metadata: dict[str, str]
) -> None:
    """Write weights, gates and what they must be checked against to ``path``; the file appears at once and complete."""
    tensors = {f"{ADAPTER_PREFIX}{name}": tensor for name, tensor in adapter.items()}
    tensors |= {f"{GATE_PREFIX}{name}": tensor.cpu() for name, tensor in gates.items()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    with replace_atomically(path, size) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", "schema_version": SCHEMA_VERSION, **metadata})


def read_gates(path: Path, names: list[str]) -> dict[str, torch.Tensor]:
    """Return the flat tensors of the gates in ``path``."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(f"{GATE_PREFIX}{name}") for name in names}


def check_state(path: Path, settings: L1RAArgs, key: str) -> dict[str, str]:
    """Return the metadata of a checkpoint's state.

    Raises:
        LayerselError: naming ``key`` if it is missing, damaged, of another schema, or made with other settings.
    """
    if not path.exists():
        raise LayerselError(
            f"{key}: {path} is missing: it is not a checkpoint of a run with layersel.l1ra. Resume another "
            "checkpoint, or start without resuming."
        )
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise LayerselError(f"{key}: {path} is damaged ({error}). Resume another checkpoint.") from error
    if metadata.get("schema_version") != SCHEMA_VERSION:
        raise LayerselError(
            f"{key}: {path} has schema_version {metadata.get('schema_version')!r}, this version of axolotl-layersel "
            f"reads {SCHEMA_VERSION}. Resume with the version that wrote it."
        )
    then = json.loads(metadata["settings"])
    for name, value in settings.model_dump().items():
        if then.get(name) != value:
            raise LayerselError(
                f"layersel.l1ra.{name}: {value!r} contradicts the checkpoint {path.parent.parent}, which was made with "
                f"{then.get(name)!r}. Restore the value, or start without resuming."
            )
    return metadata
