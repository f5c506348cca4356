"""Which components the loss would miss least, and which modules their rank goes to; nothing is shrunk for it.

The loss changes by −g·c + ½·h·c² where a component of gate c is taken out, with g and h its derivatives by the gate.
While A and B train g is small, and the curvature h is that of the empirical Fisher information, the mean of g² over
steps, up to a factor that all components share (optimal brain damage, LeCun et al. 1989; AdaLoRA, arXiv 2303.10512,
ranks components by |w·∂L/∂w| likewise). Gates stay at 1, so the model computes what plain LoRA computes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from axolotl_layersel.l1ra.allocation import Moves

# The mean of squared gradients reaches back some 50 steps.
BETA = 0.98
# A component moves to a module only if it is worth less than this share of what the weakest one there is worth.
MARGIN = 0.25
# Updates that a new component is left alone, since it begins with B at zero.
GRACE = 2


@dataclass(frozen=True)
class ModuleWorth:
    """What the moves depend on, of one LoRA module.

    Attributes:
        worth: of each active component that has had time to grow, by its slot, for its cost.
        young: slots of the other active components.
        cost: what one component takes of the budget: 1, or its number of parameters.
        capacity: number of slots, the highest rank that the module can have.
    """

    worth: Mapping[int, float]
    young: frozenset[int]
    cost: int
    capacity: int

    @property
    def rank(self) -> int:
        """How many components are active."""
        return len(self.worth) + len(self.young)


@torch.no_grad()
def observe_gradient(gradient: torch.Tensor, squares: torch.Tensor, steps: torch.Tensor, active: torch.Tensor) -> None:
    """Take the gradient of one optimizer step into the running mean of squares, in place.

    Args:
        gradient: of the loss with respect to the gates, (components,), fp32.
        squares: the running mean, not corrected for its start at 0, (components,), fp32.
        steps: how many gradients of each component are in it, (components,), int64.
        active: which components there are, (components,), bool.
    """
    gradient = torch.where(active, gradient, 0.0)
    steps.add_(active)
    squares.mul_(BETA).addcmul_(gradient, gradient, value=1 - BETA)


def find_saliency(squares: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Return the mean squared gradient of each component by its gate, (components,), float64."""
    return squares.double() / (1 - BETA ** steps.clamp(min=1).double())


def move_rank(modules: Mapping[str, ModuleWorth], pool: int, move_ratio: float, min_rank: int, least: int = 0) -> Moves:
    """Return the moves of one update: components worth little give their rank to modules in which all are worth much.

    Modules gain one component at most, those whose weakest component is worth most first. What it costs is paid from
    the pool and by taking out components elsewhere, those that are worth least first, as long as each is worth less
    than ``MARGIN`` of the weakest one in the module that gains. A module either gains or loses. Costs of active
    components and the pool add up to the same before and after.

    Args:
        modules: every module, by name.
        pool: what of the budget waits from earlier updates.
        move_ratio: share of the budget in use that is taken out at most.
        min_rank: what every module keeps.
        least: of the budget, may be taken out whatever its share is.
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
        for worth, name, slot in losing:
            if pool + freed >= cost or worth >= MARGIN * weakest[gainer]:
                break
            lost = len(pruned.get(name, ())) + sum(name == other for _, other, _ in chosen)
            fits = taken + freed + modules[name].cost <= allowed
            if name not in added and name != gainer and modules[name].rank - lost > min_rank and fits:
                chosen.append((worth, name, slot))
                freed += modules[name].cost
        if pool + freed < cost:
            continue
        for component in chosen:
            losing.remove(component)
            pruned.setdefault(component[1], []).append(component[2])
        pool += freed - cost
        taken += freed
        used = {*modules[gainer].worth, *modules[gainer].young}
        added[gainer] = (next(slot for slot in range(modules[gainer].capacity) if slot not in used),)
    return Moves({name: tuple(sorted(slots)) for name, slots in pruned.items()}, added, pool)
