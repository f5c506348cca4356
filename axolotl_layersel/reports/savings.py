"""The backward pass and the time that a plan saves, in sentences."""

from axolotl_layersel.selection.plan import Plan, StepTime


def describe_savings(plan: Plan) -> str:
    """Return a sentence, without a full stop, about the length of the backward pass under ``plan``.

    The share is of the number of layers. It is no share of the time, because layers can differ.
    """
    names = [choice.layer for choice in plan.layers]
    lowest, total = plan.selected[0], len(names)
    if lowest == names[0]:
        return f"layer {lowest} is kept: the backward pass is as long as before"
    saved = names.index(lowest if plan.backward_end is None else plan.backward_end)
    if plan.backward_end is None or saved > names.index(lowest):  # an older plan, or one that was edited by hand
        return f"layer {lowest} is the lowest that is kept"
    if not saved:
        return "weights outside of the layers train: the backward pass is as long as before"
    share = f"{saved} of {total} layers ({format_share(saved, total)}) have none"
    return f"the backward pass ends at layer {plan.backward_end}: {share}"


def describe_step_time(step: StepTime) -> str:
    """Return a sentence, without a full stop, about the time of a step and the gain of its ranks."""
    time = f"a step takes {step.share:.2f} of plain LoRA's time, by the operations of its matrix products"
    if step.gain is None:
        return f"{time}, and no gain of rank is above noise"
    return f"{time}, and its ranks promise {step.gain:.2f} of the first-order gain of ranks in all layers"


def format_share(part: int, total: int) -> str:
    """Return a share in per cent, rounded, and never as 0 or 100 unless it is."""
    if 0 < part < total:
        return f"{min(max(round(100 * part / total), 1), 99)} %"
    return f"{100 * part // total} %"
