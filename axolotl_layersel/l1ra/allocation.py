"""Which rank components a round prunes and where the freed rank goes (L1RA, section 3.2); no tensors, no processes."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ModuleState:
    """What the allocation knows of one LoRA module.

    Attributes:
        gates: gate value of each active component, by its slot.
        cost: what one component takes of the budget: 1, or its number of parameters.
        capacity: number of slots, the highest rank that the module can have.
    """

    gates: Mapping[int, float]
    cost: int
    capacity: int


@dataclass(frozen=True)
class Moves:
    """What a round changes; modules that nothing happens to are not listed.

    Attributes:
        pruned: slots that become inactive, ascending, by module.
        added: slots that become active, ascending, by module.
        pool: what of the budget waits to be placed afterwards.
    """

    pruned: dict[str, tuple[int, ...]]
    added: dict[str, tuple[int, ...]]
    pool: int

    def count_pruned(self) -> int:
        """Return how many components become inactive."""
        return sum(map(len, self.pruned.values()))

    def count_added(self) -> int:
        """Return how many components become active."""
        return sum(map(len, self.added.values()))


def prune(modules: Mapping[str, ModuleState], threshold: float, min_rank: int) -> dict[str, tuple[int, ...]]:
    """Return the slots whose gate is below ``threshold``, by module, the smallest gates first to go.

    A module keeps ``min_rank`` components whatever their gates; of equal ones the higher slot goes first.
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
    """Return the moves of one round.

    Components below ``threshold`` are pruned. What they took of the budget goes into the pool, and from there
    one component at a time to the modules in turn, in the order of descending smallest gate: a module all of
    whose components are in use comes first. Equal ones come in the order of ascending rank, then of their names.
    What fits nowhere stays in the pool. Costs of active components and the pool add up to the same before and
    after, unless ``reassign`` is False: then what is pruned is gone.

    Args:
        modules: every module, by name.
        pool: what waits from earlier rounds.
        threshold: gates below it are pruned.
        min_rank: what every module keeps.
        reassign: whether freed rank is placed again.
        exclude_pruned: whether a module that lost a component in this round gains none.
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
