"""The state of all rank components: gates, their moments, and which components are active."""

from collections.abc import Mapping, Sequence

import torch

from axolotl_layersel.l1ra.allocation import ModuleState
from axolotl_layersel.lora.gates import Gates


class Components:
    """The components of all LoRA modules among which rank moves, in flat tensors of shape (components,).

    Args:
        gates: one for each component, in the order of the model's modules.
        slots: the components of each module that are active at first.
        costs: the cost of one component of each module, in units of the budget.
        max_rank: the number of components of each module.

    Attributes:
        active: whether each component is in use, bool; an inactive one has a gate of 0.
        exp_avg: first moments of the gates' gradients, fp32.
        exp_avg_sq: their second moments, fp32.
        steps: optimizer steps of each component since it became active, int64.
        pool: the unused part of the budget.
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
        return dict(zip(self.gates.parts, self.active.view(-1, self.max_rank).sum(dim=1).tolist()))

    def describe_modules(self) -> dict[str, ModuleState]:
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
        """Return the flat tensors by name, which with the pool are the whole state."""
        return {
            "values": self.gates.values,
            "exp_avg": self.exp_avg,
            "exp_avg_sq": self.exp_avg_sq,
            "steps": self.steps,
            "active": self.active,
        }

    def flip(self, emptied: list[int], filled: list[int]) -> None:
        """Reset the components ``emptied``, then activate the components ``filled`` with a gate of 1."""
        gone, new = (torch.tensor(chosen, dtype=torch.long, device=self.active.device) for chosen in (emptied, filled))
        for tensor in self.list_tensors().values():
            tensor.index_fill_(0, gone, 0)
        for tensor in (self.gates.values, self.active):
            tensor.index_fill_(0, new, 1)
