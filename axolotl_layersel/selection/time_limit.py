"""The lowest layer that trains if a step has a limit of time: ``layersel.selection.time``.

The backward pass ends at the lowest layer that trains, so only this layer decides how long a step takes. Ranks from it
upwards have the whole budget.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainingArguments

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.layer_names import LayerName
from axolotl_layersel.config.selection import find_budget
from axolotl_layersel.lora.modules import count_component_parameters
from axolotl_layersel.lora.step_time import count_lora_work, count_work, find_relative
from axolotl_layersel.selection.plan import StepTime
from axolotl_layersel.selection.ranks import decide_ranks, find_prices
from axolotl_layersel.selection.types import Choice, Selection


def keep_to_time(selection: Selection, choice: Choice) -> tuple[list[str], StepTime]:
    """Return the LoRA modules that may have rank under the limit of time, and the time and the gain of a step.

    Call it on process 0. Only sizes are read, so the weights may be split across processes.

    Args:
        selection: a selection with a limit.
        choice: the choice of every unit, with its gains.

    Raises:
        LayerselError: if no layer reaches the limit.
    """
    run, stack, settings, units = selection.run, selection.stack, selection.settings, selection.units
    assert settings.time is not None and choice.tokens is not None, "methods that measure gains draw rows"
    modules = {name: run.lora_modules[name] for name in stack.list_modules(stack.lora_modules)}
    prices = {name: count_component_parameters(module, run.adapter) for name, module in modules.items()}
    plain = {name: selection.lora_r * price for name, price in prices.items()}
    work = count_work(run.base, stack, plain, choice.tokens, run.engine.find_shape)
    costs = find_prices(selection)
    budget = find_budget(settings, selection.lora_r * sum(costs.values()))
    checkpointing, reentrant = read_checkpointing(run.trainer.args)
    shares: dict[int, float] = {}
    promises: dict[int, float] = {}
    for start in sorted({unit.layer for unit in units}):
        above = [unit for unit in units if unit.layer >= start]
        if shares and budget < min(costs[unit.name] for unit in above):
            break  # the budget pays for no rank here
        ranks, _ = decide_ranks(selection, choice, above, {unit.name: costs[unit.name] for unit in above}, budget)
        kept = [unit for unit in above if ranks[unit.name]]
        if not kept:
            break
        # Frozen modules keep the rank of plain LoRA.
        parameters = dict(plain) if settings.unselected == "freeze" else {}
        parameters |= {name: ranks[unit.name] * prices[name] for unit in kept for name in unit.modules}
        lora = count_lora_work(run.base, stack, parameters)
        everything, lowest = set(stack.lora_modules), min(unit.layer for unit in kept)
        shares[start] = find_relative(work, lowest, everything, checkpointing, reentrant, lora)
        promises[start] = find_promise(choice.gains, ranks)
    start = choose_start(shares, promises, settings.time, stack.names)
    most = promises[min(promises)]
    step = StepTime(
        share=shares[start],
        gain=promises[start] / most if most else None,
        checkpointing=checkpointing,
        tokens=choice.tokens,
    )
    return [name for unit in units if unit.layer >= start for name in unit.modules], step


def choose_start(
    shares: Mapping[int, float], promises: Mapping[int, float], time: float, names: Sequence[LayerName]
) -> int:
    """Return the position of the layer from which ranks gain most for their time.

    With the share s(k) of plain LoRA's time that a step takes with ranks from layer k upwards, and the first-order gain
    g(k) of these ranks, it is the k with the highest g(k) / s(k) among those with s(k) ≤ ``time``: the highest gain a
    second. Ties go to the lowest layer.

    Args:
        shares: s, by position.
        promises: g, by position.
        time: the limit.
        names: the names of the layers, by position.

    Raises:
        LayerselError: if no layer has a share within the limit; it names the shortest step.
    """
    within = [start for start, share in shares.items() if share <= time]
    if not within:
        shortest = min(shares, key=lambda start: (shares[start], start))
        least = math.ceil(100 * shares[shortest]) / 100
        advice = f"Set {least} or more" if least < 1 else "Remove the key"
        raise LayerselError(
            f"layersel.selection.time: {time} is less than a step of this model can take. With LoRA from layer "
            f"{names[shortest]} upwards it takes {shares[shortest]:.3f} of plain LoRA's time, because the forward pass "
            f"stays whole. {advice}."
        )
    return max(within, key=lambda start: (promises[start] / shares[start], -start))


def find_promise(gains: Mapping[str, Sequence[float]], ranks: Mapping[str, int]) -> float:
    """Return the sum of the gains of ``ranks``; a gain above the one before it counts as that one."""
    found: list[float] = []
    for unit, rank in ranks.items():
        found += itertools.accumulate(gains[unit][:rank], min)
    return math.fsum(found)


def read_checkpointing(arguments: TrainingArguments) -> tuple[bool, bool]:
    """Return whether a trainer's layers are computed again in the backward pass, and whether reentrantly."""
    options: Any = arguments.gradient_checkpointing_kwargs or {}  # a dictionary, also if the user gave text
    return bool(arguments.gradient_checkpointing), options.get("use_reentrant") is True
