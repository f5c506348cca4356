"""The sentence about the backward pass that a plan saves."""

import pytest
from helpers.plans import make_plan

from axolotl_layersel.reports.savings import describe_savings, describe_step_time, format_share
from axolotl_layersel.selection.plan import LayerChoice, StepTime


@pytest.mark.parametrize(
    ("selected", "end", "sentence"),
    [
        ((0, 7), 0, "layer 0 is kept: the backward pass is as long as before"),
        ((0, 7), None, "layer 0 is kept: the backward pass is as long as before"),
        ((5, 7), 5, "the backward pass ends at layer 5: 5 of 24 layers (21 %) have none"),
        ((23,), 23, "the backward pass ends at layer 23: 23 of 24 layers (96 %) have none"),
        ((5, 7), 0, "weights outside of the layers train: the backward pass is as long as before"),
        ((5, 7), 3, "the backward pass ends at layer 3: 3 of 24 layers (12 %) have none"),
        ((5, 7), None, "layer 5 is the lowest that is kept"),
        ((5, 7), 6, "layer 5 is the lowest that is kept"),
    ],
)
def test_the_saved_backward_pass_is_told(selected, end, sentence):
    plan = make_plan([float(layer) for layer in range(24)], selected, backward_end=end)
    assert describe_savings(plan) == sentence


def test_layers_of_several_lists_are_counted_in_the_order_that_they_run():
    names = [f"{side}.{number}" for side in ("encoder", "decoder") for number in range(4)]
    layers = [LayerChoice(layer=name, score=0.5, selected=name == "decoder.1") for name in names]
    stack = {"encoder": "encoder.block", "decoder": "decoder.block"}
    plan = make_plan(stack=stack, modules=["decoder.block.1.q"], backward_end="decoder.1")
    plan.layers = layers
    assert describe_savings(plan) == "the backward pass ends at layer decoder.1: 5 of 8 layers (62 %) have none"


@pytest.mark.parametrize(
    ("part", "total", "share"), [(0, 3, "0 %"), (1, 300, "1 %"), (2, 3, "67 %"), (299, 300, "99 %"), (3, 3, "100 %")]
)
def test_a_share_is_zero_or_whole_only_if_it_is(part, total, share):
    assert format_share(part, total) == share


def test_the_time_of_a_step_and_the_gain_of_its_ranks_are_told():
    time = "a step takes 0.74 of plain LoRA's time, by the operations of its matrix products"
    step = StepTime(share=0.741, gain=0.913, checkpointing=True, tokens=80)
    assert (
        describe_step_time(step) == f"{time}, and its ranks promise 0.91 of the first-order gain of ranks in all layers"
    )
    nothing = step.model_copy(update={"gain": None})
    assert describe_step_time(nothing) == f"{time}, and no gain of rank is above noise"
