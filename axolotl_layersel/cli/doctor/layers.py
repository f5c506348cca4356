"""The candidates of the choice, and the parameters that train."""

from axolotl_layersel.cli.doctor.case import Case, Fact
from axolotl_layersel.cli.doctor.model import Model


def describe_candidates(case: Case, model: Model) -> list[Fact]:
    """Return the layers and LoRA modules that the run chooses among."""
    stack, settings = model.stack, case.selection
    carrying = len(stack.lora_modules)
    inside = sum(map(len, stack.lora_modules.values()))
    outside = sum(map(len, stack.towers.values()))
    facts = [
        Fact("layers", carrying, f"{carrying} of the model's {len(stack.layers)} layers have LoRA."),
        Fact("modules", inside, f"These layers have {inside:,} LoRA modules."),
    ]
    if outside:
        facts.append(Fact("modules_outside", outside, f"{outside:,} further LoRA modules are outside of the layers."))
    if settings is None or model.units is None:
        return facts
    units, kind = len(model.units), settings.granularity
    choice = case.choice
    if choice is not None and choice.kept is not None:
        text = f"{choice.kept} of {units} candidate {kind}s are kept."
        if settings.rank_allocation == "score":
            text = f"{units} candidate {kind}s share the budget of rank by their scores, and may get none."
    else:
        text = f"The gates decide how many of {units} candidate {kind}s are kept."
    facts.append(Fact("candidates", {"unit": kind, "count": units, "kept": choice and choice.kept}, text))
    return facts


def describe_parameters(case: Case, model: Model) -> list[Fact]:
    """Return the LoRA parameters of plain LoRA and of the choice."""
    choice = case.choice
    assert choice is not None, "the case has a model"
    facts = [Fact("plain", choice.plain, f"Plain LoRA trains {choice.plain:,} parameters.")]
    if case.block.selection is not None and case.block.selection.plan is not None:
        return [*facts, Fact("chosen", None, "The plan decides how many of them train.")]
    if case.block.selection is not None:
        text = f"The choice trains {format_range(choice.least, choice.most)} of LoRA's parameters."
        facts.append(Fact("chosen", {"least": choice.least, "most": choice.most}, text))
    if case.block.l1ra is not None:
        room = count_room(case, model)
        text = f"With l1ra every module has memory for rank {case.max_rank}: {format_range(room, room)} parameters."
        facts.append(Fact("room", room, text))
    saved = sum(each.numel() for name, each in model.base_parameters.items() if each.requires_grad)
    if saved:
        facts.append(Fact("whole", saved, f"lora_modules_to_save: {saved:,} further parameters train."))
    return facts


def count_room(case: Case, model: Model) -> int:
    """Return the LoRA parameters that have memory while the run trains."""
    choice = case.choice
    assert choice is not None, "the case has a model"
    if case.block.l1ra is None:
        return choice.most
    if choice.kept is None:
        return case.max_rank * sum(model.component_sizes.values())
    return case.max_rank * sum(model.component_sizes[name] for name in choice.modules)


def format_range(least: int, most: int) -> str:
    """Return one number, or two that a number lies between."""
    return f"{most:,}" if least == most else f"{least:,} to {most:,}"
