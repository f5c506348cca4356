"""Layer selection: decide which layers keep their adapter, and apply it before the real engine is built."""

import dataclasses
import logging
import math
import time
from collections.abc import Sized
from pathlib import Path

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.paths import gates_path, plan_path
from axolotl_layersel.common.versions import find_versions
from axolotl_layersel.config.facts import read_fact
from axolotl_layersel.config.initialisation import changes_base, check_redrawn, check_supported, describe_continued
from axolotl_layersel.config.methods import get_method, list_data_free
from axolotl_layersel.config.selection import (
    DEFAULT_STACKS,
    DEFAULT_UNSELECTED,
    ResolvedSelection,
    SelectionConfig,
    describe_sharded_ranks,
)
from axolotl_layersel.engines import trainers
from axolotl_layersel.engines.collectives import decide_on_rank_zero, get_rank
from axolotl_layersel.engines.signals import ending_on_signal
from axolotl_layersel.l1ra.capacity import Capacity, start_from
from axolotl_layersel.lora.backward_end import check_limit, find_lowest_trained
from axolotl_layersel.lora.layers import LayerStack, find_layer_stack
from axolotl_layersel.lora.modules import count_component_parameters
from axolotl_layersel.lora.plain_lora import check_linear
from axolotl_layersel.lora.removal import freeze_unselected, remove_modules, remove_unselected
from axolotl_layersel.lora.resizing import set_ranks
from axolotl_layersel.lora.run import Run
from axolotl_layersel.lora.weights import lora_parameters
from axolotl_layersel.selection.callback import LayerSelectionCallback
from axolotl_layersel.selection.choosing import find_mean_overlap
from axolotl_layersel.selection.fitting import fit_to_data, fit_to_units
from axolotl_layersel.selection.gate_history import GateHistory
from axolotl_layersel.selection.plan import LayerChoice, Parameters, Plan, Stability, Tower
from axolotl_layersel.selection.plan_checks import ModelFacts
from axolotl_layersel.selection.plan_file import write_plan
from axolotl_layersel.selection.provenance import describe_shape
from axolotl_layersel.selection.ranks import allocate_ranks, check_spread
from axolotl_layersel.selection.reuse import (
    KnownRun,
    Reused,
    carry_over,
    check_reused,
    correct_spending,
    find_facts,
    read_reused,
    report_data,
)
from axolotl_layersel.selection.step_measurement import StepMeasurement
from axolotl_layersel.selection.time_limit import keep_to_time
from axolotl_layersel.selection.types import Selection

LOG = logging.getLogger("axolotl.layersel")


def select_layers(
    run: Run,
    settings: SelectionConfig,
    resume_from: str | None = None,
    continues_adapter: bool = False,
    repeat: int = 1,
    capacity: Capacity | None = None,
    exponent: float | None = None,
) -> Plan:
    """Choose layers and apply the choice to the trainer's model; ``prepare_trainer`` does all that a run needs.

    Args:
        run: its trainer has not trained.
        settings: the ``selection`` block.
        resume_from: the checkpoint that the run resumes from; its plan is used, and nothing is selected again.
        continues_adapter: the LoRA weights are those of a trained adapter, and stay as they are.
        repeat: choose with this many seeds in total, to measure how far the choices agree; the first is the plan.
        capacity: with ``l1ra``, the rank that modules were grown from, and the rank that they have room for.
        exponent: ``scaling_exponent`` of the block.

    Returns:
        The plan, which is also written to ``<output_dir>/layersel/plan.json``.

    Raises:
        LayerselError: on every process, where something cannot be honoured.
    """
    # Check: a reused plan against this run, or the settings against the model.
    reused = decide_on_rank_zero(lambda: read_reused(settings, resume_from))
    stack = find_layer_stack(run.model, reused.plan.stacks if reused else settings.stacks or DEFAULT_STACKS)
    facts = None
    if reused:
        facts = find_facts(run, stack, reused.plan, continues_adapter)
        known = find_known(run, continues_adapter, capacity, exponent)
        decide_on_rank_zero(lambda: check_reused(reused, settings, resume_from, known, facts))
    else:
        check_settings(run, stack, settings, continues_adapter)
    unselected = reused.plan.unselected if reused else settings.unselected or DEFAULT_UNSELECTED
    check_base(run, continues_adapter, unselected == "remove")

    # Decide.
    history, plain = None, count_lora(run, capacity)
    if reused:
        plan = adopt_plan(run, stack, reused, facts, repeat)
    else:
        plan, history = choose_layers(run, stack, settings, continues_adapter, repeat, capacity)
    if not (plan.ranks or capacity):  # every module has lora_r, also if l1ra moved rank where the plan was made
        plan.scaling_exponent = 0
        if exponent is not None and get_rank() == 0:
            LOG.warning(
                "layersel: layersel.scaling_exponent: %s is not read, because the plan gives every module lora_r",
                exponent,
            )
    elif exponent is not None:
        plan.scaling_exponent = exponent

    # Apply.
    apply_plan(run, stack, plan)
    if plan.ranks:
        apply_ranks(run, plan, capacity, continues_adapter)
    plan.backward_end = stack.names[find_lowest_trained(run.model, stack)]
    plan.parameters = Parameters(plain=plain, trained=count_lora(run, capacity))
    cutting = LayerSelectionCallback(run, stack)
    run.trainer.add_callback(cutting)
    if plan.step_time is not None:
        run.trainer.add_callback(StepMeasurement(run, cutting, plan.step_time.share))

    # Record.
    output = run.output_dir
    if reused:
        decide_on_rank_zero(lambda: carry_over(plan, Path(reused.source), output))
    else:
        decide_on_rank_zero(lambda: write_choice(plan, history, output))
    report_parameters(run, plan)
    return plan


# --- Check --------------------------------------------------------------------------------------------------------


def find_known(run: Run, continues_adapter: bool, capacity: Capacity | None, exponent: float | None) -> KnownRun:
    """Return the facts of a run that a plan must not contradict, except for those of its LoRA modules."""
    # The config of a trained adapter has its highest rank, and its ranks are compared module by module.
    lora_r = None if continues_adapter else run.config.r
    return KnownRun(
        base_model=run.config.base_model_name_or_path,
        shape=describe_shape(run.base.config),
        lora_r=capacity.lora_r if capacity else lora_r,
        room=capacity.max_rank if capacity else None,
        exponent=exponent,
    )


def check_settings(run: Run, stack: LayerStack, settings: SelectionConfig, continues_adapter: bool) -> None:
    """Raise LayerselError if no layers can be selected by ``settings`` in this model."""
    is_sided = read_fact(run.base.config, "is_encoder_decoder")
    if is_sided and not stack.has_decoder and get_method(settings.method).draws_rows:
        raise LayerselError(
            f"base_model: {type(run.base).__name__} is of a family with an encoder and a decoder, and the layers of "
            f"both were not found in it, so layersel.selection.method: {settings.method} does not know what each layer "
            f"reads. Use one of flexora, {list_data_free()}."
        )
    if continues_adapter:
        check_continuing(settings)


def check_continuing(settings: SelectionConfig) -> None:
    """Raise LayerselError where the default would delete the weights of the adapter that is continued."""
    if settings.unselected is None:
        raise LayerselError(
            "layersel.selection.unselected: lora_model_dir continues a trained adapter, and `remove`, the default, "
            "would delete its weights in the layers that are not selected. Set `unselected: freeze` to keep them "
            "untrained, or write `unselected: remove` to delete them."
        )


def check_base(run: Run, continues_adapter: bool, removes: bool) -> None:
    """Raise LayerselError where LoRA's initialisation does not allow a selection.

    ``removes``: whether unselected modules lose their adapter.
    """
    initial = run.config.init_lora_weights
    if not continues_adapter:
        check_supported(initial)
    elif removes and changes_base(initial):
        raise LayerselError(describe_continued(initial, "the adapter"))


def check_ranks(run: Run, stack: LayerStack, settings: ResolvedSelection, continues_adapter: bool) -> None:
    """Raise LayerselError if modules cannot get other ranks than ``lora_r``, or cannot be measured by a sketch."""
    modules = run.lora_modules
    if settings.rank_allocation != "same" or settings.method == "gradient":
        inside = {name: modules[name] for name in stack.list_modules(stack.lora_modules)}
        key = "method: gradient" if settings.method == "gradient" else f"rank_allocation: {settings.rank_allocation}"
        check_linear(run, inside, f"layersel.selection.{key}")
    if settings.rank_allocation == "same":
        return
    if continues_adapter:
        raise LayerselError(
            f"layersel.selection.rank_allocation: {settings.rank_allocation!r} gives modules new ranks, and "
            "lora_model_dir continues an adapter that has its own. Set `rank_allocation: same`, or start without "
            "lora_model_dir."
        )
    check_redrawn(run.config.init_lora_weights, settings.rank_allocation)
    if settings.method == "flexora" and run.engine.is_streamed:
        raise LayerselError(describe_sharded_ranks(settings.rank_allocation, run.engine.name))


def report_idle(selection: Selection) -> None:
    """Log a warning, on process 0, if scores or freezing decide nothing. Every process must call this.

    Raises:
        LayerselError: on every process, if scores must give ranks and the budget forces all ranks.
    """
    settings, units, unit = selection.settings, selection.units, selection.settings.granularity
    if settings.keep is not None or settings.layers is not None or selection.count_kept() < len(units):
        return
    said: list[str] = []
    count, method = f"{len(units)} × {unit}", settings.method
    everywhere = len(selection.candidates) == len(selection.stack.lora_modules)
    if settings.rank_allocation == "score" and len(units) > 1:
        decide_on_rank_zero(lambda: check_spread(selection))
    elif selection.method.needs_data:
        said.append(f"all that may be chosen is kept ({count}), so the scores of {method} decide nothing")
    if settings.unselected == "freeze" and settings.rank_allocation != "score" and everywhere:
        said.append("`unselected: freeze` freezes nothing, for LoRA is kept in all layers")
    if said and get_rank() == 0:
        LOG.warning("layersel: %s", "; ".join(said))


def check_repeat(selection: Selection, repeat: int) -> None:
    """Log a warning, on process 0, if all seeds draw the same rows.

    Raises:
        LayerselError: if the method draws nothing by its seed.
    """
    if not selection.method.needs_data:
        raise LayerselError(
            f"--repeat: {repeat} choices by method {selection.method.name} would say nothing: it does not look at the "
            "data. Remove --repeat."
        )
    samples, dataset = selection.settings.num_samples, selection.run.trainer.train_dataset
    if samples is not None and isinstance(dataset, Sized) and samples >= len(dataset) and get_rank() == 0:
        LOG.warning(
            "layersel: --repeat: every seed draws all %d training rows, so that the choices agree says little. Set "
            "num_samples to half of them or fewer.",
            samples,
        )


# --- Decide -------------------------------------------------------------------------------------------------------


def adopt_plan(run: Run, stack: LayerStack, reused: Reused, facts: ModelFacts | None, repeat: int) -> Plan:
    """Return the reused plan, with its spending and its modules outside the layers as they are in this run."""
    plan, source = reused
    if repeat > 1:
        raise LayerselError(
            f"--repeat has no effect with the plan of {source}, because nothing is selected. Remove --repeat, or "
            "`plan` from the block."
        )
    assert facts is not None, "the plan was checked by them"
    correct_spending(plan, facts, source)
    report_data(plan, run, source)
    remove_towers(run, stack, plan.outside_layers)
    plan.outside = describe_towers(run, stack)
    if get_rank() == 0:
        LOG.info("layersel: the plan of %s is applied; nothing is scored", source)
    return plan


def choose_layers(
    run: Run,
    stack: LayerStack,
    settings: SelectionConfig,
    continues_adapter: bool,
    repeat: int,
    capacity: Capacity | None,
) -> tuple[Plan, GateHistory | None]:
    """Return a new plan, and the gate history of its search; see ``select_layers``."""
    resolved = fit_to_data(run, settings, settings.resolve(run.trainer.args.seed))
    check_ranks(run, stack, resolved, continues_adapter)
    # Before anything is scored or searched: LoRA that the run will not have takes no part in it.
    remove_towers(run, stack, resolved.outside_layers)
    check_limit(run.model, stack, resolved)
    lora_r, room = (capacity.lora_r, capacity.max_rank) if capacity else (None, None)
    selection = fit_to_units(settings, Selection.of(run, stack, resolved, lora_r, room))
    report_idle(selection)
    if repeat > 1:
        check_repeat(selection, repeat)
    with ending_on_signal(run.device, "interrupted; no layers are chosen yet, and no plan is written"):
        plan, history = make_plan(selection)
    if repeat > 1:
        # The plan is complete without its stability, so an interruption must not lose it.
        decide_on_rank_zero(lambda: write_choice(plan, history, run.output_dir))
        with ending_on_signal(run.device, "interrupted; the plan does not say how far seeds agree"):
            plan.stability = measure_stability(selection, plan, repeat)
    return plan, history


def make_plan(selection: Selection) -> tuple[Plan, GateHistory | None]:
    """Return the plan of ``selection``, and the gate history of its search. Every process must call this."""
    started = time.monotonic()
    run, stack, settings = selection.run, selection.stack, selection.settings
    choice, step_time = selection.method.load()(selection), None
    if settings.time is not None:
        whole = choice
        modules, step_time = decide_on_rank_zero(lambda: keep_to_time(selection, whole))
        choice = dataclasses.replace(choice, modules=modules)
    ranks, budget = decide_on_rank_zero(lambda: allocate_ranks(selection, choice))
    modules = [name for name in choice.modules if name in ranks] if ranks else choice.modules
    kept = set(modules)
    plan = Plan(
        method=settings.method,
        layers=[
            LayerChoice(layer=name, score=score, selected=not kept.isdisjoint(stack.lora_modules.get(layer, [])))
            for layer, (name, score) in enumerate(zip(stack.names, choice.scores))
        ],
        unselected=settings.unselected,
        outside_layers=settings.outside_layers,
        outside=describe_towers(run, stack),
        unscored=choice.unscored,
        stack=stack.place,
        modules=modules,
        granularity=settings.granularity,
        ranks=ranks,
        budget=budget,
        step_time=step_time,
        module_scores=choice.module_scores,
        settings=dataclasses.asdict(settings),
        seed=settings.seed,
        calibration_rows=choice.rows,
        rows_left_out=choice.left_out,
        token=choice.token,
        dataset_fingerprint=choice.fingerprint,
        base_model=run.config.base_model_name_or_path,
        base_shape=describe_shape(run.base.config),
        versions=find_versions(),
        engine=run.engine.name,
        processes=run.trainer.args.world_size,
        seconds=round(time.monotonic() - started, 3),
    )
    # The plans of all processes are equal except for the seconds; process 0's is kept.
    return decide_on_rank_zero(lambda: plan), choice.history


def count_lora(run: Run, capacity: Capacity | None) -> int:
    """Return the number of LoRA parameters that train, without room for rank that is not in use.

    Sharded weights are not gathered, so the number is the same on every engine and every process.
    """
    total, slots = 0, capacity.slots if capacity else {}
    for name, module in run.lora_modules.items():
        trained = [parameter for parameter in lora_parameters(run, name) if parameter.requires_grad]
        if trained and name in slots:
            total += len(slots[name]) * count_component_parameters(module, run.adapter)
        else:
            total += sum(math.prod(run.engine.find_shape(parameter)) for parameter in trained)
    return total


def measure_stability(selection: Selection, plan: Plan, repeat: int) -> Stability:
    """Choose again with the seeds after the plan's, and return how far all ``repeat`` choices agree."""
    plans = [plan]
    for seed in range(plan.seed + 1, plan.seed + repeat):
        again = dataclasses.replace(selection, settings=dataclasses.replace(selection.settings, seed=seed))
        plans.append(make_plan(again)[0])
    return Stability(
        selected={each.seed: each.selected for each in plans},
        overlap=find_mean_overlap([each.ranks or dict.fromkeys(each.modules, 1) for each in plans]),
    )


# --- Apply --------------------------------------------------------------------------------------------------------


def remove_towers(run: Run, stack: LayerStack, towers: str) -> None:
    """Remove the LoRA modules outside the layers, or keep them."""
    if {"keep": False, "remove": bool(stack.towers)}[towers]:
        remove_modules(run, [name for names in stack.towers.values() for name in names])


def describe_towers(run: Run, stack: LayerStack) -> list[Tower]:
    """Return the LoRA modules outside the layers, removed ones too, and how many of them train in this run."""
    lora = run.lora_modules

    def trains(name: str) -> bool:
        return name in lora and any(p.requires_grad for p in lora_parameters(run, name))

    return [Tower(place=place, modules=names, trained=sum(map(trains, names))) for place, names in stack.towers.items()]


def apply_plan(run: Run, stack: LayerStack, plan: Plan) -> None:
    """Remove or freeze the LoRA modules that ``plan`` does not select."""
    changes = {"remove": remove_unselected, "freeze": freeze_unselected}
    changes[plan.unselected](run, stack, plan.modules)


def apply_ranks(run: Run, plan: Plan, capacity: Capacity | None, continues_adapter: bool) -> None:
    """Set the ranks of the modules that ``plan`` keeps."""
    if not continues_adapter:
        check_redrawn(run.config.init_lora_weights, plan.resolve_settings().rank_allocation)
    modules = run.lora_modules
    if get_rank() == 0:
        LOG.info("layersel: %d LoRA modules are set up with the ranks of the plan", len(plan.ranks))
    check_linear(run, {name: modules[name] for name in plan.ranks}, "layersel.selection.rank_allocation")
    trainers.check_no_optimizer(run.trainer)
    seed = run.trainer.args.seed
    if capacity is None:
        set_ranks(run, plan.ranks, seed, continues_adapter, plan.scaling_exponent)
    else:
        start_from(run, capacity, plan.ranks, seed, continues_adapter, plan.scaling_exponent)


# --- Record -------------------------------------------------------------------------------------------------------


def write_choice(plan: Plan, history: GateHistory | None, output: Path) -> None:
    """Write a new plan and the gate history of its search; remove the history of an earlier search."""
    if history is None:
        gates_path(output).unlink(missing_ok=True)
    else:
        history.write(output)
    write_plan(plan, plan_path(output))


def report_parameters(run: Run, plan: Plan) -> None:
    """Log the number of trainable parameters, on process 0, unless it is that of the budget, which the plan tells."""
    trainable = sum(math.prod(run.engine.find_shape(p)) for p in run.model.parameters() if p.requires_grad)
    assert plan.parameters is not None, "they were counted when the plan was applied"
    trainable += plan.parameters.trained - count_lora(run, None)  # without room for rank that is not in use
    if get_rank() == 0 and (plan.budget is None or trainable != plan.budget.spent):
        LOG.info("layersel: %s parameters train", f"{trainable:,}")
