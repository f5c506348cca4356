"""Tensors in safetensors files, with a digest of their content that is checked on reading."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from axolotl_layersel.common.digests import hash_tensors
from axolotl_layersel.common.files import reading

DIGEST = "sha256"


def save_tensors(tensors: dict[str, torch.Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to ``path``, not atomically, and with the same bytes for the same tensors.

    Args:
        tensors: the tensors by name.
        path: the file.
        metadata: further metadata for the file's header.
    """
    metadata = {"format": "pt", **(metadata or {})}
    save_file(tensors, path, metadata={**metadata, DIGEST: hash_tensors(tensors, metadata)})
    sort_metadata(path)


def load_tensors(key: str, path: str | Path, way_out: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors of a file by name, and its metadata. See ``files.refuse`` for the arguments.

    Raises:
        LayerselError: if the file is missing or damaged, contradicts its digest, or has numbers that are not finite.
            Files of other programs have no digest.
    """
    with reading(key, path, way_out):
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        digest = metadata.pop(DIGEST, None)
        if digest is not None and digest != hash_tensors(tensors, metadata):
            raise ValueError(f"its content does not match its {DIGEST}")
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not (tensor if tensor.itemsize > 1 else tensor.float()).isfinite().all():
                raise ValueError(f"{name!r} holds NaN or infinite numbers")
    return tensors, metadata


def sort_metadata(path: str | Path) -> None:
    """Sort a file's metadata, which safetensors writes in random order."""
    with open(path, "r+b") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size, "the same content, as compact as safetensors writes it"
        file.seek(8)
        file.write(text.ljust(size))
