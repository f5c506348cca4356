"""The pictures of a comparison, by the extra ``plots`` (matplotlib): losses, rates, and the layers of each arm."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from axolotl_layersel.cli.compare.figures import LORA, Comparison, Figures
from axolotl_layersel.cli.compare.summary import ArmSummary, Summary
from axolotl_layersel.common.progress import format_duration
from axolotl_layersel.common.terminal import clean
from axolotl_layersel.reports.pictures import DARK_GREY, SMALL, draw_grid, find_grid_size, make_figure, name_ends

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that stand out on white and on black (Okabe and Ito's, without black and yellow), and markers for more arms.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#b8860b", "#8a63d2", "#c23b3b")
MARKERS = ("o", "s", "^", "D", "v")
WIDE = (8.0, 4.8)  # inches


@dataclass(frozen=True)
class Picture:
    """A picture of a comparison.

    Attributes:
        name: of its files, without their endings.
        title: a line that says what it shows.
        alternative: a sentence for those who do not see it.
        make: returns its figure.
    """

    name: str
    title: str
    alternative: str
    make: Callable[[], "Figure"]


def list_pictures(comparison: Comparison, summary: Summary) -> list[Picture]:
    """Return the pictures that the cells of a comparison allow."""
    measured = [arm for arm in summary.arms.values() if arm.cells]
    if not measured:
        return []
    styles = choose_styles(summary.arms)
    pictures = [
        Picture(
            "parameters",
            "Test loss against trainable parameters",
            "A point for each arm, with the 95 % interval of its difference to plain LoRA.",
            lambda: draw_parameters(measured, styles),
        ),
        Picture(
            "time",
            "Validation loss against time",
            "A line for each arm, from the start of its choice of layers, as a mean over seeds.",
            lambda: draw_time(measured, styles, summary.equal_seconds),
        ),
    ]
    rates = collect_rates(comparison)
    if any(len(losses) > 1 for losses in rates.values()):
        pictures.append(
            Picture(
                "rates",
                "Validation loss against learning rate",
                "A line for each arm over the learning rates that were tried in full, with the best one marked.",
                lambda: draw_rates(rates, comparison.best_rates, styles),
            )
        )
    everywhere = list(dict.fromkeys(name for arm in measured for cell in arm.cells.values() for name in cell.ranks))
    for arm in measured:
        cell = next(iter(arm.cells.values()))
        if chooses_ranks(cell, everywhere):
            pictures.append(picture_ranks(arm, cell, everywhere, len(pictures)))
    return pictures


def chooses_ranks(cell: Figures, modules: list[str]) -> bool:
    """Return whether an adapter leaves modules out or has several ranks."""
    return bool(cell.ranks) and (len(cell.ranks) < len(modules) or len(set(cell.ranks.values())) > 1)


def picture_ranks(arm: ArmSummary, cell: Figures, modules: list[str], number: int) -> Picture:
    """Return the picture of the layers and ranks of an arm's first seed; ``number`` makes its name distinct."""
    name = "".join(char if char.isascii() and char.isalnum() else "-" for char in arm.arm)
    title = f"Ranks of {clean(arm.arm)}, seed {cell.seed}"
    return Picture(
        f"ranks-{number}-{name}",
        title,
        f"The rank of {len(cell.ranks)} of {len(modules)} modules by layer and type; modules without LoRA are empty.",
        lambda: draw_ranks(cell, modules, title),
    )


def choose_styles(arms: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return a colour and a marker for each arm; plain LoRA is grey."""
    styles: dict[str, dict[str, Any]] = {}
    for index, arm in enumerate(arm for arm in arms if arm != LORA):
        marker = MARKERS[index // len(COLOURS) % len(MARKERS)]
        styles[arm] = {"color": COLOURS[index % len(COLOURS)], "marker": marker}
    return {LORA: {"color": "#808080", "marker": "o"}, **styles}


# --- Figures ----------------------------------------------------------------------------------------------------------


def draw_parameters(arms: list[ArmSummary], styles: Mapping[str, Mapping[str, Any]]) -> "Figure":
    """Return a figure of the test loss by trainable parameters, with the ranks of plain LoRA connected."""
    figure = make_figure(WIDE, "Test loss against trainable parameters")
    axes = figure.subplots()
    sizes = {arm.arm: arm.costs.parameters for arm in arms if arm.costs}
    losses = {arm.arm: arm.test_loss for arm in arms if arm.test_loss is not None}
    places = spread_equal(sizes)
    plain = sorted((places[arm], losses[arm]) for arm in sizes if arm.partition("@")[0] == LORA)
    axes.plot(*zip(*plain), color=styles[LORA]["color"], linewidth=1.2, zorder=1)
    for arm in arms:
        gain = arm.judgement.to_lora if arm.judgement else None
        half = (gain.interval.high - gain.interval.low) / 2 if gain and gain.interval else None
        style = {"capsize": 3, "linewidth": 1.2, "markersize": 6, "linestyle": "none", **styles[arm.arm]}
        axes.errorbar(places[arm.arm], losses[arm.arm], yerr=half, label=clean(arm.arm), **style)
    axes.set_xscale("log")
    mark_parameters(axes, sorted(set(sizes.values())))
    axes.set(xlabel="trainable parameters; arms with equally many are drawn next to each other", ylabel="test loss")
    axes.margins(x=0.1)
    figure.legend(loc="outside right center", fontsize=SMALL, frameon=False)
    return figure


def spread_equal(sizes: Mapping[str, float]) -> dict[str, float]:
    """Return places on a logarithmic axis close to ``sizes``, with those of about the same size next to each other."""
    gap = 0.025 * (math.log(max(sizes.values()) / min(sizes.values())) + 0.4)
    groups: list[list[str]] = []
    for arm in sorted(sizes, key=lambda arm: sizes[arm]):
        if groups and sizes[arm] < 1.02 * sizes[groups[-1][0]]:
            groups[-1].append(arm)
        else:
            groups.append([arm])
    return {
        arm: sizes[arm] * math.exp(gap * (index - (len(group) - 1) / 2))
        for group in groups
        for index, arm in enumerate(sorted(group, key=list(sizes).index))
    }


def mark_parameters(axes: "Axes", numbers: list[float]) -> None:
    """Mark numbers of parameters on the axis, as many as have room."""
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    shown: list[float] = []
    for number in numbers:
        if not shown or number > 1.15 * shown[-1]:
            shown.append(number)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(shown)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda number, _: format_count(number)))


def format_count(number: float) -> str:
    """Return a number of parameters, such as ``1.97 M``."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:.0f}"


def draw_time(arms: list[ArmSummary], styles: Mapping[str, Mapping[str, Any]], equal_seconds: float | None) -> "Figure":
    """Return a figure of the validation loss by the time from a cell's start, without evaluations."""
    figure = make_figure(WIDE, "Validation loss against time")
    axes = figure.subplots()
    curves = {arm.arm: average_curve(list(arm.cells.values())) for arm in arms}
    curves = {arm: curve for arm, curve in curves.items() if curve}
    for arm, curve in curves.items():
        axes.plot(*zip(*curve), linewidth=1.6, markersize=4, **styles[arm])
    axes.set(xlabel="seconds from the start, with the choice of layers and without evaluations")
    axes.set_ylabel("validation loss, mean over seeds")
    focus(axes, curves)
    if equal_seconds is not None:
        axes.axvline(equal_seconds, color=DARK_GREY, linewidth=0.8, linestyle=":")
        axes.annotate(
            f"all arms: {format_duration(equal_seconds)}",
            (equal_seconds, 1),
            (-4, -4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=SMALL,
            color=DARK_GREY,
        )
    steps = {arm: curve[-1][0] for arm, curve in curves.items()}
    ends = {arm: curve[-1][1] for arm, curve in curves.items()}
    name_ends(axes, steps, ends, {arm: styles[arm]["color"] for arm in ends}, bold=())
    return figure


def focus(axes: "Axes", curves: Mapping[str, list[tuple[float, float]]]) -> None:
    """Limit the losses to those of the second half of the evaluations, where arms can be told apart."""
    values = [loss for curve in curves.values() for _, loss in curve[len(curve) // 2 :]]
    low, high = min(values, default=0.0), max(values, default=0.0)
    if low < high:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))


def average_curve(cells: list[Figures]) -> list[tuple[float, float]]:
    """Return the mean time and the mean validation loss at the steps that all cells have evaluated."""
    points = [{point.step: point for point in cell.curve} for cell in cells]
    shared = sorted(set.intersection(*(set(each) for each in points)))
    return [
        (
            fmean(cell.seconds_choosing + each[step].seconds for cell, each in zip(cells, points)),
            fmean(each[step].validation_loss for each in points),
        )
        for step in shared
    ]


def collect_rates(comparison: Comparison) -> dict[str, dict[float, float]]:
    """Return the validation loss of each arm by learning rate, of the first seed at the full number of steps."""
    rates: dict[str, dict[float, float]] = {arm: {} for arm in comparison.settings.arms}
    for cell in sorted(comparison.figures, key=lambda cell: cell.rate):
        if cell.seed == comparison.settings.seeds[0] and cell.steps == comparison.settings.steps:
            rates[cell.arm][cell.rate] = cell.validation_loss
    return {arm: losses for arm, losses in rates.items() if losses}


def draw_rates(
    rates: Mapping[str, Mapping[float, float]], best: Mapping[str, float], styles: Mapping[str, Mapping[str, Any]]
) -> "Figure":
    """Return a figure of the validation loss by learning rate."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure = make_figure(WIDE, "Validation loss against learning rate, first seed")
    axes = figure.subplots()
    for arm, losses in rates.items():
        axes.plot(list(losses), list(losses.values()), linewidth=1.4, markersize=4, label=clean(arm), **styles[arm])
        if best.get(arm) in losses:
            axes.plot(best[arm], losses[best[arm]], markersize=9, fillstyle="none", linestyle="none", **styles[arm])
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(sorted({rate for losses in rates.values() for rate in losses}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
    axes.tick_params(axis="x", labelsize=SMALL)
    axes.set(xlabel="learning rate; the best one has a ring", ylabel="validation loss")
    figure.legend(loc="outside right center", fontsize=SMALL, frameon=False)
    return figure


def draw_ranks(cell: Figures, modules: list[str], title: str) -> "Figure":
    """Return a figure of the ranks of a cell's modules by layer and type; modules without LoRA are empty."""
    figure = make_figure(find_grid_size(modules), title)
    axes = figure.subplots()
    draw_grid(axes, cell.ranks, {name: str(rank) for name, rank in cell.ranks.items()}, modules)
    layers = f"{cell.selected[0]} of {cell.selected[1]} layers, " if cell.selected else ""
    axes.set_title(f"{layers}{len(cell.ranks)} of {len(modules)} modules", fontsize=SMALL)
    return figure
