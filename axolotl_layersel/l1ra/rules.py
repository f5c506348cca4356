"""The rules that move rank: what each does at a step, at an update and at the end."""

from __future__ import annotations

import logging
from typing import ClassVar, Protocol

from axolotl_layersel.config.l1ra import L1RAConfig
from axolotl_layersel.config.schedule import AUTO_LAMBDA, find_interval, resolve_gate_lr, resolve_lambda
from axolotl_layersel.l1ra import saliency
from axolotl_layersel.l1ra.adame import step_gates
from axolotl_layersel.l1ra.allocation import Moves, allocate, prune
from axolotl_layersel.l1ra.components import Components
from axolotl_layersel.l1ra.saliency import ModuleWorth

LOG = logging.getLogger("axolotl.layersel")


class Rule(Protocol):
    """A rule for a run of a known number of optimizer steps.

    Attributes:
        moves_gates: whether gates of active components differ from 1, so that modules must multiply by them.
    """

    moves_gates: ClassVar[bool]

    def step(self, components: Components) -> None:
        """Process the averaged gradient of the gates after an optimizer step."""

    def decide(self, components: Components, step: int) -> Moves:
        """Return the moves of the update after optimizer step ``step``."""

    def decide_last(self, components: Components) -> Moves:
        """Return the moves after the last step, which add no components."""

    def describe(self) -> str:
        """Return the rule's settings for the log."""


class Saliency:
    """Keep gates at 1, and move rank from the components with the lowest saliency."""

    moves_gates: ClassVar[bool] = False

    def __init__(self, settings: L1RAConfig, steps: int) -> None:
        self.settings = settings
        self.interval = find_interval(steps, settings.update_ratio)

    def step(self, components: Components) -> None:
        saliency.observe_gradient(components.gates.gradient, components.exp_avg_sq, components.steps, components.active)

    def decide(self, components: Components, step: int) -> Moves:
        # Components that are active from the first step on count as grown, however early the update.
        grown = min(saliency.GRACE * self.interval, step)
        worth, costs = saliency.find_saliency(components.exp_avg_sq, components.steps).tolist(), components.costs
        active, counts = components.active.tolist(), components.steps.tolist()
        modules = {}
        for name, part in components.gates.parts.items():
            used = [i for i in range(part.start, part.stop) if active[i]]
            old = {i - part.start: worth[i] / costs[name] for i in used if counts[i] >= grown}
            young = frozenset(i - part.start for i in used if counts[i] < grown)
            modules[name] = ModuleWorth(old, young, costs[name], components.max_rank)
        # The least that lets one component of any cost be paid for by components of any other.
        least = 2 * max(costs.values()) - 1 if self.settings.move_ratio is None else 0
        return saliency.move_rank(
            modules, components.pool, self.settings.get("move_ratio"), self.settings.min_rank, least
        )

    def decide_last(self, components: Components) -> Moves:
        return Moves({}, {}, components.pool)

    def describe(self) -> str:
        return f"by saliency, at most {self.settings.get('move_ratio'):.3g} of it at a time"


class Pressure:
    """Push gates down by an L1 term, and move rank from gates near 0 (L1RA, arXiv 2509.04884)."""

    moves_gates: ClassVar[bool] = True

    def __init__(self, settings: L1RAConfig, steps: int) -> None:
        self.settings = settings
        self.gate_lr = resolve_gate_lr(settings.gate_lr, steps)
        self.l1_lambda = resolve_lambda(settings.get("l1_lambda"), self.gate_lr, steps)
        if self.l1_lambda >= 1:
            LOG.warning(
                "layersel: l1_lambda %.4g lowers a gate at each step by more than any gradient can raise it: all gates "
                "will end at 0. Set l1_lambda below 1, or with `auto` a gate_lr of %.2g or more.",
                self.l1_lambda,
                AUTO_LAMBDA / steps,
            )

    def step(self, components: Components) -> None:
        step_gates(
            components.gates.values,
            components.gates.gradient,
            components.exp_avg,
            components.exp_avg_sq,
            components.steps,
            components.active,
            self.gate_lr,
            self.l1_lambda,
        )

    def decide(self, components: Components, step: int) -> Moves:
        settings = self.settings
        return allocate(
            components.describe_modules(),
            components.pool,
            settings.get("prune_threshold"),
            settings.min_rank,
            settings.get("reassign"),
            settings.get("exclude_pruned"),
        )

    def decide_last(self, components: Components) -> Moves:
        # Freed rank is not placed again, because no step is left to train it.
        pruned = prune(components.describe_modules(), self.settings.get("prune_threshold"), self.settings.min_rank)
        return Moves(pruned, {}, components.pool)

    def describe(self) -> str:
        auto = " (auto)" if self.settings.get("l1_lambda") == "auto" else ""
        return f"gate_lr {self.gate_lr:.4g}, l1_lambda {self.l1_lambda:.4g}{auto}"


RULES: dict[str, type[Saliency] | type[Pressure]] = {"saliency": Saliency, "pressure": Pressure}
