"""The answer of a comparison: a paragraph that says what to use, tables of at most 80 columns, and the same as JSON."""

import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any

from axolotl_layersel.cli.compare.figures import LORA, RANDOM, Comparison, Failure
from axolotl_layersel.cli.compare.statistics import (
    BELOW,
    BETTER,
    CHANCE,
    OPEN,
    UNCONTROLLED,
    UNKNOWN,
    WORSE,
    Difference,
    Judgement,
)
from axolotl_layersel.cli.compare.summary import ArmSummary, Summary, summarise
from axolotl_layersel.common.progress import format_duration
from axolotl_layersel.common.sizes import format_bytes
from axolotl_layersel.common.tables import Column, lay_out
from axolotl_layersel.common.terminal import clean, enumerate_words

WIDTH = 80
# An arm that takes at most these parts of plain LoRA's costs is worth a sentence, if its loss is hardly higher.
CHEAPER_STEP, SMALLER = 0.9, 0.75
HARDLY = 0.01  # of plain LoRA's loss, for the upper end of the interval
MOST_CHEAPER = 2  # sentences about such arms
EQUAL = 0.005  # a ratio of costs this close to 1 is printed as 1.00
STANDINGS = {
    BETTER: "better",
    CHANCE: "as random",
    UNCONTROLLED: "no random",
    OPEN: "",
    WORSE: "worse",
    UNKNOWN: "",
}


@dataclass(frozen=True)
class Choice:
    """What to use: an arm and its learning rate."""

    arm: str
    rate: float


@dataclass(frozen=True)
class Answer:
    """The answer of a comparison.

    Attributes:
        choice: the arm to use; None if plain LoRA has not been measured.
        sentences: the paragraph that answers.
        tables: the lines of the tables of losses and of costs.
        remarks: sentences about failed cells and about the course of the comparison.
    """

    choice: Choice | None
    sentences: list[str]
    tables: list[str]
    remarks: list[str]

    @property
    def paragraph(self) -> str:
        """The paragraph that answers, in one line."""
        return " ".join(self.sentences)

    def format(self) -> list[str]:
        """Return the tables, the remarks and the paragraph as lines of at most 80 columns, unless a word is longer."""
        remarks = [line for remark in self.remarks for line in wrap(f"- {remark}", "  ")]
        return [*self.tables, *([""] if remarks else []), *remarks, "", *wrap(self.paragraph)]


def find_choice(summary: Summary) -> Choice | None:
    """Return the arm to use with its learning rate; None if plain LoRA has not been measured."""
    best = summary.arms[summary.best]
    return Choice(best.arm, best.rate) if best.cells and best.rate is not None else None


def answer(comparison: Comparison) -> Answer:
    """Return the answer of a comparison, which may have been stopped."""
    summary = summarise(comparison)
    return Answer(
        find_choice(summary),
        list_sentences(comparison, summary),
        [*lay_out_losses(summary), "", *lay_out_costs(summary)],
        list_remarks(comparison),
    )


# --- The paragraph ----------------------------------------------------------------------------------------------------


def list_sentences(comparison: Comparison, summary: Summary) -> list[str]:
    """Return the sentences that answer."""
    provisional = describe_stop(comparison)
    if not summary.lora.cells:
        return [*provisional, *describe_missing_lora(summary.lora)]
    describe_use = describe_plain_lora if summary.best == LORA else describe_winner
    return [
        *provisional,
        *describe_use(comparison, summary),
        *describe_cheaper(summary),
        describe_limits(comparison),
    ]


def describe_missing_lora(lora: ArmSummary) -> list[str]:
    """Return the sentences for a comparison without plain LoRA."""
    sentences = ["Nothing can be said yet, because plain LoRA has no complete run to compare with."]
    if lora.failures:
        sentences.append(f"Its last failure was: {end_sentence(lora.failures[-1].sentence)}")
    return sentences


def describe_winner(comparison: Comparison, summary: Summary) -> list[str]:
    """Return what to use in place of plain LoRA, by how much it is better, how sure that is, and what it costs."""
    best = summary.arms[summary.best]
    assert best.judgement is not None and best.judgement.to_lora is not None, "a better arm has been compared"
    gain = best.judgement.to_lora
    sentences = [
        f"Use {name_arm(best.arm)} at learning rate {format_rate(best.rate)}.",
        f"Its loss on the {comparison.figures[0].test_rows} test rows is {format_share(gain)} plain LoRA's "
        f"({gain.reference + gain.mean:.4f} against {gain.reference:.4f}, {count_seeds(gain.pairs)}, each arm at its "
        "best learning rate).",
        describe_certainty(gain, len(summary.arms) - 1),
    ]
    return [
        *sentences,
        *describe_control(best.judgement),
        *describe_costs(best, summary.lora),
        *describe_time(best, summary),
        *describe_forgetting(best, comparison),
        *describe_others(summary),
    ]


def describe_plain_lora(comparison: Comparison, summary: Summary) -> list[str]:
    """Return that plain LoRA is the answer, and why."""
    lora = summary.lora
    rates = {cell.rate for cell in comparison.figures if cell.arm == LORA}
    best_of = f", the best of {len(rates)} that were tried" if len(rates) > 1 else ""
    sentences = [
        f"Use plain LoRA (rank {comparison.settings.lora_r}) at learning rate {format_rate(lora.rate)}{best_of}."
    ]
    others = [arm for arm in summary.arms.values() if arm.arm != LORA]
    compared = [arm for arm in others if arm.judgement and arm.judgement.to_lora]
    if not others:
        return [*sentences, "No other arm was compared with it."]
    if not compared:
        return [*sentences, "No other arm has a complete run to compare with it."]
    lowest = min(compared, key=lambda arm: find_gain(arm).mean)
    claimed = [arm for arm in compared if find_gain(arm).claim]
    if not claimed:
        one = "One seed cannot tell a difference from noise; `--seeds 3` can."
        few = "Too few cells have ended to tell a difference from noise."
        sentences.append(one if len(comparison.settings.seeds) == 1 else few)
        return [*sentences, f"The lowest loss of the other arms is that of {name_arm(lowest.arm)}, {relate(lowest)}."]
    best = min(claimed, key=lambda arm: find_gain(arm).mean)
    least = min(claimed, key=lambda arm: find_half(find_gain(arm)))
    pairs = find_gain(least).pairs
    return [
        *sentences,
        f"No other arm is better beyond its interval: the lowest loss is that of {name_arm(best.arm)}, "
        f"{relate(best)} ({describe_level(len(others))} {format_interval(find_gain(best), 'claim')}).",
        f"With {pairs} seeds, a gain of less than {format_size(find_gain(least), find_half(find_gain(least)))} cannot "
        "be told from chance.",
    ]


def describe_certainty(gain: Difference, comparisons: int) -> str:
    """Return how sure a gain is."""
    return f"The {describe_level(comparisons)} is {format_interval(gain, 'claim')}."


def describe_level(comparisons: int) -> str:
    """Return the name of an interval that holds together with those of all other arms."""
    return "95 % interval" if comparisons == 1 else f"95 % interval for all {comparisons} comparisons together"


def describe_costs(arm: ArmSummary, lora: ArmSummary) -> list[str]:
    """Return what an arm costs in terms of plain LoRA."""
    assert arm.costs is not None and lora.costs is not None, "both have been measured"
    ratios = (
        arm.costs.parameters / lora.costs.parameters,
        arm.costs.seconds_per_step / lora.costs.seconds_per_step,
        arm.costs.peak_memory_bytes / lora.costs.peak_memory_bytes,
    )
    numbers = f"{enumerate_words(f'{each:.2f}' for each in ratios)} times " * any(abs(r - 1) >= EQUAL for r in ratios)
    choosing = f"; choosing takes {format_duration(arm.costs.seconds_choosing)}" if arm.costs.seconds_choosing else ""
    return [f"Its trainable parameters, step time and peak memory are {numbers}those of plain LoRA{choosing}."]


def describe_time(arm: ArmSummary, summary: Summary) -> list[str]:
    """Return a sentence if plain LoRA is ahead of a better arm at equal time."""
    mine, plain = arm.equal_time_loss, summary.lora.equal_time_loss
    if mine is None or plain is None or summary.equal_seconds is None or mine <= plain:
        return []
    return [
        f"After equal time ({format_duration(summary.equal_seconds)}, the choice of layers included), plain LoRA is "
        f"ahead: its validation loss is {plain:.4f} then, against {mine:.4f}."
    ]


def describe_forgetting(arm: ArmSummary, comparison: Comparison) -> list[str]:
    """Return whether an arm forgets more or less than plain LoRA, if general text was measured."""
    if arm.forgetting is None or arm.forgetting.to_lora is None:
        return []
    difference = arm.forgetting.to_lora
    interval = difference.interval
    file = clean(PurePath(comparison.settings.general or "the general text").name)
    told = f"the loss on {file} is {format_share(difference)} plain LoRA's after training"
    if interval is None or interval.low <= 0 <= interval.high:
        return [f"It is not known to forget more or less than plain LoRA: {told}."]
    return [f"It forgets {'more' if difference.mean > 0 else 'less'} than plain LoRA: {told}."]


def describe_control(judgement: Judgement) -> list[str]:
    """Return whether a random choice of as many layers explains what an arm gains, if the arm chooses by the data."""
    if judgement.standing == UNCONTROLLED:
        return ["Whether its choice of layers matters is not known, because `random` has no complete runs."]
    control = judgement.to_random
    if control is None:
        return []
    told = f"the loss is {format_share(control)} the random choice's"
    interval = f"(95 % interval {format_interval(control, 'interval')})"
    if judgement.standing == CHANCE:
        return [
            f"Whether its choice of layers matters is not known: {told} {interval}, so a random one may be as good on "
            "average. More seeds can tell."
        ]
    return [f"A random choice of layers does not explain it: {told} {interval}."]


def describe_others(summary: Summary) -> list[str]:
    """Return the other arms that are better than plain LoRA."""
    arms = [arm for arm in summary.arms.values() if arm.judgement and arm.judgement.standing in BELOW]
    others = [arm for arm in arms if arm.arm != summary.best]
    if not others:
        return []
    named = enumerate_words(f"`{clean(arm.arm)}` ({format_share(find_gain(arm))})" for arm in others)
    return [f"{named} {'is' if len(others) == 1 else 'are'} better than plain LoRA as well."]


def describe_cheaper(summary: Summary) -> list[str]:
    """Return the arms that cost less than plain LoRA, with a loss that is hardly higher."""
    plain = summary.lora.costs
    found: list[tuple[float, str]] = []
    for arm in summary.arms.values():
        if arm.arm in (LORA, RANDOM, summary.best) or not (plain and arm.costs and arm.judgement):
            continue
        gain = arm.judgement.to_lora
        if gain is None or gain.interval is None or gain.interval.high > HARDLY * abs(gain.reference):
            continue
        step = arm.costs.seconds_per_step / plain.seconds_per_step
        size = arm.costs.parameters / plain.parameters
        savings = [f"takes {step:.2f} times plain LoRA's step time"] if step <= CHEAPER_STEP else []
        savings += [f"has {size:.2f} times plain LoRA's trainable parameters"] if size <= SMALLER else []
        if savings:
            told = f"{format_share(gain)} (95 % interval {format_interval(gain, 'interval')})"
            found.append((min(step, size), f"`{clean(arm.arm)}` {' and '.join(savings)}, for a loss {told}."))
    return [sentence for _, sentence in sorted(found)[:MOST_CHEAPER]]


def describe_limits(comparison: Comparison) -> str:
    """Return what was not tested."""
    steps, real = comparison.settings.steps, comparison.real_steps
    if real is None or steps >= real:
        return f"Each cell trained for the {steps:,} steps of the real run; another split of the data was not tested."
    return (
        f"Each cell trained for {steps:,} steps, which are {format_part(steps, real)} of the real run's "
        f"{real:,}: the order of the arms can change after them. Another split of the data was not tested either."
    )


def describe_stop(comparison: Comparison) -> list[str]:
    """Return that a comparison is not complete."""
    done = len(comparison.cells)
    if done >= comparison.planned:
        return []
    return [f"This is provisional: {done} of {comparison.planned} cells have ended."]


# --- Remarks ----------------------------------------------------------------------------------------------------------


def list_remarks(comparison: Comparison) -> list[str]:
    """Return the notes about the course of a comparison, and its failed cells."""
    return [*comparison.notes, *map(describe_failure, comparison.failures)]


def describe_failure(failure: Failure) -> str:
    """Return a failed cell with its sentence and its log."""
    cell = f"`{failure.arm}` at {format_rate(failure.rate)}, seed {failure.seed}, {failure.steps:,} steps"
    return f"Failed: {cell}: {end_sentence(failure.sentence)} Log: {failure.log}"


def end_sentence(text: str) -> str:
    """Return a text that ends like a sentence."""
    text = text.strip()
    return text if text.endswith((".", "!", "?")) else f"{text}."


# --- Tables -----------------------------------------------------------------------------------------------------------


def lay_out_losses(summary: Summary) -> list[str]:
    """Return the lines of a table of the losses, with at most 80 columns."""
    rows = list(summary.arms.values())
    columns = [
        Column("arm", [arm.arm for arm in rows], left=True),
        Column("rate", [format_rate(arm.rate) for arm in rows]),
        Column("seeds", [str(len(arm.cells)) for arm in rows]),
        Column("test loss", [format_loss(arm.test_loss) for arm in rows]),
        Column("to lora", [show_mean(arm) for arm in rows]),
        Column("95 % interval", [show_interval(arm) for arm in rows]),
        Column("", [show_standing(arm) for arm in rows], left=True),
    ]
    return [line for _, line in lay_out(columns, WIDTH)]


def lay_out_costs(summary: Summary) -> list[str]:
    """Return the lines of a table of the costs, with at most 80 columns."""
    rows = list(summary.arms.values())
    costs = [arm.costs for arm in rows]
    columns = [
        Column("arm", [arm.arm for arm in rows], left=True),
        Column("parameters", [f"{cost.parameters:,.0f}" if cost else "-" for cost in costs]),
        Column("s a step", [f"{format_figure(cost.seconds_per_step)}" if cost else "-" for cost in costs]),
        Column("choosing", [show_choosing(arm) for arm in rows]),
        Column("peak memory", [format_bytes(cost.peak_memory_bytes) if cost else "-" for cost in costs]),
        Column("adapter", [format_bytes(cost.adapter_bytes) if cost else "-" for cost in costs]),
    ]
    if summary.equal_seconds is not None:
        heading = f"loss at {format_duration(summary.equal_seconds)}"
        columns.append(Column(heading, [format_loss(arm.equal_time_loss) for arm in rows]))
    if any(arm.forgetting for arm in rows):
        columns.append(Column("forgets", [show_forgetting(arm) for arm in rows]))
    for name in list_metrics(summary):
        cells = [f"{arm.metrics[name]:.4g}" if name in arm.metrics else "-" for arm in rows]
        columns.append(Column(name, cells))
    return [line for _, line in lay_out(columns, WIDTH)]


def list_metrics(summary: Summary) -> list[str]:
    """Return the names of the metrics that any arm has."""
    return list(dict.fromkeys(name for arm in summary.arms.values() for name in arm.metrics))


def show_mean(arm: ArmSummary) -> str:
    """Return the difference to plain LoRA in per cent, with its sign."""
    if arm.judgement is None:
        return ""
    gain = arm.judgement.to_lora
    return f"{format_signed(gain, gain.mean)}{find_unit(gain)}" if gain else "-"


def show_interval(arm: ArmSummary) -> str:
    """Return the interval of the difference to plain LoRA in per cent."""
    if arm.judgement is None:
        return ""
    gain = arm.judgement.to_lora
    if gain is None or gain.interval is None:
        return "-"
    return " to ".join(format_signed(gain, end) for end in (gain.interval.low, gain.interval.high))


def show_standing(arm: ArmSummary) -> str:
    """Return the standing of an arm in a word."""
    if not arm.cells:
        return "failed" if arm.failures else "not run"
    return STANDINGS[arm.judgement.standing] if arm.judgement else ""


def show_choosing(arm: ArmSummary) -> str:
    """Return the time that the choice of layers took."""
    if arm.costs is None:
        return "-"
    return format_duration(arm.costs.seconds_choosing) if arm.costs.seconds_choosing else "none"


def show_forgetting(arm: ArmSummary) -> str:
    """Return the rise of the loss on the general text."""
    return f"{arm.forgetting.rise:+.4f}" if arm.forgetting else "-"


# --- Words and numbers ------------------------------------------------------------------------------------------------


def name_arm(arm: str) -> str:
    """Return an arm within a sentence."""
    if arm == LORA:
        return "plain LoRA"
    kind, _, rank = arm.partition("@")
    return f"plain LoRA of rank {rank} (`{arm}`)" if kind == LORA and rank.isdecimal() else f"`{clean(arm)}`"


def find_gain(arm: ArmSummary) -> Difference:
    """Return the difference of an arm to plain LoRA, which has been measured."""
    assert arm.judgement is not None and arm.judgement.to_lora is not None, "it has been compared"
    return arm.judgement.to_lora


def find_half(gain: Difference) -> float:
    """Return half the width of the interval of all comparisons together, as a difference of losses."""
    assert gain.claim is not None, "there are at least two seeds"
    return (gain.claim.high - gain.claim.low) / 2


def scale(difference: Difference, value: float) -> float:
    """Return a difference of losses in per cent of the loss that it refers to, or itself if that is not positive."""
    return 100 * value / difference.reference if difference.reference > 0 else value


def find_unit(difference: Difference) -> str:
    """Return the unit of ``scale``."""
    return " %" if difference.reference > 0 else ""


def relate(arm: ArmSummary) -> str:
    """Return the difference of an arm to plain LoRA in words, such as ``1.2 % below plain LoRA's``."""
    return f"{format_share(find_gain(arm))} plain LoRA's"


def format_size(difference: Difference, value: float) -> str:
    """Return the size of a difference of losses, such as ``1.2 %``."""
    size = abs(scale(difference, value))
    return f"{size:.{count_decimals(difference, size)}f}{find_unit(difference)}"


def format_share(difference: Difference) -> str:
    """Return a mean difference in words, such as ``1.2 % below``."""
    return f"{format_size(difference, difference.mean)} {'below' if difference.mean < 0 else 'above'}"


def format_interval(difference: Difference, which: str) -> str:
    """Return the ``interval`` or ``claim`` of a difference in words, such as ``from 0.4 % below to 0.2 % above``."""
    interval = {"interval": difference.interval, "claim": difference.claim}[which]
    assert interval is not None, "there are at least two seeds"
    low, high = scale(difference, interval.low), scale(difference, interval.high)
    # As many digits for both ends as the one closer to 0 needs.
    decimals = count_decimals(difference, min(abs(low), abs(high)))
    first, last = (f"{abs(end):.{decimals}f}" for end in (low, high))
    unit = find_unit(difference)
    if high < 0:
        return f"{last} to {first}{unit} below"
    if low > 0:
        return f"{first} to {last}{unit} above"
    return f"from {first}{unit} below to {last}{unit} above"


def format_signed(difference: Difference, value: float) -> str:
    """Return the ``scale`` of a difference of losses with its sign."""
    size = scale(difference, value)
    return f"{size:+.{count_decimals(difference, abs(size))}f}"


def count_decimals(difference: Difference, size: float) -> int:
    """Return the decimals of a size as ``scale`` returns it: of a percentage two below 1, and one below 10."""
    if difference.reference <= 0:
        return 4
    return 2 if size < 1 else 1 if size < 10 else 0


def format_part(part: int, whole: int) -> str:
    """Return a part in per cent with two digits."""
    return f"{100 * part / whole:#.2g} %".replace(". ", " ")


def format_rate(rate: float | None) -> str:
    """Return a learning rate, or a dash for None."""
    return "-" if rate is None else f"{rate:g}"


def format_loss(loss: float | None) -> str:
    """Return a loss, or a dash for None."""
    return "-" if loss is None else f"{loss:.4f}"


def count_seeds(count: int) -> str:
    """Return over how many seeds a loss is a mean."""
    return "1 seed" if count == 1 else f"means of {count} seeds"


def format_figure(value: float) -> str:
    """Return a number with three digits."""
    return f"{value:#.3g}".rstrip(".") if value < 999.5 else f"{value:,.0f}"


def wrap(text: str, indent: str = "") -> list[str]:
    """Return a text as lines of at most 80 columns, without breaking words such as paths, or ``95 %`` and ``12 s``."""
    held = re.sub(r"(?<=\d) (?=(%|s|min|h)(\W|$))", "\N{NO-BREAK SPACE}", clean(text))
    lines = textwrap.wrap(held, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


# --- JSON -------------------------------------------------------------------------------------------------------------


def describe(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison with its answer as content for JSON, the same as the report has."""
    found, summary = answer(comparison), summarise(comparison)
    return {
        "schema_version": comparison.schema_version,
        "answer": {
            "arm": found.choice.arm if found.choice else None,
            "rate": found.choice.rate if found.choice else None,
            "paragraph": found.paragraph,
            "remarks": found.remarks,
        },
        "complete": len(comparison.cells) >= comparison.planned,
        "equal_seconds": summary.equal_seconds,
        "arms": {name: describe_arm(arm) for name, arm in summary.arms.items()},
        "comparison": json.loads(comparison.model_dump_json()),  # in which a metric that is no number is null
    }


def describe_arm(arm: ArmSummary) -> dict[str, Any]:
    """Return the figures of an arm as content for JSON, in losses, seconds and bytes."""
    return {
        "rate": arm.rate,
        "seeds": list(arm.cells),
        "failed": len(arm.failures),
        "test_loss": arm.test_loss,
        "standing": arm.judgement.standing if arm.judgement else None,
        "to_lora": describe_difference(arm.judgement.to_lora) if arm.judgement else None,
        "to_random": describe_difference(arm.judgement.to_random) if arm.judgement else None,
        "costs": asdict(arm.costs) if arm.costs else None,
        "equal_time_loss": arm.equal_time_loss,
        "forgetting": describe_forgetting_figures(arm),
        "metrics": arm.metrics,
    }


def describe_difference(difference: Difference | None) -> dict[str, Any] | None:
    """Return a difference as content for JSON: intervals are lists of two bounds."""
    if difference is None:
        return None
    intervals: Sequence[tuple[str, Any]] = (("interval", difference.interval), ("claim", difference.claim))
    bounds = {name: [each.low, each.high] if each else None for name, each in intervals}
    return {"mean": difference.mean, "pairs": difference.pairs, "reference": difference.reference, **bounds}


def describe_forgetting_figures(arm: ArmSummary) -> dict[str, Any] | None:
    """Return what an arm forgets as content for JSON."""
    if arm.forgetting is None:
        return None
    return {"rise": arm.forgetting.rise, "to_lora": describe_difference(arm.forgetting.to_lora)}
