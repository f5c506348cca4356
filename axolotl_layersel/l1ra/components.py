"""The components that rank is made of: their gates, the moments of these, and which components are active."""

from collections.abc import Mapping, Sequence

import torch

from axolotl_layersel.l1ra.allocation import ModuleState
from axolotl_layersel.lora.gates import Gates


class Components:
    """The components of all LoRA modules among which rank moves, in flat tensors.

    Modules are built at ``max_rank``. A component that is not active has a gate of 0.

    Args:
        gates: one for each component, in the order of the model's modules.
        slots: the components of each module that are active at first.
        costs: what one component of each module takes of the budget.
        max_rank: the number of components of each module.

    Attributes:
        active: which components take part, (components of all modules,), bool.
        exp_avg: the first moments of the gates' gradients, (components of all modules,), fp32.
        exp_avg_sq: their second moments, of the same shape and type.
        steps: the optimizer steps that each component has taken part in, of the same shape, int64.
        pool: the part of the budget that waits to be placed.
    """

    def __init__(
        self, gates: Gates, slots: Mapping[str, Sequence[int]], costs: Mapping[str, int], max_rank: int
    ) -> None:
        self.gates = gates
        self.costs = costs
        self.max_rank = max_rank
        self.active = torch.zeros_like(gates.values, dtype=torch.bool)
        for name, part in gates.parts.items():
            self.active[part][list(slots[name])] = True
        gates.values.copy_(self.active)
        self.exp_avg = torch.zeros_like(gates.values)
        self.exp_avg_sq = torch.zeros_like(gates.values)
        self.steps = torch.zeros_like(self.active, dtype=torch.int64)
        self.pool = 0

    def ranks(self) -> dict[str, int]:
        """Return the rank of every module."""
        return dict(zip(self.gates.parts, self.active.view(-1, self.max_rank).sum(dim=1).tolist()))

    def describe_modules(self) -> dict[str, ModuleState]:
        """Return what the allocation needs to know."""
        values, active = self.gates.values.tolist(), self.active.tolist()
        return {
            name: ModuleState(
                gates={i - part.start: values[i] for i in range(part.start, part.stop) if active[i]},
                cost=self.costs[name],
                capacity=self.max_rank,
            )
            for name, part in self.gates.parts.items()
        }

    def list_tensors(self) -> dict[str, torch.Tensor]:
        """Return the flat tensors by name, which are the whole state but for the pool."""
        return {
            "values": self.gates.values,
            "exp_avg": self.exp_avg,
            "exp_avg_sq": self.exp_avg_sq,
            "steps": self.steps,
            "active": self.active,
        }

    def flip(self, emptied: list[int], filled: list[int]) -> None:
        """Let the components ``emptied`` take no part, and then the components ``filled`` begin with a gate of 1."""
        for tensor in self.list_tensors().values():
            fill(tensor, emptied, 0)
        for tensor in (self.gates.values, self.active):
            fill(tensor, filled, 1)


def fill(tensor: torch.Tensor, components: list[int], value: int) -> None:
    """Set ``components`` of a flat tensor to ``value``."""
    tensor.index_fill_(0, torch.tensor(components, dtype=torch.long, device=tensor.device), value)
