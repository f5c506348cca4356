"""The two matrices of a LoRA module: fold a scaling and gates into them, drop unused components, and pad."""

from dataclasses import dataclass

import torch

from axolotl_layersel.lora.names import DOWN, PREFIX, UP


@dataclass(frozen=True)
class Factors:
    """The two matrices of one LoRA module: ``down`` is A, (rank, inputs); ``up`` is B, (outputs, rank)."""

    down: torch.Tensor
    up: torch.Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[0]


def fold(factors: Factors, scaling: float, gates: torch.Tensor | None = None) -> Factors:
    """Fold scaling and gates into B: return A and B·diag(gates)·scaling, computed in fp32, in the dtype of B.

    ``gates``: (rank,), or None.
    """
    factor = scaling if gates is None else gates.to(torch.float32) * scaling
    return Factors(factors.down, (factors.up.float() * factor).to(factors.up.dtype))


def find_used(factors: Factors) -> torch.Tensor:
    """Return which components have a nonzero row of A or column of B, (rank,), bool; the others are padding."""
    return factors.down.ne(0).any(dim=1) | factors.up.ne(0).any(dim=0)


def drop_unused(factors: Factors) -> Factors:
    """Return the factors without padding, but with at least one component, since PEFT has no rank 0."""
    used = find_used(factors)
    used[0] |= ~used.any()
    return Factors(factors.down[used].contiguous(), factors.up[:, used].contiguous())


def pad(factors: Factors, rank: int) -> Factors:
    """Return the factors padded with zero components up to ``rank``."""
    missing = rank - factors.rank
    down = torch.nn.functional.pad(factors.down, (0, 0, 0, missing))
    return Factors(down.contiguous(), torch.nn.functional.pad(factors.up, (0, missing)).contiguous())


def split(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, Factors], dict[str, torch.Tensor]]:
    """Split an adapter file's tensors into LoRA factors, by module name in the base model, and all others."""
    modules = [name.removeprefix(PREFIX).removesuffix(DOWN) for name in tensors if name.endswith(DOWN)]
    factors = {module: Factors(*(tensors[f"{PREFIX}{module}{part}"] for part in (DOWN, UP))) for module in modules}
    rest = {name: value for name, value in tensors.items() if not name.endswith((DOWN, UP))}
    return factors, rest
