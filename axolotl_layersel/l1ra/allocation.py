"""Prune rank components and place the freed rank (L1RA, section 3.2); no tensors, no processes."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ModuleState:
    """The state of one LoRA module.

    Attributes:
        gates: gate of each active component, by slot.
        cost: cost of one component in units of the budget: 1, or its number of parameters.
        capacity: number of slots, the highest possible rank.
    """

    gates: Mapping[int, float]
    cost: int
    capacity: int


@dataclass(frozen=True)
class Moves:
    """The changes of one update; unchanged modules are not listed.

    Attributes:
        pruned: slots that become inactive, ascending, by module.
        added: slots that become active, ascending, by module.
        pool: the unused part of the budget afterwards.
    """

    pruned: dict[str, tuple[int, ...]]
    added: dict[str, tuple[int, ...]]
    pool: int

    def count_pruned(self) -> int:
        return sum(map(len, self.pruned.values()))

    def count_added(self) -> int:
        return sum(map(len, self.added.values()))


def prune(modules: Mapping[str, ModuleState], threshold: float, min_rank: int) -> dict[str, tuple[int, ...]]:
    """Return the slots with a gate below ``threshold``, by module, but leave each module ``min_rank`` components.

    The smallest gates are pruned first, and of equal ones the higher slot.
    """
    pruned = {}
    for name, module in modules.items():
        spare = max(len(module.gates) - min_rank, 0)
        below = [slot for slot, gate in module.gates.items() if gate < threshold]
        slots = sorted(below, key=lambda slot: (module.gates[slot], -slot))[:spare]
        if slots:
            pruned[name] = tuple(sorted(slots))
    return pruned


def allocate(
    modules: Mapping[str, ModuleState],
    pool: int,
    threshold: float,
    min_rank: int,
    reassign: bool = True,
    exclude_pruned: bool = True,
) -> Moves:
    """Return the moves of one update.

    Components below ``threshold`` are pruned, and their cost goes into the pool. The pool then pays for new components,
    one module after the other in rounds, in descending order of the modules' smallest gate, then ascending rank, then
    name. The costs of active components plus the pool stay the same, unless ``reassign`` is False.

    Args:
        modules: every module, by name.
        pool: the unused part of the budget.
        threshold: gates below it are pruned.
        min_rank: lowest rank of a module.
        reassign: whether to place freed rank; otherwise the pool does not grow.
        exclude_pruned: whether a module that lost a component in this update cannot gain one.
    """
    pruned = prune(modules, threshold, min_rank)
    if not reassign:
        return Moves(pruned, {}, pool)
    pool += sum(modules[name].cost * len(slots) for name, slots in pruned.items())
    kept = {
        name: {slot: gate for slot, gate in module.gates.items() if slot not in pruned.get(name, ())}
        for name, module in modules.items()
    }
    order = sorted(
        (name for name in modules if not (exclude_pruned and name in pruned)),
        key=lambda name: (-min(kept[name].values(), default=0.0), len(kept[name]), name),
    )
    gained = dict.fromkeys(order, 0)
    # Rounds over all modules, until no module with a free slot is cheap enough.
    placed = True
    while placed:
        placed = False
        for name in order:
            module = modules[name]
            if len(kept[name]) + gained[name] < module.capacity and module.cost <= pool:
                gained[name] += 1
                pool -= module.cost
                placed = True
    added = {}
    for name, count in gained.items():
        if count:
            free = [slot for slot in range(modules[name].capacity) if slot not in kept[name]]
            added[name] = tuple(free[:count])
    return Moves(pruned, added, pool)
