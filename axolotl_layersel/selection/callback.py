"""The callback of layer selection, which only delegates."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from axolotl_layersel.lora.layers import LayerStack
from axolotl_layersel.lora.run import Run
from axolotl_layersel.selection.backward_cut import TruncatedBackward


class LayerSelectionCallback(TrainerCallback):
    """Cuts the backward pass below the lowest layer that trains."""

    def __init__(self, run: Run, stack: LayerStack) -> None:
        self.run = run
        self.stack = stack
        self.truncated: TruncatedBackward | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.truncated is not None:  # training failed, and begins again
            self.truncated.remove()
        self.truncated = TruncatedBackward(self.run.model, self.stack)
        self.truncated.install()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.truncated is not None:
            self.truncated.remove()
