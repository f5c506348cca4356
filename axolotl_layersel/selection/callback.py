"""The callback of layer selection, which only delegates."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from axolotl_layersel.config.layer_names import split_name
from axolotl_layersel.lora.layers import LayerStack
from axolotl_layersel.lora.run import Run
from axolotl_layersel.selection.backward_cut import TruncatedBackward
from axolotl_layersel.selection.plan import Plan


class LayerSelectionCallback(TrainerCallback):
    """Logs the scores, and cuts the backward pass below the lowest layer that trains."""

    def __init__(self, run: Run, stack: LayerStack, plan: Plan) -> None:
        self.run = run
        self.stack = stack
        self.plan = plan
        self.truncated: TruncatedBackward | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.truncated = TruncatedBackward(self.run.model, self.stack)
        self.truncated.install()
        if state.global_step == 0:
            self.run.trainer.log(describe_plan(self.plan))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.truncated is not None:
            self.truncated.remove()


def describe_plan(plan: Plan) -> dict[str, float]:
    """Return the plan as numbers for the run's trackers; layers have leading zeros so that they sort."""
    width = len(str(max(split_name(choice.layer)[1] for choice in plan.layers)))
    numbers: dict[str, float] = {"layersel/selected_layers": len(plan.selected)}
    if plan.budget is not None:
        numbers["layersel/parameters"] = plan.budget.spent
    for choice in plan.layers:
        side, number = split_name(choice.layer)
        name = f"{side}.{number:0{width}d}".removeprefix(".")
        numbers[f"layersel/selected/{name}"] = int(choice.selected)
        if choice.score is not None:
            numbers[f"layersel/score/{name}"] = choice.score
    return numbers
