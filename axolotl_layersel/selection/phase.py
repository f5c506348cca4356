"""Layer selection: decide which layers keep their adapter, and apply it before the real engine is built."""

import importlib.metadata
import logging
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import Trainer

from axolotl_layersel import adapters, engines
from axolotl_layersel.args import DATA_FREE_METHODS, DEFAULT_UNSELECTED, SAMPLING_METHODS, SelectionArgs
from axolotl_layersel.errors import LayerselError
from axolotl_layersel.files import FOLDER
from axolotl_layersel.initialisation import changes_base, describe_continued, explain_refusal
from axolotl_layersel.interrupt import ending_on_signal
from axolotl_layersel.layers import LayerStack, find_layer_stack, find_lora_modules
from axolotl_layersel.plan import (
    LayerChoice,
    Plan,
    Stability,
    Tower,
    check_checkpoint,
    check_model,
    check_settings,
    plan_path,
    read_plan,
    write_plan,
)
from axolotl_layersel.report import print_plan
from axolotl_layersel.selection import cka, controls, cosine, fisher, passes
from axolotl_layersel.selection.calibration import (
    Sample,
    are_most,
    count_most_common,
    fingerprint,
    place_token,
    read_samples,
)
from axolotl_layersel.selection.callback import LayerSelectionCallback
from axolotl_layersel.selection.choosing import Choice, choose, count_kept, find_candidates, find_mean_overlap
from axolotl_layersel.selection.flexora import choice as flexora
from axolotl_layersel.selection.flexora.records import GateHistory, gates_path
from axolotl_layersel.selection.provenance import check_base, compare_data, describe_shape

LOG = logging.getLogger("axolotl.layersel")


def select_layers(
    trainer: Trainer,
    settings: SelectionArgs,
    resume_from: str | None = None,
    continues_adapter: bool = False,
    repeat: int = 1,
) -> Plan:
    """Choose layers and apply the choice to the trainer's model; ``prepare_trainer`` does all that a run needs.

    Args:
        trainer: a Trainer whose model is a PEFT model with one LoRA adapter.
        settings: the ``selection`` block.
        resume_from: the checkpoint that the run resumes from; its plan is used, nothing is selected again.
        continues_adapter: the LoRA weights are a trained adapter's, and stay as they are.
        repeat: choose with so many seeds in all, to say how far the choices agree; the first is the plan.

    Returns:
        The plan, which lies in ``<output_dir>/layersel/plan.json`` too.

    Raises:
        LayerselError: on every rank, where something cannot be honoured.
    """
    engine = engines.name_engine(trainer)
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    stack = find_layer_stack(model)
    base_model = adapters.get_config(model).base_model_name_or_path
    reused = engines.decide_on_rank_zero(lambda: find_plan(settings, resume_from, base_model))
    if reused is None and getattr(model.get_base_model().config, "is_encoder_decoder", False):
        check_encoder_decoder(settings, type(model.get_base_model()).__name__)
    if continues_adapter and reused is None:
        check_continuing(settings)
    removes = (reused[0].unselected if reused else settings.unselected or DEFAULT_UNSELECTED) == "remove"
    check_initialisation(model, continues_adapter, removes)
    if reused is not None and repeat > 1:
        raise LayerselError(
            f"--repeat: nothing is chosen with {reused[1]} as the plan. Remove `plan` from the block, or --repeat."
        )
    output = Path(trainer.args.output_dir)
    if reused is None:
        # Before anything is scored or searched: what the run will not have takes no part in that either.
        remove_towers(model, stack, settings.resolve(trainer.args.seed)["towers"])
        with ending_on_signal(trainer.args.device, "interrupted; no layers are chosen yet, and no plan is written"):
            plan, history = make_plan(trainer, model, stack, settings, engine)
        engines.decide_on_rank_zero(lambda: write_choice(plan, history, output))
        if repeat > 1:
            with ending_on_signal(trainer.args.device, "interrupted; the plan does not say how far seeds agree"):
                plan.stability = measure_stability(trainer, model, stack, settings, plan, repeat)
            engines.decide_on_rank_zero(lambda: write_choice(plan, history, output))
    else:
        plan, source = reused
        outside = [name for names in stack.towers.values() for name in names]
        check_model(plan, stack.name, len(stack.layers), stack.lora_modules, outside, source)
        if settings.plan_check != "ignore":
            check_base(plan, base_model, describe_shape(model.get_base_model().config), source)
        report_data(plan, trainer, source)
        remove_towers(model, stack, plan.towers)
        plan.outside = describe_towers(model, stack)
        LOG.info("layersel: the plan of %s is applied; nothing is scored", source)
        engines.decide_on_rank_zero(lambda: carry_over(plan, Path(source), output))
    apply_plan(model, stack, plan)
    if engines.get_rank() == 0:
        print_plan(plan)
    trainer.add_callback(LayerSelectionCallback(trainer, stack, plan))
    return plan


def write_choice(plan: Plan, history: GateHistory | None, output: Path) -> None:
    """Write the plan, and beside it the course of its search; another search's goes."""
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


def check_encoder_decoder(settings: SelectionArgs, name: str) -> None:
    """Raise LayerselError for a method that runs rows through the layers as one sequence.

    ``name``: of the encoder-decoder model.
    """
    if settings.method in SAMPLING_METHODS:
        raise LayerselError(
            f"base_model: {name} is an encoder-decoder model, whose layers layersel.selection.method: "
            f"{settings.method} cannot score: no row runs through all of them. Use one of flexora, "
            f"{', '.join(DATA_FREE_METHODS)}, which choose among the layers of the decoder."
        )


def check_continuing(settings: SelectionArgs) -> None:
    """Raise LayerselError where the default would delete the weights of the adapter that is continued."""
    if settings.unselected is None:
        raise LayerselError(
            "layersel.selection.unselected: lora_model_dir continues a trained adapter, and `remove`, the default, "
            "would delete its weights in the layers that are not selected. Set `unselected: freeze` to keep them "
            "untrained, or write `unselected: remove` to delete them."
        )


def check_initialisation(model: PeftModel, continues_adapter: bool, removes: bool) -> None:
    """Raise LayerselError where the base weights do not allow for a selection."""
    initial = adapters.get_config(model).init_lora_weights
    if continues_adapter:
        if removes and changes_base(initial):
            raise LayerselError(describe_continued(initial, "the adapter"))
    elif refusal := explain_refusal(initial):
        raise LayerselError(refusal)


def report_data(plan: Plan, trainer: Trainer, source: str) -> None:
    """Log a warning, on rank 0, where a plan was made on other data than the run's."""
    difference = None
    if engines.get_rank() == 0:
        difference = compare_data(plan, trainer.train_dataset, trainer.eval_dataset)
    if difference:
        LOG.warning(
            "layersel: the plan from %s was made on other data than this run's: %s. It is applied all the same; make a "
            "new plan to choose by this run's data.",
            source,
            difference,
        )


def find_plan(
    settings: SelectionArgs, resume_from: str | None, base_model: str | None = None
) -> tuple[Plan, str] | None:
    """Return the plan that the run must use and where it is from, or None where layers are to be selected.

    A resumed run uses the plan of its checkpoint; else ``settings.plan`` is used.

    Raises:
        LayerselError: if that plan is missing or damaged, was made for another model than ``base_model``, or the YAML
            block asks for another.
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
    plan = read_plan(source, key)
    check_settings(plan, settings, str(source))
    if settings.plan_check != "ignore":
        check_base(plan, base_model, None, str(source))
    if resume_from is not None:
        check_checkpoint(plan, resume_from)
    return plan, str(source)


def make_plan(
    trainer: Trainer, model: PeftModel, stack: LayerStack, settings: SelectionArgs, engine: str
) -> tuple[Plan, GateHistory | None]:
    """Return a plan made from ``settings``, and the course of the search where there was one."""
    started = time.monotonic()
    resolved = settings.resolve(trainer.args.seed)
    candidates = engines.decide_on_rank_zero(lambda: find_candidates(settings, stack))
    history = None
    if settings.method == "flexora":
        choice, history = flexora.choose_by_search(trainer, model, stack, settings, resolved["seed"], candidates)
    elif settings.method in DATA_FREE_METHODS:
        keep = engines.decide_on_rank_zero(lambda: count_kept(settings, len(candidates)))
        selected = controls.choose_without_data(settings.method, candidates, keep, resolved["seed"], settings.layers)
        choice = Choice(stack.list_modules(selected), scores=[None] * len(stack.layers))
    else:
        choice = choose_by_score(trainer, model, stack, settings, resolved, candidates)
    kept = set(choice.modules)
    layers = [
        LayerChoice(layer=layer, score=score, selected=not kept.isdisjoint(stack.lora_modules.get(layer, [])))
        for layer, score in enumerate(choice.scores)
    ]
    plan = Plan(
        method=settings.method,
        layers=layers,
        unselected=resolved["unselected"],
        towers=resolved["towers"],
        outside=describe_towers(model, stack),
        unscored=choice.unscored,
        stack=stack.name,
        modules=choice.modules,
        module_scores=choice.module_scores,
        settings=resolved,
        seed=resolved["seed"],
        calibration_rows=choice.rows,
        rows_left_out=choice.left_out,
        dataset_fingerprint=choice.fingerprint,
        base_model=adapters.get_config(model).base_model_name_or_path,
        base_shape=describe_shape(model.get_base_model().config),
        versions={
            name: importlib.metadata.version(name)
            for name in ("axolotl-layersel", "axolotl", "torch", "transformers", "peft")
        },
        engine=engine,
        processes=trainer.args.world_size,
        seconds=round(time.monotonic() - started, 3),
    )
    # All ranks come to the same plan but for the seconds; rank 0's is the one that is kept.
    return engines.decide_on_rank_zero(lambda: plan), history


def choose_by_score(
    trainer: Trainer,
    model: PeftModel,
    stack: LayerStack,
    settings: SelectionArgs,
    resolved: dict[str, Any],
    candidates: list[int],
) -> Choice:
    """Score the layers on a calibration sample, and choose the highest."""
    keep = engines.decide_on_rank_zero(lambda: count_kept(settings, len(candidates)))
    drawn = read_samples(trainer.train_dataset, resolved["num_samples"], resolved["seed"])
    samples, positions = place_token(drawn, resolved["token"]) if settings.method == "cka" else (drawn, None)
    scored = {sample.row for sample in samples}
    left_out = [sample.row for sample in drawn if sample.row not in scored]
    if settings.method == "cka" and engines.get_rank() == 0:
        report_token(samples, positions, left_out, resolved["token"])
    scores, unscored = score(trainer, model, stack, settings.method, samples, positions)
    selected = engines.decide_on_rank_zero(lambda: choose(scores, unscored, candidates, keep, settings.method))
    return Choice(
        stack.list_modules(selected),
        scores,
        unscored,
        rows=[sample.row for sample in samples],
        left_out=left_out,
        fingerprint=fingerprint(samples),
    )


def report_token(samples: list[Sample], positions: list[int] | None, left_out: list[int], token: str) -> None:
    """Log which rows are not scored, and a warning where the token that stands for a row says little about it."""
    if left_out:
        LOG.warning(
            "layersel: token: %s: %d of the %d rows drawn lack the ending that the others share, as rows do that are "
            "cut at sequence_len, and are not scored: %s",
            token,
            len(left_out),
            len(samples) + len(left_out),
            ", ".join(map(str, left_out)),
        )
    alike = 0 if positions is None else count_most_common(samples, positions)
    if are_most(alike, len(samples)):
        LOG.warning(
            "layersel: token: %s: %d of %d rows have the same token there, so its embedding says next to nothing about "
            "a row, and the score of layer 0 hangs on few rows or on none. %s",
            token,
            alike,
            len(samples),
            "Use `token: mean`." if token == "auto" else "Use `token: auto` or `mean`.",
        )


def measure_stability(
    trainer: Trainer, model: PeftModel, stack: LayerStack, settings: SelectionArgs, plan: Plan, repeat: int
) -> Stability:
    """Choose again with the seeds after the plan's, ``repeat`` choices in all, and return how far they agree.

    Raises:
        LayerselError: if the method draws nothing by its seed.
    """
    if settings.method in DATA_FREE_METHODS:
        raise LayerselError(
            f"--repeat: {repeat} choices by method {settings.method} would say nothing: it does not look at the data. "
            "Remove --repeat."
        )
    plans = [plan]
    for seed in range(plan.seed + 1, plan.seed + repeat):
        again = settings.model_copy(update={"seed": seed})
        plans.append(make_plan(trainer, model, stack, again, plan.engine)[0])
    return Stability(
        selected={each.seed: each.selected for each in plans},
        overlap=find_mean_overlap([each.modules for each in plans]),
    )


def score(
    trainer: Trainer,
    model: PeftModel,
    stack: LayerStack,
    method: str,
    samples: list[Sample],
    positions: list[int] | None,
) -> tuple[list[float | None], dict[int, str]]:
    """Return the importance of every layer by ``method``, and why a layer has none; rank 0 computes it."""
    rows = [sample.row for sample in samples]
    places = [f"layer {layer}" for layer in range(len(stack.layers))]
    if method == "cka":
        states = passes.measure_token_states(trainer, model, stack, samples, positions)

        def conclude() -> tuple[list[float | None], dict[int, str]]:
            check_finite(states.sum(dim=-1), ["the embeddings", *places], rows)
            return cka.score_layers(states)

    elif method == "cosine":
        turns = passes.measure_turns(trainer, model, stack, samples)
        tokens = torch.tensor([len(sample.input_ids) for sample in samples])

        def conclude() -> tuple[list[float | None], dict[int, str]]:
            check_finite(turns, places, rows)
            return list(cosine.score_layers(turns, tokens)), {}

    else:
        squares = passes.measure_squared_gradients(trainer, model, stack, samples)
        weights = passes.count_target_weights(model, stack)

        def conclude() -> tuple[list[float | None], dict[int, str]]:
            check_finite(squares, places, rows)
            return fisher.score_layers(squares, weights)

    return engines.decide_on_rank_zero(conclude)


def check_finite(measured: torch.Tensor, places: list[str], rows: list[int]) -> None:
    """Raise LayerselError naming the place and the training row of the first number that is not finite.

    Args:
        measured: (samples, places).
        places: what was measured, in the order that the model runs.
        rows: the samples' training rows.
    """
    bad = (~measured.isfinite()).nonzero()
    if len(bad):
        place, sample = min((int(place), int(sample)) for sample, place in bad)
        raise LayerselError(
            f"layersel.selection.method: NaN or infinity in {places[place]} for training row {rows[sample]}. "
            "Look at that row and at the base model's precision (fp16 overflows; try bf16)."
        )


def remove_towers(model: PeftModel, stack: LayerStack, towers: str) -> None:
    """Remove the LoRA modules outside of the layers, unless ``towers`` is ``keep``."""
    if towers == "remove" and stack.towers:
        adapters.remove_modules(model, [name for names in stack.towers.values() for name in names])


def describe_towers(model: PeftModel, stack: LayerStack) -> list[Tower]:
    """Return what LoRA there is, or was, outside of the layers, and how much of it trains in this run."""
    lora = find_lora_modules(model.get_base_model())

    def trains(name: str) -> bool:
        return name in lora and any(parameter.requires_grad for parameter in adapters.lora_parameters(lora[name]))

    return [Tower(place=place, modules=names, trained=sum(map(trains, names))) for place, names in stack.towers.items()]


def apply_plan(model: PeftModel, stack: LayerStack, plan: Plan) -> None:
    """Remove or freeze the LoRA modules of the layers that ``plan`` does not select."""
    change = adapters.remove_unselected if plan.unselected == "remove" else adapters.freeze_unselected
    change(model, stack, plan.modules)
    trainable = sum(p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in model.parameters() if p.requires_grad)
    LOG.info("layersel: %s parameters train; %d layers keep LoRA", f"{trainable:,}", len(plan.selected))
