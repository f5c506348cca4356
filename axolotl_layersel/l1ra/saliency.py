"""Move rank by saliency: from components whose removal would raise the loss least, to modules where it would most.

Removing a component of gate c changes the loss by −g·c + ½·h·c², with g and h the derivatives by the gate. In training
g is small, and h is estimated by the empirical Fisher information, the mean of g² over steps, up to a common factor
(optimal brain damage, LeCun et al. 1989; AdaLoRA, arXiv 2303.10512, similarly ranks components by |w·∂L/∂w|). Gates
stay at 1, so the model computes the same as plain LoRA.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from axolotl_layersel.l1ra.allocation import Moves

# Decay of the mean of squared gradients: it reaches back some 50 steps.
BETA = 0.98
# A component pays for one in another module only if its worth is below this share of the weakest one there.
MARGIN = 0.25
# Updates before a new component may be pruned, since its B starts at zero.
GRACE = 2


@dataclass(frozen=True)
class ModuleWorth:
    """The state of one LoRA module.

    Attributes:
        worth: saliency per unit of cost of each active component that has had time to grow, by slot.
        young: slots of the other active components.
        cost: cost of one component in units of the budget: 1, or its number of parameters.
        capacity: number of slots, the highest possible rank.
    """

    worth: Mapping[int, float]
    young: frozenset[int]
    cost: int
    capacity: int

    @property
    def rank(self) -> int:
        return len(self.worth) + len(self.young)


@torch.no_grad()
def observe_gradient(gradient: torch.Tensor, squares: torch.Tensor, steps: torch.Tensor, active: torch.Tensor) -> None:
    """Update the running mean of squared gradients in place.

    Args:
        gradient: gradient of the loss by the gates, (components,), fp32.
        squares: the running mean, without bias correction, (components,), fp32.
        steps: number of gradients of each component in the mean, (components,), int64.
        active: whether each component is in use, (components,), bool.
    """
    gradient = torch.where(active, gradient, 0.0)
    steps.add_(active)
    squares.mul_(BETA).addcmul_(gradient, gradient, value=1 - BETA)


def find_saliency(squares: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Return the bias-corrected mean squared gradient of each gate, (components,), float64."""
    return squares.double() / (1 - BETA ** steps.clamp(min=1).double())


def move_rank(modules: Mapping[str, ModuleWorth], pool: int, move_ratio: float, min_rank: int, least: int = 0) -> Moves:
    """Return the moves of one update, from components of little worth to modules whose components are all worth much.

    Modules gain at most one component each, in descending order of their weakest component's worth. The pool pays for
    it, and then other modules' components in ascending order of worth, each of which must be worth less than ``MARGIN``
    of the gaining module's weakest. A module either gains or loses. The costs of active components plus the pool stay
    the same.

    Args:
        modules: every module, by name.
        pool: the unused part of the budget.
        move_ratio: largest share of the budget in use that may be pruned.
        min_rank: lowest rank of a module.
        least: amount of the budget that may be pruned whatever ``move_ratio`` says.
    """
    weakest = {name: min(module.worth.values()) for name, module in modules.items() if module.worth}
    gaining = sorted(
        (name for name in weakest if modules[name].rank < modules[name].capacity),
        key=lambda name: (-weakest[name], modules[name].rank, name),
    )
    losing = sorted((worth, name, slot) for name, module in modules.items() for slot, worth in module.worth.items())
    allowed = max(move_ratio * sum(module.rank * module.cost for module in modules.values()), least)
    pruned: dict[str, list[int]] = {}
    added: dict[str, tuple[int, ...]] = {}
    taken = 0
    for gainer in gaining:
        cost, freed = modules[gainer].cost, 0
        chosen: list[tuple[float, str, int]] = []
        if gainer in pruned:
            continue
        # Choose the components that would pay for the new one.
        for worth, name, slot in losing:
            if pool + freed >= cost or worth >= MARGIN * weakest[gainer]:
                break
            lost = len(pruned.get(name, ())) + sum(name == other for _, other, _ in chosen)
            fits = taken + freed + modules[name].cost <= allowed
            if name not in added and name != gainer and modules[name].rank - lost > min_rank and fits:
                chosen.append((worth, name, slot))
                freed += modules[name].cost
        if pool + freed < cost:
            continue  # too few of little worth: the module gains nothing, and none is pruned
        for component in chosen:
            losing.remove(component)
            pruned.setdefault(component[1], []).append(component[2])
        pool += freed - cost
        taken += freed
        used = {*modules[gainer].worth, *modules[gainer].young}
        added[gainer] = (next(slot for slot in range(modules[gainer].capacity) if slot not in used),)
    return Moves({name: tuple(sorted(slots)) for name, slots in pruned.items()}, added, pool)
