"""The callbacks of every run of this package. They only delegate."""

import logging
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from axolotl_layersel.common.errors import LayerselError, warning_instead
from axolotl_layersel.common.paths import ranks_path
from axolotl_layersel.engines import collectives, trainers
from axolotl_layersel.engines.signals import WATCH, SharedSignal, leave
from axolotl_layersel.l1ra.callback import UNPREPARED
from axolotl_layersel.l1ra.redistribution import RankRedistribution
from axolotl_layersel.lora.run import Run
from axolotl_layersel.lora.writer import AdapterWriter
from axolotl_layersel.reports.pictures import RunPictures
from axolotl_layersel.reports.rank_table import print_ranks
from axolotl_layersel.reports.trackers import send_plan
from axolotl_layersel.selection.plan import Plan
from axolotl_layersel.training import nodes
from axolotl_layersel.training.leftovers import find_surplus, remove

LOG = logging.getLogger("axolotl.layersel")


@dataclass(eq=False)
class RestoreCallback(TrainerCallback):
    """Restores callbacks and FSDP2's LoRA weights when a run resumes, and stops a run that had already ended.

    Upstream restores FSDP2's LoRA weights on one process only, and does not restore the counters of callbacks.
    """

    run: Run
    resume_from: str | None
    resumed_step: int | None  # of that checkpoint
    restore: Callable[[str], None]  # writes the LoRA weights of a checkpoint into the sharded model
    has_trained: bool = False  # whether `trainer.train` was called before

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.resumed_step not in (None, state.global_step):
            raise LayerselError(
                f"resume_from_checkpoint: the trainer begins at step {state.global_step}, and was prepared to resume "
                f"from {self.resume_from}, which is of step {self.resumed_step}. Give `trainer.train` the same "
                "checkpoint as `prepare_trainer`."
            )
        self.resumed_step = None  # a later call of `trainer.train` may begin anew
        has_trained, self.has_trained = self.has_trained, True
        if state.global_step == 0:
            return
        # The checkpoint has a choice of layers of its own, unless this trainer or a plain one has written it.
        is_another_choice = trainers.NOTE in (state.stateful_callbacks or {}) and not has_trained
        if self.resume_from is None and (is_another_choice or not self.run.engine.restores_lora):
            raise LayerselError(UNPREPARED)
        callbacks = self.run.trainer.callback_handler.callbacks
        trainers.restore_callbacks(callbacks, state)
        if not self.run.engine.restores_lora and self.resume_from:
            self.restore(self.resume_from)
        if has_ended(state, callbacks):
            LOG.info("layersel: the run has ended at step %d already; nothing is trained", state.global_step)
            control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not self.run.engine.restores_lora and args.load_best_model_at_end and state.best_model_checkpoint:
            self.restore(state.best_model_checkpoint)


def has_ended(state: TrainerState, callbacks: list[TrainerCallback]) -> bool:
    """Return whether the resumed run had reached its last step, or had been stopped early."""
    stopping = [callback for callback in callbacks if isinstance(callback, EarlyStoppingCallback)]
    return state.global_step >= state.max_steps or any(
        callback.early_stopping_patience_counter >= callback.early_stopping_patience for callback in stopping
    )


@dataclass(eq=False)
class TidyCallback(TrainerCallback):
    """Removes files of earlier runs from the folder as training begins, when no check of this run can fail any more."""

    run: Run
    paths: list[Path]  # files that this run does not write
    resume_from: str | None
    is_complete: Callable[[Path], bool]  # whether this process could resume from a checkpoint

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        for path in self.paths if collectives.get_rank() == 0 else []:
            if path.is_file():
                remove(path, "is an earlier run's")
        if state.global_step > 0 and args.should_save:
            self.keep_to_limit(args.save_total_limit, state)

    def keep_to_limit(self, limit: int | None, state: TrainerState) -> None:
        """Remove the checkpoints that a killed run had not deleted yet."""
        best = [Path(state.best_model_checkpoint).name] if state.best_model_checkpoint else []
        resumed = [Path(self.resume_from).name] if self.resume_from else []
        protected = {f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", *resumed, *best}
        try:
            surplus = find_surplus(self.run.output_dir, limit, protected, self.is_complete)
        except OSError as error:  # the other processes must not wait for this one
            LOG.warning("layersel: save_total_limit: not all checkpoints can be read, and all are kept (%s)", error)
            return
        for path in surplus:
            remove(path, f"is one checkpoint more than save_total_limit: {limit}")


@dataclass(eq=False)
class TrackerCallback(TrainerCallback):
    """Sends the plan to the run's trackers as training begins, once; a resumed run has sent it before."""

    run: Run
    plan: Plan
    sent: bool = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if collectives.get_rank() == 0 and state.global_step == 0 and not self.sent:
            self.sent = True
            send_plan(self.run.trainer.callback_handler.callbacks, self.plan, self.run.output_dir)


@dataclass(eq=False)
class RankTableCallback(TrainerCallback):
    """Prints and draws the ranks that ``l1ra`` ended with, after the callback that decides them."""

    ranks: RankRedistribution
    pictures: RunPictures

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if collectives.get_rank() == 0:
            history = self.ranks.history
            folder = self.pictures.folder
            with warning_instead("the ranks cannot be printed", f"The run goes on; they are in {ranks_path(folder)}."):
                print_ranks(history.ranks[0], history.ranks[max(history.ranks)])
            self.pictures.draw_ranks(history)


@dataclass(eq=False)
class ShareCallback(TrainerCallback):
    """Copies the files that process 0 has written about the run to every node at its end."""

    run: Run
    names: list[str]  # of the files in the run's folder

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        nodes.share_files(self.run, self.run.output_dir, self.names)


class InterruptCallback(TrainerCallback):
    """Ends the run on Ctrl-C or SIGTERM, on all processes together.

    Ctrl-C saves the adapter as trained so far, and SIGTERM a checkpoint that the run can resume from. This is the last
    callback, so that it restores the earlier signal handlers after all others have finished.
    """

    def __init__(self, run: Run, writer: AdapterWriter, resume_from: str | None = None) -> None:
        self.run = run
        self.writer = writer
        self.resume_from = resume_from
        self.shared = SharedSignal(run.device)
        self.training = False
        self.began_at = 0
        self.terminated = False
        self.may_leave = True

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        WATCH.install()
        self.shared = SharedSignal(args.device)
        self.training, self.began_at = True, state.global_step
        self.terminated, self.may_leave = False, True
        if state.global_step > 0 and self.resume_from and trainers.is_evaluation_due(self.run.trainer):
            self.make_up_for_evaluation(self.resume_from)

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.handle(self.shared.look())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.handle(self.shared.settle())
        # An evaluation or a save at the end of an epoch belongs to its last step.
        self.may_leave = not ends_epoch(state, control)
        if self.terminated and self.may_leave:
            control.should_save = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.may_leave = True
        if self.terminated:
            control.should_save = True

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # An evaluation may take longer than a launcher waits before it kills. All processes run equally many batches.
        if not self.training:
            return
        self.handle(self.shared.look())
        if self.terminated:
            # The resumed run evaluates first, see ``trainers.is_evaluation_due``.
            if state.global_step > self.began_at:
                self.save_checkpoint()
            self.leave_checkpoint()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # The processes are in step after a save, so a signal during the save needs no further step and save.
        self.handle(self.shared.settle())
        if self.terminated and self.may_leave:
            self.leave_checkpoint()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.training = False
        self.shared.settle()
        WATCH.restore()

    def make_up_for_evaluation(self, checkpoint: str) -> None:
        """Run the evaluation that was due at the step of ``checkpoint``, and write the checkpoint again."""
        trainer = self.run.trainer
        trainers.evaluate(trainer, checkpoint)
        self.save_checkpoint()
        trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)

    def save_checkpoint(self) -> None:
        """Write a complete checkpoint of the last step, between two forward passes."""
        self.run.engine.reshard()
        trainers.save_checkpoint(self.run.trainer)

    def handle(self, signum: int) -> None:
        """Save the adapter and exit on Ctrl-C; on SIGTERM note that the run ends at its next checkpoint."""
        if signum == signal.SIGINT:
            folder = self.run.output_dir
            self.writer.save(folder)
            leave(signum, f"interrupted; the adapter as trained so far is in {folder}")
        self.terminated = self.terminated or signum == signal.SIGTERM

    def leave_checkpoint(self) -> None:
        """Exit after the checkpoint of this step was written; before the first step there is none."""
        trainer = self.run.trainer
        step, folder = trainer.state.global_step, trainer.args.output_dir
        if step == 0:
            leave(signal.SIGTERM, "ended before the first step; nothing was trained, and the same command begins anew")
        leave(signal.SIGTERM, f"ended after step {step}; `auto_resume_from_checkpoints: true` goes on from {folder}")


def ends_epoch(state: TrainerState, control: TrainerControl) -> bool:
    """Return whether the last step ended its epoch or the run."""
    return control.should_training_stop or control.should_epoch_stop or float(state.epoch).is_integer()
