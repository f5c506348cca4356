"""What every run of this package needs while it trains; it only delegates."""

import logging
from collections.abc import Callable
from pathlib import Path

from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from axolotl_layersel import engines
from axolotl_layersel.interrupt import EXIT_CODE, InterruptFlag
from axolotl_layersel.writer import AdapterWriter

LOG = logging.getLogger("axolotl.layersel")


class RestoreCallback(TrainerCallback):
    """Restores what upstream leaves out of a resume, and lets a run that had ended end again without a step.

    FSDP2's LoRA weights are restored upstream on one rank only, and what callbacks have counted, not at all.

    Args:
        trainer: whose run it is.
        resume_from: the checkpoint that the run resumes from.
        restore: writes the LoRA weights of a checkpoint into the sharded model.
    """

    def __init__(self, trainer: Trainer, resume_from: str | None, restore: Callable[[str], None]) -> None:
        self.trainer = trainer
        self.resume_from = resume_from
        self.restore = restore

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if state.global_step == 0:
            return
        callbacks = self.trainer.callback_handler.callbacks
        engines.restore_callbacks(callbacks, state)
        if engines.name_engine(self.trainer) == "fsdp2" and self.resume_from:
            self.restore(self.resume_from)
        if has_ended(state, callbacks):
            LOG.info("layersel: the run has ended at step %d already; nothing is trained", state.global_step)
            control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if engines.name_engine(self.trainer) == "fsdp2" and args.load_best_model_at_end and state.best_model_checkpoint:
            self.restore(state.best_model_checkpoint)


def has_ended(state: TrainerState, callbacks: list[TrainerCallback]) -> bool:
    """Return whether the run that is resumed had come to its last step, or been stopped early."""
    stopping = [callback for callback in callbacks if isinstance(callback, EarlyStoppingCallback)]
    return state.global_step >= state.max_steps or any(
        callback.early_stopping_patience_counter >= callback.early_stopping_patience for callback in stopping
    )


class TidyCallback(TrainerCallback):
    """Removes what an earlier run has left in the folder, once nothing of this one can fail before it trains.

    Args:
        paths: files that this run does not write.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        for path in self.paths if engines.get_rank() == 0 else []:
            if path.exists():
                LOG.info("layersel: %s is an earlier run's, and is removed", path)
                path.unlink()


class InterruptCallback(TrainerCallback):
    """Saves on Ctrl-C. The last callback: at the end of training whoever had SIGINT gets it back once all is settled.

    Args:
        trainer: whose run it is.
        writer: writes its adapter.
    """

    def __init__(self, trainer: Trainer, writer: AdapterWriter) -> None:
        self.trainer = trainer
        self.writer = writer
        self.interrupt = InterruptFlag(trainer.args.device)
        self.training = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.interrupt.install()
        self.training = True

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.stop_if_interrupted()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.stop_if_interrupted()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> None:
        # An evaluation may take longer than a launcher waits before it kills; all ranks run as many batches.
        if self.training:
            self.stop_if_interrupted()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.training = False
        self.interrupt.restore()

    def stop_if_interrupted(self) -> None:
        """Save the adapter on all ranks and leave, if any rank got a SIGINT."""
        if not self.interrupt.is_raised_anywhere():
            return
        folder = Path(self.trainer.args.output_dir)
        self.writer.save(folder)
        if engines.get_rank() == 0:
            LOG.warning("layersel: interrupted; the adapter as trained so far is in %s", folder)
        engines.leave(EXIT_CODE)
