"""Layer selection: decide which layers keep their adapter, and apply it before the real engine is built."""

import dataclasses
import logging
import math
import time
from collections.abc import Sized
from pathlib import Path

from transformers import Trainer

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.paths import FOLDER, gates_path, plan_path
from axolotl_layersel.common.versions import find_version
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
from axolotl_layersel.lora.layers import LayerStack, find_layer_stack
from axolotl_layersel.lora.modules import count_component_parameters
from axolotl_layersel.lora.plain_lora import check_linear
from axolotl_layersel.lora.removal import freeze_unselected, remove_modules, remove_unselected
from axolotl_layersel.lora.resizing import set_ranks
from axolotl_layersel.lora.run import Run
from axolotl_layersel.lora.weights import lora_parameters
from axolotl_layersel.selection.callback import LayerSelectionCallback
from axolotl_layersel.selection.choosing import Selection, find_mean_overlap
from axolotl_layersel.selection.fitting import fit_to_data, fit_to_units
from axolotl_layersel.selection.gate_history import GateHistory
from axolotl_layersel.selection.plan import LayerChoice, Plan, Stability, Tower
from axolotl_layersel.selection.plan_checks import (
    ModelFacts,
    check_reuse,
    find_plan_cost,
    list_model_differences,
    list_setting_differences,
)
from axolotl_layersel.selection.plan_file import check_checkpoint, read_plan, write_plan
from axolotl_layersel.selection.provenance import compare_data, describe_shape, list_base_differences
from axolotl_layersel.selection.ranks import allocate_ranks, check_spread
from axolotl_layersel.selection.report import print_plan
from axolotl_layersel.selection.units import find_units

LOG = logging.getLogger("axolotl.layersel")


def select_layers(
    run: Run,
    settings: SelectionConfig,
    resume_from: str | None = None,
    continues_adapter: bool = False,
    repeat: int = 1,
    capacity: Capacity | None = None,
) -> Plan:
    """Choose layers and apply the choice to the trainer's model; ``prepare_trainer`` does all that a run needs.

    Args:
        run: its trainer has not trained.
        settings: the ``selection`` block.
        resume_from: the checkpoint that the run resumes from; its plan is used, nothing is selected again.
        continues_adapter: the LoRA weights are a trained adapter's, and stay as they are.
        repeat: choose with so many seeds in all, to say how far the choices agree; the first is the plan.
        capacity: with ``l1ra``, what the modules were grown from and to.

    Returns:
        The plan, which lies in ``<output_dir>/layersel/plan.json`` too.

    Raises:
        LayerselError: on every rank, where something cannot be honoured.
    """
    trainer, base = run.trainer, run.base
    base_model = run.config.base_model_name_or_path
    reused = decide_on_rank_zero(lambda: read_reused(settings, resume_from))
    stack = find_layer_stack(run.model, reused[0].stacks if reused else settings.stacks or DEFAULT_STACKS)
    if reused is not None:
        facts = find_facts(run, stack, reused[0], continues_adapter)
        known = KnownRun(
            base_model,
            describe_shape(base.config),
            # A trained adapter has its highest rank there, and its ranks are compared module by module.
            capacity.lora_r if capacity else None if continues_adapter else run.config.r,
            capacity.max_rank if capacity else None,
        )
        decide_on_rank_zero(lambda: check_reused(reused, settings, resume_from, known, facts))
    if reused is None and read_fact(base.config, "is_encoder_decoder") and not stack.has_decoder:
        check_encoder_decoder(settings, type(base).__name__)
    if continues_adapter and reused is None:
        check_continuing(settings)
    removes = (reused[0].unselected if reused else settings.unselected or DEFAULT_UNSELECTED) == "remove"
    check_base(run, continues_adapter, removes)
    if reused is not None and repeat > 1:
        raise LayerselError(
            f"--repeat: nothing is chosen with {reused[1]} as the plan. Remove `plan` from the block, or --repeat."
        )
    output = run.output_dir
    if reused is None:
        # This comes before anything is scored or searched, so that what the run will not have takes no part in it.
        resolved = fit_to_data(run, settings, settings.resolve(trainer.args.seed))
        check_ranks(run, stack, resolved, continues_adapter)
        remove_towers(run, stack, resolved.outside_layers)
        selection = Selection.of(
            run, stack, resolved, capacity.lora_r if capacity else None, capacity.max_rank if capacity else None
        )
        selection = fit_to_units(settings, selection)
        report_idle(selection)
        if repeat > 1:
            check_repeat(selection, repeat)
        with ending_on_signal(run.device, "interrupted; no layers are chosen yet, and no plan is written"):
            plan, history = make_plan(selection)
        decide_on_rank_zero(lambda: write_choice(plan, history, output))
        if repeat > 1:
            with ending_on_signal(run.device, "interrupted; the plan does not say how far seeds agree"):
                plan.stability = measure_stability(selection, plan, repeat)
            decide_on_rank_zero(lambda: write_choice(plan, history, output))
    else:
        plan, source = reused
        correct_spending(plan, facts, source)
        report_data(plan, trainer, source)
        remove_towers(run, stack, plan.outside_layers)
        plan.outside = describe_towers(run, stack)
        LOG.info("layersel: the plan of %s is applied; nothing is scored", source)
        decide_on_rank_zero(lambda: carry_over(plan, Path(source), output))
    apply_plan(run, stack, plan)
    if plan.ranks:
        apply_ranks(run, plan, capacity, continues_adapter)
    report_parameters(run, plan)
    if get_rank() == 0:
        print_plan(plan)
    trainer.add_callback(LayerSelectionCallback(run, stack, plan))
    return plan


def report_idle(selection: Selection) -> None:
    """Log a warning, on rank 0, where scores, or freezing, decide nothing; every rank must call this.

    Raises:
        LayerselError: on every rank, where ranks that follow scores are the same by force.
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


def write_choice(plan: Plan, history: GateHistory | None, output: Path) -> None:
    """Write the plan, and the course of its search beside it. The course of an earlier search is removed."""
    if history is None:
        gates_path(output).unlink(missing_ok=True)
    else:
        history.write(output)
    write_plan(plan, plan_path(output))


def carry_over(plan: Plan, source: Path, output: Path) -> None:
    """Write a plan that was read from ``source``, and the course of its search, which lies there or, for a
    checkpoint's plan, in its run.
    """
    target = gates_path(output)
    places = [gates_path(folder) for folder in source.resolve().parents[1:3]] if source.parent.name == FOLDER else []
    found = next((place for place in places if plan.method == "flexora" and place.exists()), None)
    if found is None:
        target.unlink(missing_ok=True)
    elif found != target.resolve():
        GateHistory.read(found.parents[1], "layersel.selection.plan").write(output)
    write_plan(plan, plan_path(output))


def check_encoder_decoder(settings: SelectionConfig, name: str) -> None:
    """Raise LayerselError for a method that runs rows through a model in which an encoder or a decoder is not found.

    ``name``: of the encoder-decoder model.
    """
    if get_method(settings.method).draws_rows:
        raise LayerselError(
            f"base_model: {name} is of a family with an encoder and a decoder, and the layers of both were not found "
            f"in it, so layersel.selection.method: {settings.method} does not know what each layer reads. Use one of "
            f"flexora, {list_data_free()}."
        )


def check_continuing(settings: SelectionConfig) -> None:
    """Raise LayerselError where the default would delete the weights of the adapter that is continued."""
    if settings.unselected is None:
        raise LayerselError(
            "layersel.selection.unselected: lora_model_dir continues a trained adapter, and `remove`, the default, "
            "would delete its weights in the layers that are not selected. Set `unselected: freeze` to keep them "
            "untrained, or write `unselected: remove` to delete them."
        )


def check_ranks(run: Run, stack: LayerStack, settings: ResolvedSelection, continues_adapter: bool) -> None:
    """Raise LayerselError where modules cannot be given other ranks than ``lora_r``, or not be seen by a sketch."""
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


def check_base(run: Run, continues_adapter: bool, removes: bool) -> None:
    """Raise LayerselError where the base weights do not allow for a selection."""
    initial = run.config.init_lora_weights
    if continues_adapter:
        if removes and changes_base(initial):
            raise LayerselError(describe_continued(initial, "the adapter"))
    else:
        check_supported(initial)


def report_data(plan: Plan, trainer: Trainer, source: str) -> None:
    """Log a warning, on rank 0, where a plan was made on other data than the run's."""
    difference = None
    if get_rank() == 0:
        difference = compare_data(plan, trainer.train_dataset, trainer.eval_dataset, trainer.data_collator)
    if difference:
        LOG.warning(
            "layersel: the plan from %s was made on other data than this run's: %s. It is applied all the same; make a "
            "new plan to choose by this run's data.",
            source,
            difference,
        )


@dataclasses.dataclass(frozen=True)
class KnownRun:
    """What is known of a run, beside its ``selection`` block, that a plan may contradict; None where it is not known.

    Attributes:
        base_model: the path or the hub's name of its base model.
        shape: of that, see ``describe_shape``.
        lora_r: the rank that LoRA has without a selection.
        room: with ``l1ra``, the highest rank that modules have room for.
        rank_pattern: ranks that a YAML file gives modules.
    """

    base_model: str | None = None
    shape: dict[str, int | str] | None = None
    lora_r: int | None = None
    room: int | None = None
    rank_pattern: dict[str, int] | None = None


def find_plan(
    settings: SelectionConfig, resume_from: str | None, known: KnownRun | None = None
) -> tuple[Plan, str] | None:
    """Return the plan that the run must use and where it is from, or None where layers are to be selected.

    Raises:
        LayerselError: if it is missing or damaged, or not for what is ``known`` of this run before its model is there.
    """
    reused = read_reused(settings, resume_from)
    if reused is not None:
        check_reused(reused, settings, resume_from, known or KnownRun())
    return reused


def read_reused(settings: SelectionConfig, resume_from: str | None) -> tuple[Plan, str] | None:
    """Return the plan that a run reuses and where it is from, None where it reuses none.

    A resumed run uses the plan of its checkpoint; else ``settings.plan`` is used.

    Raises:
        LayerselError: if that plan is missing or damaged.
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
    return read_plan(source, key), str(source)


def check_reused(
    reused: tuple[Plan, str],
    settings: SelectionConfig,
    resume_from: str | None,
    known: KnownRun,
    facts: ModelFacts | None = None,
) -> None:
    """Check that a plan is for this run: its base model, its layers and LoRA modules, and what its YAML block says.

    Args:
        reused: the plan, and where it is from.
        settings: the ``selection`` block.
        resume_from: the checkpoint that the run resumes from.
        known: of the run.
        facts: of its model, None before that is loaded.

    Raises:
        LayerselError: with all differences, or if the checkpoint's adapter is not of its plan.
    """
    plan, source = reused
    of_base = []
    if settings.plan_check != "ignore":
        of_base = list_base_differences(plan, known.base_model, known.shape)
    others = list_model_differences(plan, facts, settings) if facts else []
    others += list_setting_differences(plan, settings, known.lora_r, known.room, known.rank_pattern)
    check_reuse(source, resume_from is not None, of_base, others)
    if resume_from is not None:
        check_checkpoint(plan, resume_from)


def find_facts(run: Run, stack: LayerStack, plan: Plan, continues_adapter: bool) -> ModelFacts:
    """Return what of a run's model ``plan`` speaks of.

    ``continues_adapter``: its LoRA is a trained adapter's, which has none where a selection removed it.
    """
    lora, settings = run.lora_modules, plan.resolve_settings()
    ranked = {name: lora[name] for name in plan.ranks if name in lora}
    check_linear(run, ranked, "layersel.selection.rank_allocation")
    names = stack.names if settings.candidates is None else settings.candidates
    carrying = [layer for layer in sorted(stack.lora_modules) if layer not in stack.idle]
    candidates = [layer for layer in carrying if stack.names[layer] in set(names)]
    whole = not continues_adapter
    return ModelFacts(
        place=stack.place,
        names=stack.names,
        modules={stack.names[layer]: modules for layer, modules in stack.lora_modules.items()},
        outside=[name for names in stack.towers.values() for name in names],
        units=[unit.modules for unit in find_units(stack, plan.granularity, candidates)] if whole else None,
        costs={name: count_component_parameters(module, run.adapter) for name, module in ranked.items()},
    )


def correct_spending(plan: Plan, facts: ModelFacts, source: str) -> None:
    """Let a plan whose ranks were edited by hand say what they take of its budget."""
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


def make_plan(selection: Selection) -> tuple[Plan, GateHistory | None]:
    """Return the plan that ``selection`` leads to, and the course of its search; every rank must call this."""
    started = time.monotonic()
    run, stack, settings = selection.run, selection.stack, selection.settings
    choice = selection.method.load()(selection)
    ranks, budget = decide_on_rank_zero(lambda: allocate_ranks(selection, choice))
    modules = [name for name in choice.modules if name in ranks] if ranks else choice.modules
    kept = set(modules)
    layers = [
        LayerChoice(layer=name, score=score, selected=not kept.isdisjoint(stack.lora_modules.get(layer, [])))
        for layer, (name, score) in enumerate(zip(stack.names, choice.scores))
    ]
    plan = Plan(
        method=settings.method,
        layers=layers,
        unselected=settings.unselected,
        outside_layers=settings.outside_layers,
        outside=describe_towers(run, stack),
        unscored=choice.unscored,
        stack=stack.place,
        modules=modules,
        granularity=settings.granularity,
        ranks=ranks,
        budget=budget,
        module_scores=choice.module_scores,
        settings=dataclasses.asdict(settings),
        seed=settings.seed,
        calibration_rows=choice.rows,
        rows_left_out=choice.left_out,
        token=choice.token,
        dataset_fingerprint=choice.fingerprint,
        base_model=run.config.base_model_name_or_path,
        base_shape=describe_shape(run.base.config),
        versions={
            name: version
            for name in ("axolotl-layersel", "axolotl", "torch", "transformers", "peft")
            if (version := find_version(name)) is not None  # a plain Trainer needs no Axolotl
        },
        engine=run.engine.name,
        processes=run.trainer.args.world_size,
        seconds=round(time.monotonic() - started, 3),
    )
    # All ranks come to the same plan but for the seconds; rank 0's is the one that is kept.
    return decide_on_rank_zero(lambda: plan), choice.history


def check_repeat(selection: Selection, repeat: int) -> None:
    """Log a warning, on rank 0, where all seeds draw the same rows.

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


def measure_stability(selection: Selection, plan: Plan, repeat: int) -> Stability:
    """Choose again with the seeds after the plan's, ``repeat`` choices in all, and return how far they agree."""
    plans = [plan]
    for seed in range(plan.seed + 1, plan.seed + repeat):
        again = dataclasses.replace(selection, settings=dataclasses.replace(selection.settings, seed=seed))
        plans.append(make_plan(again)[0])
    return Stability(
        selected={each.seed: each.selected for each in plans},
        overlap=find_mean_overlap([each.ranks or dict.fromkeys(each.modules, 1) for each in plans]),
    )


def remove_towers(run: Run, stack: LayerStack, towers: str) -> None:
    """Remove the LoRA modules outside of the layers, or keep them."""
    if {"keep": False, "remove": bool(stack.towers)}[towers]:
        remove_modules(run, [name for names in stack.towers.values() for name in names])


def describe_towers(run: Run, stack: LayerStack) -> list[Tower]:
    """Return what LoRA there is, or was, outside of the layers, and how much of it trains in this run."""
    lora = run.lora_modules

    def trains(name: str) -> bool:
        return name in lora and any(p.requires_grad for p in lora_parameters(run, name))

    return [Tower(place=place, modules=names, trained=sum(map(trains, names))) for place, names in stack.towers.items()]


def apply_plan(run: Run, stack: LayerStack, plan: Plan) -> None:
    """Remove or freeze the LoRA modules of the layers that ``plan`` does not select."""
    changes = {"remove": remove_unselected, "freeze": freeze_unselected}
    changes[plan.unselected](run, stack, plan.modules)


def apply_ranks(run: Run, plan: Plan, capacity: Capacity | None, continues_adapter: bool) -> None:
    """Give the modules that ``plan`` keeps their ranks."""
    if not continues_adapter:
        check_redrawn(run.config.init_lora_weights, plan.resolve_settings().rank_allocation)
    modules = run.lora_modules
    check_linear(run, {name: modules[name] for name in plan.ranks}, "layersel.selection.rank_allocation")
    trainers.check_no_optimizer(run.trainer)
    seed = run.trainer.args.seed
    if capacity is None:
        set_ranks(run, plan.ranks, seed, continues_adapter)
    else:
        start_from(run, capacity, plan.ranks, seed, continues_adapter)


def report_parameters(run: Run, plan: Plan) -> None:
    """Log how much trains."""
    trainable = sum(math.prod(run.engine.find_shape(p)) for p in run.model.parameters() if p.requires_grad)
    LOG.info("layersel: %s parameters train; %d layers keep LoRA", f"{trainable:,}", len(plan.selected))
