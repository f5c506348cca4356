"""Make a trainer ready: select layers, prepare for redistributing rank, keep its checkpoints complete."""

import functools
import logging
import os
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import Trainer

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.files import check_output
from axolotl_layersel.common.paths import gates_path, plan_path, ranks_path, state_path
from axolotl_layersel.config.engines import moves_state
from axolotl_layersel.config.l1ra import find_room
from axolotl_layersel.config.root import LayerselConfig, describe_unread
from axolotl_layersel.config.selection import find_matched_room
from axolotl_layersel.engines import collectives, trainers
from axolotl_layersel.engines.signals import outlive_signals
from axolotl_layersel.l1ra.callback import RankCallback
from axolotl_layersel.l1ra.capacity import make_room
from axolotl_layersel.l1ra.redistribution import RankRedistribution
from axolotl_layersel.l1ra.state import read_state
from axolotl_layersel.lora import adapters
from axolotl_layersel.lora.readiness import Readiness, check_trains
from axolotl_layersel.lora.run import Run
from axolotl_layersel.lora.writer import AdapterWriter
from axolotl_layersel.selection.plan import Plan
from axolotl_layersel.selection.select import read_reused, select_layers
from axolotl_layersel.training import nodes
from axolotl_layersel.training.callbacks import InterruptCallback, RestoreCallback, ShareCallback, TidyCallback
from axolotl_layersel.training.checkpoints import check_best, check_resumable, holds, is_resumable
from axolotl_layersel.training.contents import check_lora, describe_lora
from axolotl_layersel.training.leftovers import remove_leftovers
from axolotl_layersel.training.process_agreement import check_trainers_alike, share_new_weights
from axolotl_layersel.training.saving import complete_saves, list_records

LOG = logging.getLogger("axolotl.layersel")
RESUMED_KEY = "resume_from_checkpoint"
# What a run writes into its folder.
OUTPUT_FILES = [path("").name for path in (plan_path, ranks_path, gates_path)]


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
    """Make a trainer ready: choose the layers that keep LoRA, and let rank move while it trains.

    For a plain ``transformers.Trainer``, or a class made of it. The Axolotl plugin calls this function too::

        model = get_peft_model(base, LoraConfig(r=8, task_type="SEQ_CLS", target_modules=["query", "value"]))
        trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator)
        plan = prepare_trainer(trainer, LayerselConfig(selection=SelectionConfig(method="cka", ratio=0.5)))
        trainer.train()
        trainer.save_model()

    Call it once, after the trainer was built and before it trains or makes its optimizer; where there are several
    processes, on each of them. The model is scored as it is, and changed in place: unselected layers lose their
    adapter, or keep it untrained. New LoRA weights are drawn again from ``trainer.args.seed``. ``modules_to_save``,
    such as the classifier that PEFT adds for ``SEQ_CLS``, train and are saved as without this.

    ``trainer.train()`` then trains, and Ctrl-C and SIGTERM end it as docs/checkpoints.md says. ``trainer.save_model``,
    the model's ``save_pretrained`` and every checkpoint leave a plain PEFT adapter that has been read back and compared
    with the model, with the plan beside it. ``trainer.save_adapter(folder)`` saves as a checkpoint does, on every
    engine; all ranks must call it.

    Args:
        trainer: a Trainer whose model is a PEFT model with one LoRA adapter. Methods that score read its
            ``train_dataset``, whose rows have ``input_ids`` and, as the Trainer drops what the model does not take,
            ``attention_mask``, ``token_type_ids`` and labels.
        settings: what the ``layersel`` block of a YAML file holds.
        resume_from: the checkpoint that the run resumes from: its plan is used, and nothing is scored. Give
            ``trainer.train(resume_from_checkpoint=…)`` the same.
        continues_adapter: the LoRA weights are a trained adapter's, and stay as they are.
        lora_r: with ``l1ra``, the rank that ``max_rank`` is derived from; default: the adapter's.
        scaling: with ``l1ra``, the scaling that all modules get; default: the adapter's.
        repeat: with ``selection``, choose with so many seeds, to say how far they agree; the first is the plan.
        checked: ``output_dir`` and ``resume_from`` were looked through before, and keys that are not read were named,
            as the plugin does before the model loads.
        given: the settings of LoRA in the plugin's YAML file, which checkpoints remember.

    Returns:
        The plan, where layers are selected, else None. It is printed, and written to
        ``<output_dir>/layersel/plan.json``.

    Raises:
        LayerselError: on every rank, where something cannot be honoured; a ``ValueError`` of one sentence.
    """
    if "save_adapter" in vars(trainer):
        raise LayerselError(
            "trainer: prepare_trainer was called for it before, and what it chose is in the model. Build the model and "
            "the trainer anew to choose again."
        )
    run = Run.of(trainer)
    lora = describe_lora(run.config)  # which changes below
    settings = settings.drop_unread() if checked else pass_over_unread(settings)
    check_trainers_alike(run, settings, resume_from, continues_adapter)
    if not checked:
        collectives.decide_on_rank_zero(lambda: check_output(run.output_dir, OUTPUT_FILES))
    if resume_from is not None and not checked:
        if not isinstance(resume_from, str | os.PathLike) or not str(resume_from):
            raise LayerselError(f"resume_from: {resume_from!r} is no path. Give the folder of a checkpoint, or None.")
        check_resumable(resume_from, settings, type(run.engine))
        collectives.decide_on_rank_zero(lambda: check_resumed(settings, resume_from))
    resumed_step = None
    if resume_from is not None:
        has_plan = settings.selection is not None
        resumed_step = collectives.decide_on_rank_zero(lambda: check_lora(resume_from, lora, "lora", has_plan))
    run.engine.take_over_checkpointing()
    trainers.report_lost_gradients(trainer, run.base)
    run.engine.check_storage(moves_state(settings.model_dump(exclude_none=True)))
    adapters.check_target_parameters(run)
    adapters.complete_config(run)
    adapters.keep_trained_alone(run.model)
    check_trains(run)  # before minutes are spent on scores
    seeded = not continues_adapter and adapters.initialize_lora(run.model, trainer.args.seed)
    LOG.info("layersel: initial LoRA weights %s", "drawn from the seed" if seeded else "are kept as they were loaded")
    share_new_weights(run, continues_adapter)
    # This comes first, because the weights may lie in shards after a search.
    least = find_planned_room(settings, resume_from, lora_r or run.config.r)
    capacity = make_room(run, settings.l1ra, lora_r, scaling, least) if settings.l1ra else None
    trainers.initialize_loaders(trainer, outlive_signals)
    plan = None
    if settings.selection:
        plan = select_layers(run, settings.selection, resume_from, continues_adapter, repeat, capacity)
        check_trains(run)
    ranks = RankRedistribution(run, settings.l1ra, capacity) if settings.l1ra and capacity else None
    if ranks and resume_from is None:
        ranks.check_movable()
    readiness = Readiness(run)
    trainers.call_before_training(trainer, readiness.check_start)
    restore = ranks.restore_weights if ranks else functools.partial(restore_plain_adapter, run)
    trainer.add_callback(RestoreCallback(run, resume_from, resumed_step, restore))
    check = functools.partial(check_best, settings=settings, kind=type(run.engine))
    trainers.restore_best_model_by(trainer, functools.partial(holds, engine=run.engine), restore, check)
    trainers.respect_stop_before_first_step(trainer)
    nodes.explain_lost_processes(trainer)
    if resume_from:
        # A run that was not killed had no such evaluation, and early stopping would count it.
        trainer.args.eval_on_start = False
    if ranks:
        if resume_from:
            ranks.check(resume_from, "resume_from_checkpoint")
        trainer.add_callback(RankCallback(ranks, resume_from))
    writer = AdapterWriter(run, ranks.fold if ranks else None, readiness)
    is_complete = functools.partial(is_resumable, settings=settings, kind=type(run.engine))
    trainer.add_callback(TidyCallback(run, list_foreign_files(settings, run.output_dir), resume_from, is_complete))
    trainer.add_callback(ShareCallback(run, list_records()))
    trainer.add_callback(InterruptCallback(run, writer, resume_from))
    vars(trainer)["save_adapter"] = complete_saves(run, writer, plan, ranks, lora, given or {})
    remove_leftovers(run)
    return plan


def pass_over_unread(settings: LayerselConfig) -> LayerselConfig:
    """Return the settings without the keys that nothing reads, and log a warning that lists them, on rank 0."""
    unread = describe_unread(settings)
    if unread and collectives.get_rank() == 0:
        LOG.warning("layersel: %s", unread)
    return settings.drop_unread()


def check_resumed(settings: LayerselConfig, resume_from: str | None, given: dict[str, Any] | None = None) -> None:
    """Raise LayerselError unless a checkpoint's ranks can be restored, or there are none to restore.

    ``given``: the settings of LoRA in the YAML file, with which the checkpoint must have been made.
    """
    if resume_from is None:
        return
    check_lora(resume_from, given or {}, "given", has_plan=settings.selection is not None)
    if settings.l1ra:
        read_state(resume_from, settings.l1ra, RESUMED_KEY)
    elif state_path(resume_from).exists():
        raise LayerselError(
            f"resume_from_checkpoint: {resume_from} is of a run with layersel.l1ra, without which its adapter does not "
            "fit. Restore the l1ra block, or start from the adapter with lora_model_dir."
        )


def find_planned_room(settings: LayerselConfig, resume_from: str | None, lora_r: int) -> int:
    """Return the rank that ``l1ra`` needs room for by default beyond its own, 0 where it does; a collective call.

    A resumed run has the room that its checkpoint had. Otherwise a plan's ranks, or those that a selection may give,
    say how much it takes.
    """
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


def list_foreign_files(settings: LayerselConfig, output_dir: Path) -> list[Path]:
    """Return the files of this package in a run's folder that would be an earlier run's."""
    ranks = [] if settings.l1ra else [ranks_path(output_dir)]
    # A run that selects has written its plan by then, and with it the course of a search, or removed that.
    return ranks if settings.selection else [*ranks, plan_path(output_dir), gates_path(output_dir)]


def restore_plain_adapter(run: Run, checkpoint: str) -> None:
    """Write the plain adapter of ``checkpoint`` into the model in training; every rank must call this."""
    adapters.restore_live_adapter(run, Path(checkpoint) / SAFETENSORS_WEIGHTS_NAME)
