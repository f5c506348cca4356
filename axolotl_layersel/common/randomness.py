"""Random numbers that depend only on a seed and leave the user's random streams unchanged."""

import contextlib
import hashlib
import math
import random
from collections.abc import Iterator

import numpy
import torch


@contextlib.contextmanager
def keep_random_state() -> Iterator[None]:
    """Restore Python's, NumPy's and torch's global random streams after the block."""
    python, arrays = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        yield
    random.setstate(python)
    numpy.random.set_state(arrays)


def make_row_generator(seed: int, module: str, row: int) -> torch.Generator:
    """Return a CPU generator for one rank component of one module, independent of all others."""
    digest = hashlib.sha256(f"{seed}\0{module}\0{row}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def draw_row(like: torch.Tensor, method: bool | str, seed: int, module: str, row: int, rank: int) -> torch.Tensor:
    """Return one row of A, with the shape of ``like``, in fp32, as PEFT initialises it.

    ``method``: ``True`` for Kaiming-uniform with a = √5, U(−1/√fan_in, 1/√fan_in); ``"gaussian"`` for N(0, 1/r²).

    Raises:
        ValueError: for another ``method``.
    """
    generator = make_row_generator(seed, module, row)
    if method == "gaussian":
        return torch.randn(like.shape, generator=generator) / rank
    if method is not True:
        raise ValueError(f"rows of A are not drawn one by one under the initialisation {method!r}")
    bound = 1 / math.sqrt(like.numel())
    return torch.rand(like.shape, generator=generator) * (2 * bound) - bound


def draw_orthogonal(
    inputs: int, outputs: int, rank: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A, (rank, inputs), and B, (outputs, rank), in fp32 as PEFT draws them: orthogonal, so that B·A is 0."""
    rows, _ = torch.linalg.qr(torch.randn(rank, rank, generator=generator))
    down = torch.randn(inputs, rank // 2, generator=generator) @ rows[1::2]
    up = torch.randn(outputs, rank // 2, generator=generator) @ rows[0::2]
    return down.T.contiguous() / 10, up.contiguous() / 10
