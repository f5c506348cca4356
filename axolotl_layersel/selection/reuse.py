"""A plan that is used again: a resumed checkpoint's, or the one that the block names."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.paths import FOLDER, gates_path, plan_path
from axolotl_layersel.config.selection import SelectionConfig
from axolotl_layersel.engines.collectives import get_rank
from axolotl_layersel.lora.layers import LayerStack
from axolotl_layersel.lora.modules import count_component_parameters
from axolotl_layersel.lora.plain_lora import check_linear
from axolotl_layersel.lora.run import Run
from axolotl_layersel.selection.gate_history import GateHistory
from axolotl_layersel.selection.plan import Plan
from axolotl_layersel.selection.plan_checks import (
    ModelFacts,
    enumerate_faults,
    find_plan_cost,
    list_model_differences,
    list_setting_differences,
)
from axolotl_layersel.selection.plan_file import check_checkpoint, read_plan, write_plan
from axolotl_layersel.selection.provenance import compare_data, list_base_differences
from axolotl_layersel.selection.units import find_units

LOG = logging.getLogger("axolotl.layersel")


class Reused(NamedTuple):
    """A plan and the path of the file that it was read from."""

    plan: Plan
    source: str


@dataclasses.dataclass(frozen=True)
class KnownRun:
    """Facts of a run outside its ``selection`` block that can contradict a plan; None where they are unknown.

    Attributes:
        base_model: the path or hub name of its base model.
        shape: the shape of the base model, see ``describe_shape``.
        lora_r: the rank of LoRA without a selection.
        room: with ``l1ra``, the highest rank that modules have room for.
        rank_pattern: the ranks that a YAML file sets for modules.
        exponent: its ``scaling_exponent``.
    """

    base_model: str | None = None
    shape: dict[str, int | str] | None = None
    lora_r: int | None = None
    room: int | None = None
    rank_pattern: dict[str, int] | None = None
    exponent: float | None = None


def find_plan(settings: SelectionConfig, resume_from: str | None, known: KnownRun | None = None) -> Reused | None:
    """Return the plan that the run must use, or None if layers are to be selected.

    ``known``: the facts of the run that are known before its model is loaded.

    Raises:
        LayerselError: if the plan is missing, damaged, or contradicts ``known``.
    """
    reused = read_reused(settings, resume_from)
    if reused is not None:
        check_reused(reused, settings, resume_from, known or KnownRun())
    return reused


def read_reused(settings: SelectionConfig, resume_from: str | None) -> Reused | None:
    """Return the plan of the resumed checkpoint, otherwise that of ``settings.plan``, or None without either.

    Raises:
        LayerselError: if the plan is missing or damaged.
    """
    if resume_from is not None:
        places = [plan_path(resume_from), plan_path(Path(resume_from).parent)]
        source = next((place for place in places if place.exists()), None)
        if source is None:
            raise LayerselError(
                f"resume_from_checkpoint: {resume_from} holds no layersel plan ({places[0]}): it is not a checkpoint "
                "of a run with layer selection. Resume another checkpoint, or start without resuming."
            )
        key = "resume_from_checkpoint"
    elif settings.plan is not None:
        source, key = Path(settings.plan), "layersel.selection.plan"
    else:
        return None
    return Reused(read_plan(source, key), str(source))


def check_reused(
    reused: Reused,
    settings: SelectionConfig,
    resume_from: str | None,
    known: KnownRun,
    facts: ModelFacts | None = None,
) -> None:
    """Check that a plan fits this run: its base model, its layers and LoRA modules, and its YAML block.

    ``facts``: those of the run's model, None before it is loaded.

    Raises:
        LayerselError: with all differences, or if the checkpoint's adapter does not match its plan.
    """
    plan, source = reused
    of_base = []
    if settings.plan_check != "ignore":
        of_base = list_base_differences(plan, known.base_model, known.shape)
    others = list_model_differences(plan, facts, settings) if facts else []
    others += list_setting_differences(plan, settings, known.lora_r, known.room, known.rank_pattern, known.exponent)
    check_differences(source, resume_from is not None, of_base, others)
    if resume_from is not None:
        check_checkpoint(plan, resume_from)


def check_differences(source: str, resumes: bool, of_base: Sequence[str], others: Sequence[str]) -> None:
    """Raise LayerselError, with all differences in one sentence, if a plan does not fit this run.

    Args:
        source: the path of the plan.
        resumes: whether the plan belongs to a checkpoint that the run resumes from.
        of_base: differences of the base model, which ``plan_check: ignore`` skips.
        others: all other differences.
    """
    if not of_base and not others:
        return
    key = "resume_from_checkpoint" if resumes else "layersel.selection.plan"
    way_out = "Restore what it was made with, or " + ("start without resuming." if resumes else "make a new plan.")
    if of_base:
        way_out += " If the two base models are the same, set `layersel.selection.plan_check: ignore`."
    raise LayerselError(
        f"{key}: the plan from {source} does not fit this run: {enumerate_faults([*of_base, *others])}. {way_out}"
    )


def find_facts(run: Run, stack: LayerStack, plan: Plan, continues_adapter: bool) -> ModelFacts:
    """Return the facts of a run's model that ``plan`` speaks of.

    ``continues_adapter``: its LoRA is that of a trained adapter, from which a selection may have removed modules.
    """
    lora, settings = run.lora_modules, plan.resolve_settings()
    ranked = {name: lora[name] for name in plan.ranks if name in lora}
    check_linear(run, ranked, "layersel.selection.rank_allocation")
    names = set(stack.names if settings.candidates is None else settings.candidates)
    carrying = [layer for layer in sorted(stack.lora_modules) if layer not in stack.idle]
    units = find_units(stack, plan.granularity, [layer for layer in carrying if stack.names[layer] in names])
    return ModelFacts(
        place=stack.place,
        names=stack.names,
        modules={stack.names[layer]: modules for layer, modules in stack.lora_modules.items()},
        outside=[name for names in stack.towers.values() for name in names],
        units=None if continues_adapter else [unit.modules for unit in units],
        costs={name: count_component_parameters(module, run.adapter) for name, module in ranked.items()},
    )


def correct_spending(plan: Plan, facts: ModelFacts, source: str) -> None:
    """Correct the spent budget of a plan whose ranks were edited by hand, and log a warning."""
    cost = find_plan_cost(plan, facts.costs)
    if plan.budget is not None and cost is not None and cost != plan.budget.spent:
        LOG.warning(
            "layersel: the ranks in %s take %s parameters, and it says that %s are spent: they were edited by hand. "
            "They are applied as they are.",
            source,
            f"{cost:,}",
            f"{plan.budget.spent:,}",
        )
        plan.budget.spent, plan.budget.even = cost, min(cost, plan.budget.even)


def report_data(plan: Plan, run: Run, source: str) -> None:
    """Log a warning, on process 0, if a plan was made on other data than the run's."""
    trainer, difference = run.trainer, None
    if get_rank() == 0:
        difference = compare_data(plan, trainer.train_dataset, trainer.eval_dataset, trainer.data_collator)
    if difference:
        LOG.warning(
            "layersel: the plan from %s was made on other data than this run's: %s. It is applied all the same; make a "
            "new plan to choose by this run's data.",
            source,
            difference,
        )


def carry_over(plan: Plan, source: Path, output: Path) -> None:
    """Write a plan that was read from ``source`` for the run in ``output``, and the gate history found with it.

    The history of a checkpoint's plan lies in the folder of its run.
    """
    target = gates_path(output)
    places = [gates_path(folder) for folder in source.resolve().parents[1:3]] if source.parent.name == FOLDER else []
    found = next((place for place in places if plan.method == "flexora" and place.exists()), None)
    if found is None:
        target.unlink(missing_ok=True)
    elif found != target.resolve():
        GateHistory.read(found.parents[1], "layersel.selection.plan").write(output)
    write_plan(plan, plan_path(output))
