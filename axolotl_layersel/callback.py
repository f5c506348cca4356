"""What layer selection does while the run trains; it only delegates."""

import logging
from pathlib import Path

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from axolotl_layersel import adapters, engines
from axolotl_layersel.interrupt import EXIT_CODE, InterruptFlag
from axolotl_layersel.layers import LayerStack
from axolotl_layersel.plan import Plan
from axolotl_layersel.truncation import TruncatedBackward

LOG = logging.getLogger("axolotl.layersel")


class LayerSelectionCallback(TrainerCallback):
    """Logs the scores, cuts the backward pass, restores FSDP2's adapter, and saves on Ctrl-C."""

    def __init__(self, trainer: Trainer, stack: LayerStack, plan: Plan, resume_from: str | None) -> None:
        self.trainer = trainer
        self.stack = stack
        self.plan = plan
        self.resume_from = resume_from
        self.interrupt = InterruptFlag(trainer.args.device)
        self.training = False
        self.truncated: TruncatedBackward | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model, keep_torch_compile=False)
        if engines.name_engine(self.trainer) == "fsdp2" and state.global_step > 0 and self.resume_from:
            adapters.restore_fsdp_adapter(self.trainer, self.resume_from)
        self.truncated = TruncatedBackward(model, self.stack)
        self.truncated.install()
        self.interrupt.install()
        self.training = True
        if state.global_step == 0:
            self.trainer.log(describe(self.plan))

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
        if engines.name_engine(self.trainer) == "fsdp2" and args.load_best_model_at_end and state.best_model_checkpoint:
            adapters.restore_fsdp_adapter(self.trainer, state.best_model_checkpoint)
        self.training = False
        self.interrupt.restore()
        if self.truncated is not None:
            self.truncated.remove()

    def stop_if_interrupted(self) -> None:
        """Save the adapter on all ranks and leave, if any rank got a SIGINT."""
        if not self.interrupt.is_raised_anywhere():
            return
        folder = Path(self.trainer.args.output_dir)
        adapters.save_adapter(self.trainer, folder)
        if engines.get_rank() == 0:
            LOG.warning("layersel: interrupted; the adapter as trained so far is in %s", folder)
        engines.leave(EXIT_CODE)


def describe(plan: Plan) -> dict[str, float]:
    """Return the plan as numbers for the run's trackers, layers with leading zeros so that they sort."""
    width = len(str(len(plan.layers) - 1))
    numbers: dict[str, float] = {"layersel/selected_layers": len(plan.selected)}
    for choice in plan.layers:
        name = f"{choice.layer:0{width}d}"
        numbers[f"layersel/selected/{name}"] = int(choice.selected)
        if choice.score is not None:
            numbers[f"layersel/score/{name}"] = choice.score
    return numbers
