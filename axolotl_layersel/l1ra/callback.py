"""The trainer callback that restores, steps and finishes the ranks of a run."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.l1ra.redistribution import RankRedistribution

UNPREPARED = (
    "resume_from_checkpoint: the trainer resumes, but was prepared without saying from where. Give `prepare_trainer` "
    "the checkpoint as `resume_from`."
)


class RankCallback(TrainerCallback):
    """Calls ``RankRedistribution`` at the start, after every optimizer step, and at the end of training."""

    def __init__(self, ranks: RankRedistribution, resume_from: str | None) -> None:
        self.ranks = ranks
        self.resume_from = resume_from

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.ranks.check_start(state.global_step)
        if state.global_step > 0:
            if self.resume_from is None:
                raise LayerselError(UNPREPARED)
            self.ranks.restore(self.resume_from)
        self.ranks.start(state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # Check gates when the trainer itself waits for the device, and before a checkpoint is written.
        look = control.should_log or control.should_evaluate or control.should_save or control.should_training_stop
        self.ranks.step(state.global_step, look)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint:
            self.ranks.restore_gates(state.best_model_checkpoint, "load_best_model_at_end")
        self.ranks.finish(state.global_step)
