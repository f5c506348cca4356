"""SHA-256 digests, in hexadecimal, of files, JSON and tensors. Importing it loads no torch."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PIECE = 2**24  # bytes of a file that are read at once


def hash_parts(parts: Iterable[bytes | memoryview]) -> str:
    """Return the digest of the concatenation of ``parts``."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """Return the digest of a file's content.

    Raises:
        OSError: if it cannot be read.
    """
    with open(path, "rb") as file:
        return hash_parts(iter(lambda: file.read(PIECE), b""))


def hash_json(value: Any, default: Callable[[Any], Any] | None = None) -> str:
    """Return the digest of a value as JSON with sorted keys. ``default``: see ``json.dumps``."""
    return hash_parts([json.dumps(value, sort_keys=True, default=default).encode()])


def hash_tensor(tensor: torch.Tensor) -> str:
    """Return the digest of a tensor's bytes, whatever its type and shape."""
    return hash_parts([view_bytes(tensor)])


def hash_tensors(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """Return the digest of metadata and of the names, types, shapes and bytes of tensors, in any order of both."""
    names = sorted(tensors)
    described = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]
    header = json.dumps([sorted(metadata.items()), described]).encode()
    return hash_parts(itertools.chain([header], (view_bytes(tensors[name]) for name in names)))


def view_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor in row-major order, copied only if they are not so on the CPU already."""
    import torch

    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
