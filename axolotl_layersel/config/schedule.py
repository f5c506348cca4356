"""The steps at which rank moves and the pressure on the gates, from the planned number of optimizer steps."""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.l1ra import DEFAULT_GATE_LR, SHORT_RUN, L1RAConfig
from axolotl_layersel.config.strict_block import as_whole

AUTO_LAMBDA = 3.0


def find_interval(steps: int, update_ratio: float) -> int:
    """Return ⌈``update_ratio`` × ``steps``⌉, the optimizer steps from one update to the next.

    It is computed in fractions, because 0.1 × 30 is a little over 3 in floats.
    """
    return max(math.ceil(Fraction(str(update_ratio)) * steps), 1)


def find_update_steps(
    steps: int, update_ratio: float, warmup_ratio: float, last_update_ratio: float = 1.0
) -> list[int]:
    """Return the optimizer steps after which rank moves, ascending.

    Updates are ``find_interval`` steps apart, between ``warmup_ratio`` and ``last_update_ratio`` of the run. The last
    interval has none, so that components that are added have an interval to train in.
    """
    interval = find_interval(steps, update_ratio)
    warmup, end = Fraction(str(warmup_ratio)) * steps, Fraction(str(last_update_ratio)) * steps
    return [step for step in range(interval, steps - interval + 1, interval) if warmup <= step <= end]


def plan_updates(steps: int, settings: L1RAConfig) -> list[int]:
    """Return the optimizer steps after which rank moves in a run of ``steps``, ascending.

    If ``last_update_ratio`` is not set and its default leaves fewer than two, these are the first two that fit into the
    run.
    """
    possible = find_update_steps(steps, settings.update_ratio, settings.warmup_ratio)
    updates = find_update_steps(steps, settings.update_ratio, settings.warmup_ratio, settings.get("last_update_ratio"))
    return possible[:2] if settings.last_update_ratio is None and len(updates) < 2 else updates


def check_run_length(steps: int, settings: L1RAConfig, key: str = "") -> None:
    """Raise LayerselError unless a run of ``steps`` optimizer steps has two updates; ``key`` is shown before them."""
    updates = plan_updates(steps, settings)
    if len(updates) < 2:
        written, raised = "", ""
        if settings.last_update_ratio is not None:
            written, raised = f", last_update_ratio: {settings.last_update_ratio}", ", or raise last_update_ratio"
        raise LayerselError(
            f"layersel.l1ra.update_ratio: {settings.update_ratio} (warmup_ratio: {settings.warmup_ratio}{written}) "
            f"leaves {len(updates)} rank updates in a run of {key}{steps} optimizer steps, but rank needs two or more "
            f"to move. Train longer, lower update_ratio or warmup_ratio{raised}."
        )


def resolve_gate_lr(gate_lr: float | None, steps: int) -> float:
    """Return η, the learning rate of the gates: ``gate_lr``, or 0.02, which runs of fewer than 200 steps scale up."""
    return DEFAULT_GATE_LR * max(SHORT_RUN / steps, 1) if gate_lr is None else gate_lr


def resolve_lambda(l1_lambda: float | str, gate_lr: float, steps: int) -> float:
    """Return λ: ``l1_lambda``, or 3 / (η·steps) for ``auto``.

    With the latter the L1 term shrinks a gate that has no other gradient from 1 to 0 in a third of the run.
    """
    return AUTO_LAMBDA / (gate_lr * steps) if l1_lambda == "auto" else float(l1_lambda)


def check_length(data: Mapping[str, Any], settings: L1RAConfig) -> None:
    """Raise LayerselError if ``max_steps`` leaves no room for two updates."""
    steps = as_whole(data.get("max_steps"))
    if steps is not None and steps > 0:
        check_run_length(steps, settings, "max_steps: ")
