"""Prepare a trainer: check the run, decide layers and ranks, apply them, and make every save complete."""

import functools
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import Trainer

from axolotl_layersel.common.errors import LayerselError, warning_instead
from axolotl_layersel.common.files import check_output
from axolotl_layersel.common.paths import gates_path, list_pictures, plan_path, ranks_path, state_path
from axolotl_layersel.common.versions import find_versions
from axolotl_layersel.config.engines import moves_state
from axolotl_layersel.config.l1ra import find_room
from axolotl_layersel.config.root import LayerselConfig, describe_unread
from axolotl_layersel.config.selection import find_matched_room
from axolotl_layersel.engines import collectives, trainers
from axolotl_layersel.engines.signals import WATCH, outlive_signals
from axolotl_layersel.l1ra.callback import RankCallback
from axolotl_layersel.l1ra.capacity import make_room
from axolotl_layersel.l1ra.redistribution import RankRedistribution
from axolotl_layersel.l1ra.state import check_exponent, read_state
from axolotl_layersel.lora.config import check_target_parameters, complete_config
from axolotl_layersel.lora.readiness import Readiness, check_trains
from axolotl_layersel.lora.run import Run
from axolotl_layersel.lora.switching import preserve_trained
from axolotl_layersel.lora.weights import check_untrained, initialize_lora, restore_live_adapter
from axolotl_layersel.lora.writer import AdapterWriter
from axolotl_layersel.reports.model_card import Recipe
from axolotl_layersel.reports.pictures import RunPictures
from axolotl_layersel.reports.plan_table import print_plan
from axolotl_layersel.selection.plan import Plan
from axolotl_layersel.selection.reuse import read_reused
from axolotl_layersel.selection.select import select_layers
from axolotl_layersel.training import nodes
from axolotl_layersel.training.callbacks import (
    InterruptCallback,
    RankTableCallback,
    RestoreCallback,
    ShareCallback,
    TidyCallback,
    TrackerCallback,
)
from axolotl_layersel.training.checkpoints import check_best, check_resumable, holds, is_resumable
from axolotl_layersel.training.contents import check_lora, describe_lora
from axolotl_layersel.training.leftovers import remove_leftovers
from axolotl_layersel.training.process_agreement import check_trainers_alike, share_new_weights
from axolotl_layersel.training.saving import RunSaves, list_records

LOG = logging.getLogger("axolotl.layersel")
RESUMED_KEY = "resume_from_checkpoint"
OUTPUT_FILES = [path("").name for path in (plan_path, ranks_path, gates_path)]  # of a run, in its folder


def prepare_trainer(
    trainer: Trainer,
    settings: LayerselConfig,
    resume_from: str | None = None,
    continues_adapter: bool = False,
    lora_r: int | None = None,
    scaling: float | None = None,
    repeat: int = 1,
    checked: bool = False,
    given: dict[str, Any] | None = None,
) -> Plan | None:
    """Prepare a trainer: choose the layers that keep LoRA, and redistribute rank while it trains.

    This is for a ``transformers.Trainer`` or a subclass. The Axolotl plugin calls it too::

        model = get_peft_model(base, LoraConfig(r=8, task_type="SEQ_CLS", target_modules=["query", "value"]))
        trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator)
        plan = prepare_trainer(trainer, LayerselConfig(selection=SelectionConfig(method="cka", ratio=0.5)))
        trainer.train()
        trainer.save_model()

    Call it once on every process, after the trainer was built and before it trains or creates its optimizer. The
    model is changed in place: unselected layers lose their adapter, or keep it untrained. New LoRA weights are drawn
    again from ``trainer.args.seed``. ``modules_to_save``, such as the classifier that PEFT adds for ``SEQ_CLS``, train
    and are saved as usual.

    Afterwards ``trainer.train()`` ends on Ctrl-C and SIGTERM as docs/checkpoints.md describes. ``trainer.save_model``,
    the model's ``save_pretrained`` and every checkpoint write a plain PEFT adapter together with the plan; the adapter
    has been read back and compared with the model. ``trainer.save_adapter(folder)`` saves as a checkpoint does, on
    every engine; all processes must call it.

    Args:
        trainer: a Trainer whose model is a PEFT model with one LoRA adapter. Methods that score read its
            ``train_dataset``. The rows have ``input_ids`` and, if the model takes them, ``attention_mask``,
            ``token_type_ids`` and labels.
        settings: the content of the ``layersel`` block.
        resume_from: the checkpoint that the run resumes from. Its plan is used, and nothing is scored. Give
            ``trainer.train(resume_from_checkpoint=…)`` the same.
        continues_adapter: whether the LoRA weights are a trained adapter's, which are kept. Otherwise they are drawn
            anew, and a trained adapter is refused.
        lora_r: with ``l1ra``, the rank that ``max_rank`` is derived from; default: the adapter's.
        scaling: with ``l1ra``, the scaling of modules of rank ``lora_r``; default: each module's in the adapter.
        repeat: with ``selection``, the number of seeds to choose with, to measure how far they agree. The first
            choice is the plan.
        checked: whether ``output_dir``, ``resume_from`` and unread keys were checked before, as by the plugin before
            the model loads.
        given: the LoRA settings of the plugin's YAML file, for the records of checkpoints.

    Returns:
        The plan, or None without a selection. It is printed, and written to ``<output_dir>/layersel/plan.json``.

    Raises:
        LayerselError: on every process, for a run that cannot honour its settings; a ``ValueError`` of one sentence.
    """
    if "save_adapter" in vars(trainer):
        raise LayerselError(
            "trainer: prepare_trainer was called for it before, and its choice is in the model. Build the model and "
            "the trainer anew to choose again."
        )
    start = check(trainer, settings, resume_from, continues_adapter, checked)
    initialize(start)
    decision = decide(start, lora_r, scaling, repeat)
    readiness = apply(start, decision)
    record(start, decision, readiness, given or {})
    return decision.plan


# --- The phases ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """A checked run."""

    run: Run
    settings: LayerselConfig  # without unread keys
    resume_from: str | None
    resumed_step: int | None  # of that checkpoint
    continues_adapter: bool
    lora: dict[str, Any]  # LoRA's settings before a selection changes them, see ``contents.describe_lora``


@dataclass(frozen=True)
class Decision:
    """The plan of the selection and the ranks of ``l1ra``; each is None if the settings do not request it."""

    plan: Plan | None
    ranks: RankRedistribution | None


def check(
    trainer: Trainer, settings: LayerselConfig, resume_from: str | None, continues_adapter: bool, checked: bool
) -> Start:
    """Check the run before its model is changed or scored; a collective call. See ``prepare_trainer``."""
    run = Run.of(trainer)
    lora = describe_lora(run.config)
    settings = settings.drop_unread() if checked else pass_over_unread(settings)
    check_trainers_alike(run, settings, resume_from, continues_adapter)
    if not checked:
        collectives.decide_on_rank_zero(lambda: check_output(run.output_dir, OUTPUT_FILES))
    if resume_from is not None and not checked:
        if not isinstance(resume_from, str | os.PathLike) or not str(resume_from):
            raise LayerselError(
                f"resume_from: {resume_from!r} is not a path. Give the folder of a checkpoint, or None."
            )
        check_resumable(resume_from, settings, type(run.engine))
        collectives.decide_on_rank_zero(lambda: check_resumed(settings, resume_from))
    resumed_step = None
    if resume_from is not None:
        has_plan = settings.selection is not None
        resumed_step = collectives.decide_on_rank_zero(lambda: check_lora(resume_from, lora, "lora", has_plan))
    run.engine.check_storage(moves_state(settings.model_dump(exclude_none=True)))
    check_target_parameters(run)
    return Start(run, settings, resume_from, resumed_step, continues_adapter, lora)


def initialize(start: Start) -> None:
    """Set up the trainer, and initialise the weights that are scored and trained; a collective call."""
    run = start.run
    run.engine.take_over_checkpointing()
    trainers.report_lost_gradients(run.trainer, run.base)
    trainers.initialize_loaders(run.trainer, outlive_signals)
    complete_config(run)
    preserve_trained(run.model)
    check_trains(run)  # before minutes are spent on scoring
    if not start.continues_adapter and start.resume_from is None:
        check_untrained(run)
    seeded = not start.continues_adapter and initialize_lora(run.model, run.trainer.args.seed)
    if collectives.get_rank() == 0:
        state = "drawn from the seed" if seeded else "are kept as they were loaded"
        LOG.info("layersel: initial LoRA weights %s", state)
    share_new_weights(run, start.continues_adapter)


def decide(start: Start, lora_r: int | None, scaling: float | None, repeat: int) -> Decision:
    """Make room for higher ranks, then choose the layers and change the model accordingly; a collective call.

    See ``prepare_trainer`` for the other arguments.
    """
    run, selection, l1ra = start.run, start.settings.selection, start.settings.l1ra
    # The room comes first, because the weights may be sharded after a search.
    least = find_planned_room(start.settings, start.resume_from, lora_r or run.config.r)
    exponent = collectives.decide_on_rank_zero(lambda: find_exponent(start.settings, start.resume_from))
    capacity = make_room(run, l1ra, lora_r, scaling, least, exponent) if l1ra else None
    plan = None
    if selection:
        given = start.settings.scaling_exponent
        plan = select_layers(run, selection, start.resume_from, start.continues_adapter, repeat, capacity, given)
        if collectives.get_rank() == 0:
            # The other processes must not wait for this one.
            place = plan_path(run.output_dir)
            with warning_instead("the plan cannot be printed", f"The run goes on; the plan is in {place}."):
                print_plan(plan)
        check_trains(run)
    ranks = RankRedistribution(run, l1ra, capacity, exponent) if l1ra and capacity else None
    if ranks and start.resume_from is None:
        ranks.check_movable()
    return Decision(plan, ranks)


def apply(start: Start, decision: Decision) -> Readiness:
    """Make the trainer train, resume and load its best model as decided, and return its check of the adapter."""
    run, ranks, resume_from = start.run, decision.ranks, start.resume_from
    trainer, kind = run.trainer, type(run.engine)
    readiness = Readiness(run)
    trainers.call_before_training(trainer, readiness.check_start)
    restore = ranks.restore_weights if ranks else functools.partial(restore_plain_adapter, run)
    trainer.add_callback(RestoreCallback(run, resume_from, start.resumed_step, restore))
    check_loaded = functools.partial(check_best, settings=start.settings, kind=kind)
    trainers.restore_best_model_by(trainer, functools.partial(holds, engine=run.engine), restore, check_loaded)
    trainers.respect_stop_before_first_step(trainer)
    nodes.explain_lost_processes(trainer)
    if resume_from:
        # An uninterrupted run has no such evaluation, and early stopping would count it.
        trainer.args.eval_on_start = False
    if ranks:
        if resume_from:
            ranks.check(resume_from, RESUMED_KEY)
        trainer.add_callback(RankCallback(ranks, resume_from))
    return readiness


def record(start: Start, decision: Decision, readiness: Readiness, given: dict[str, Any]) -> None:
    """Draw and send the plan, make every save complete, and remove leftovers of earlier runs; a collective call.

    ``given``: see ``contents.write_record``.
    """
    run, ranks, resume_from = start.run, decision.ranks, start.resume_from
    trainer = run.trainer
    writer = AdapterWriter(run, ranks.fold if ranks else None, readiness)
    is_complete = functools.partial(is_resumable, settings=start.settings, kind=type(run.engine))
    foreign = list_foreign_files(start.settings, run.output_dir, resume_from is not None)
    pictures = RunPictures(run.output_dir, decision.plan, run.config.base_model_name_or_path)
    if collectives.get_rank() == 0:
        pictures.draw_plan()
    if decision.plan:
        trainer.add_callback(TrackerCallback(run, decision.plan))
    if ranks:
        trainer.add_callback(RankTableCallback(ranks, pictures))
    trainer.add_callback(TidyCallback(run, foreign, resume_from, is_complete))
    trainer.add_callback(ShareCallback(run, list_records()))
    trainer.add_callback(InterruptCallback(run, writer, resume_from))  # must be the last one
    trainers.call_if_training_fails(trainer, WATCH.restore)  # the process may live on, as a notebook's does
    block = start.settings.model_dump(mode="json", exclude_none=True)
    recipe = Recipe(block, trainer.args.seed, find_versions())
    saves = RunSaves(run, writer, decision.plan, ranks, start.lora, given, recipe)
    saves.install()
    vars(trainer)["save_adapter"] = saves.save
    remove_leftovers(run)


# --- Steps of the phases ------------------------------------------------------------------------------------------


def pass_over_unread(settings: LayerselConfig) -> LayerselConfig:
    """Return the settings without unread keys, after a warning that lists them on process 0."""
    unread = describe_unread(settings)
    if unread and collectives.get_rank() == 0:
        LOG.warning("layersel: %s", unread)
    return settings.drop_unread()


def check_resumed(settings: LayerselConfig, resume_from: str | None, given: dict[str, Any] | None = None) -> None:
    """Raise LayerselError unless a checkpoint has the run's LoRA settings, and ranks exactly if the run has ``l1ra``.

    ``given``: the LoRA settings of the YAML file.
    """
    if resume_from is None:
        return
    check_lora(resume_from, given or {}, "given", has_plan=settings.selection is not None)
    if settings.l1ra:
        state = read_state(resume_from, settings.l1ra, RESUMED_KEY)
        check_exponent(state, find_exponent(settings, resume_from), resume_from)
    elif state_path(resume_from).exists():
        raise LayerselError(
            f"resume_from_checkpoint: {resume_from} is of a run with layersel.l1ra, without which its adapter does not "
            "fit. Restore the l1ra block, or start from the adapter with lora_model_dir."
        )


def find_exponent(settings: LayerselConfig, resume_from: str | None) -> float:
    """Return how the scaling of modules follows their rank, by the settings or the plan that the run uses again."""
    if settings.scaling_exponent is not None:
        return settings.scaling_exponent
    reused = read_reused(settings.selection, resume_from) if settings.selection else None
    return reused.plan.scaling_exponent if reused else 0.0


def find_planned_room(settings: LayerselConfig, resume_from: str | None, lora_r: int) -> int:
    """Return the highest rank that the checkpoint, the plan or the selection needs, 0 if none; a collective call."""
    moving, selection = settings.l1ra, settings.selection
    if moving is None:
        return 0
    if resume_from is not None:
        return collectives.decide_on_rank_zero(lambda: read_state(resume_from, moving, RESUMED_KEY).max_rank)
    if selection is None:
        return 0
    reused = collectives.decide_on_rank_zero(lambda: read_reused(selection, None))
    if reused:
        return find_room(reused[0].ranks.values())
    return selection.max_rank or find_matched_room(selection, lora_r)


def list_foreign_files(settings: LayerselConfig, output_dir: Path, resumes: bool) -> list[Path]:
    """Return the files of this package in a run's folder that this run has not written.

    ``resumes``: whether the run resumes, and may have written the pictures of ``l1ra`` before.
    """
    ranks = [] if settings.l1ra else [ranks_path(output_dir)]
    if settings.selection:  # it has written its plan already, and written or removed gates and pictures
        return ranks
    pictures = [path for path in list_pictures(output_dir) if not (resumes and path.stem == ranks_path("").stem)]
    return [*ranks, plan_path(output_dir), gates_path(output_dir), *pictures]


def restore_plain_adapter(run: Run, checkpoint: str) -> None:
    """Write the plain adapter of ``checkpoint`` into the model in training; a collective call."""
    restore_live_adapter(run, Path(checkpoint) / SAFETENSORS_WEIGHTS_NAME)
