"""The time of a training step relative to plain LoRA's, see ``lora.step_time``."""

from collections.abc import Mapping

from axolotl_layersel.cli.doctor.case import Case, Fact
from axolotl_layersel.cli.doctor.model import Model
from axolotl_layersel.config.strict_block import as_mapping, as_whole
from axolotl_layersel.lora.step_time import count_work, find_relative

# The lowest kept layers that are shown if the settings do not determine it, as shares of the number of layers.
SHOWN = (0.0, 0.25, 0.5, 0.75)


def describe_time(case: Case, model: Model) -> list[Fact]:
    """Return the time of a step relative to plain LoRA's."""
    checkpointing = bool(case.data.get("gradient_checkpointing"))
    reentrant = as_mapping(case.data.get("gradient_checkpointing_kwargs")).get("use_reentrant") is True
    tokens = as_whole(case.data.get("sequence_len")) or 512
    work = count_work(model.base, model.stack, model.sizes, tokens)
    places = sorted(model.stack.lora_modules)
    lowest = case.lowest
    if lowest is None and case.choice is not None:
        lowest = case.choice.lowest
    asked = [lowest] if lowest is not None else [places[int(share * len(places))] for share in SHOWN] + [places[-1]]
    how = "with" if checkpointing else "without"
    facts = [
        Fact(
            "formula",
            {"checkpointing": checkpointing, "tokens": tokens},
            f"Matrix products of a step {how} gradient checkpointing, relative to plain LoRA's, in rows of {tokens} "
            "tokens. docs/doctor.md has the formula.",
        )
    ]
    for place in asked:
        share = find_relative(work, place, set(places), checkpointing, reentrant)
        facts.append(
            Fact(
                f"lowest_{model.stack.names[place]}",
                round(share, 4),
                f"If layer {model.stack.names[place]} is the lowest that is kept: {share:.2f}.",
            )
        )
    if case.selection is not None and case.selection.time is not None:
        shares = {place: find_relative(work, place, set(places), checkpointing, reentrant) for place in places}
        facts.append(describe_limit(model, shares, case.selection.time))
    return facts


def describe_limit(model: Model, shares: Mapping[int, float], time: float) -> Fact:
    """Return which layers can be the lowest with ``time``; ``shares``: the time of a step by the lowest kept layer."""
    within = [place for place, share in shares.items() if share <= time]
    if not within:
        text = f"No layer reaches `time: {time}`: the shortest step takes {min(shares.values()):.2f} of plain LoRA's."
        return Fact("limit", {"time": time, "lowest": None}, text)
    name = model.stack.names[min(within)]
    text = f"`time: {time}` asks for layer {name} or a higher one as the lowest that is kept. The gains decide which."
    return Fact("limit", {"time": time, "lowest": name}, text)
