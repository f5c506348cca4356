"""Plots of a plan, of a search's gates and losses, and of a run's ranks. They need the extra ``plots`` (matplotlib)."""

import io
import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.files import write_atomically
from axolotl_layersel.common.tables import arrange, find_places
from axolotl_layersel.common.terminal import clean
from axolotl_layersel.config.layer_names import is_layer_name
from axolotl_layersel.selection.gate_history import GateHistory
from axolotl_layersel.selection.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNUSABLE = ("pgf", "raw", "rgba")  # formats of matplotlib that need LaTeX, or that no viewer opens
MOST_NAMES = 40  # more names at the ends of lines are not readable
OUTERMOST = 15  # with more lines, so many of the highest and of the lowest have names
NAME_HEIGHT = 0.15  # inches
ROW_HEIGHT = 0.17  # inches
GREY, DARK_GREY = "0.75", "0.4"
MISSING = "--picture needs matplotlib. Install it: pip install 'axolotl-layersel[plots]'."


def check_picture(path: Path) -> None:
    """Make the folder of ``path``. Raise LayerselError unless matplotlib is installed and can write a picture there."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise LayerselError(MISSING) from error
    endings = sorted(set(FigureCanvasBase.get_supported_filetypes()) - set(UNUSABLE))
    if path.suffix[1:].lower() not in endings:
        what = f"{path.suffix!r} is not an ending" if path.suffix else "it lacks the ending"
        raise LayerselError(f"--picture: {path}: {what} of a picture. Use one of {', '.join(endings)}.")
    if os.path.isdir(path):
        raise LayerselError(f"--picture: {path} is a folder. Give the path of a file, such as {path / 'run.png'}.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LayerselError(
            f"--picture: the folder {path.parent} cannot be made ({error.strerror}). Give another path."
        ) from error


def draw_gates(history: GateHistory, kept: Collection[str], path: Path) -> None:
    """Draw the gates and both losses over the steps of a search, and the final gates of modules by layer and type.

    Args:
        history: the history of the search.
        kept: the names of the gates whose layers or modules are kept.
        path: the file; its ending selects the format.

    Raises:
        LayerselError: if matplotlib is not installed, or the picture cannot be written.
    """
    kept = [name for name in history.names if name in set(kept)]  # a plan lists layers and modules together
    by_module = not all(map(is_layer_name, history.names))
    if by_module:
        figure = make_figure((15, max(9.0, 1.5 + ROW_HEIGHT * len(arrange(history.names)[0]))))
        axes = figure.subplot_mosaic([["gates", "grid"], ["losses", "grid"]], width_ratios=(5, 4))
        draw_grid(axes["grid"], history.final, kept)
        axes["grid"].set(title=f"gates after step {len(history.gates)}; a dot: kept")
    else:
        names = len(choose_named(history.final, kept))
        figure = make_figure((13, max(5.0, 1.5 + NAME_HEIGHT * names)))
        axes = figure.subplot_mosaic([["gates", "losses"]], width_ratios=(3, 2))
    draw_gate_lines(axes["gates"], history, kept)
    draw_losses(axes["losses"], history)
    save(figure, path)


def draw_gate_lines(axes: "Axes", history: GateHistory, kept: Collection[str]) -> None:
    """Draw every gate over the steps: kept ones in colour, the others thin and grey."""
    named, kept = choose_named(history.final, kept), set(kept)
    shown = [name for name in history.names if name in kept]
    # Colours follow depth, so that neighbouring lines differ. Too many lines cannot be told apart by colour.
    colours = spread_colours(shown) if len(shown) <= MOST_NAMES else dict.fromkeys(shown, "tab:blue")
    width = 1.8 if len(shown) <= MOST_NAMES else 0.7
    steps = range(1, len(history.gates) + 1)
    for index, name in enumerate(history.names):
        style: dict[str, Any] = {"color": colours.get(name, GREY), "linewidth": width if name in kept else 0.6}
        axes.plot(steps, [gates[index] for gates in history.gates], zorder=2 + (name in kept), **style)
    axes.axhline(0, color="black", linewidth=0.8, zorder=2)
    modules = not all(map(is_layer_name, history.names))
    title = f"gates of {len(history.names)} {'modules' if modules else 'layers'}, the {len(kept)} kept in colour"
    if len(named) < len(history.names):
        which = "kept" if set(named) == kept else f"the {OUTERMOST} highest and the {OUTERMOST} lowest"
        title += f"\nnamed: {which}"
    axes.set(xlabel="optimizer step of the search", ylabel="gate", title=title)
    places = find_places(history.names) if modules else {}
    labels = {name: " ".join(filter(None, places[name])) if modules else f"layer {name}" for name in named}
    name_ends(
        axes,
        len(history.gates),
        {labels[name]: history.final[name] for name in named},
        {labels[name]: colours.get(name, DARK_GREY) for name in named},
        bold={labels[name] for name in named if name in kept},
    )


def draw_losses(axes: "Axes", history: GateHistory) -> None:
    """Draw the training and the validation loss over the steps of a search."""
    steps = range(1, len(history.gates) + 1)
    axes.plot(steps, history.train_losses, label="training", alpha=0.6)
    validated = [(step, loss) for step, loss in zip(steps, history.validation_losses) if loss is not None]
    axes.plot(*zip(*validated), label="validation", alpha=0.6)
    axes.set(xlabel="optimizer step of the search", ylabel="loss", title="losses of the search")
    axes.legend(fontsize="small")


def draw_ranks(history: Mapping[int, Mapping[str, int]], path: Path) -> None:
    """Draw the mean rank of each type of module over the steps, and the final ranks by layer and type.

    Args:
        history: the rank of every module, by optimizer step.
        path: the file; its ending selects the format.

    Raises:
        LayerselError: if matplotlib is not installed, or the picture cannot be written.
    """
    steps = sorted(history)
    rows, kinds = arrange(history[steps[-1]])
    members = {kind: [row[kind] for row in rows.values() if kind in row] for kind in kinds}
    height = max(5.0, 1.5 + ROW_HEIGHT * len(rows))
    figure = make_figure((12, height))
    # The grid grows with the number of layers, the lines do not.
    axes = figure.subplot_mosaic(
        [["lines", "grid"], [".", "grid"]], height_ratios=(5, max(height - 5, 0.01)), width_ratios=(5, 4)
    )
    colours = spread_colours(kinds)
    means = {kind: [mean(history[step][name] for name in names) for step in steps] for kind, names in members.items()}
    for kind, values in means.items():
        axes["lines"].step(steps, values, where="post", color=colours[kind], linewidth=1.8)
    axes["lines"].set(xlabel="optimizer step", ylabel="mean rank", title="mean rank by type of module")
    name_ends(axes["lines"], steps[-1], {kind: values[-1] for kind, values in means.items()}, colours, bold=means)
    draw_grid(axes["grid"], history[steps[-1]], (), numbers=True)
    axes["grid"].set(title=f"rank after step {steps[-1]}")
    save(figure, path)


def has_scores(plan: Plan) -> bool:
    """Return whether a plan has the score of any layer or module."""
    scores = [*plan.module_scores.values(), *(choice.score for choice in plan.layers)]
    return any(score is not None for score in scores)


def draw_plan(plan: Plan, path: Path) -> None:
    """Draw the ranks of a plan by layer and type of module, and the scores of what it chose among.

    Args:
        plan: a plan with ranks, scores or both.
        path: the file; its ending selects the format.

    Raises:
        LayerselError: if matplotlib is not installed, or the picture cannot be written.
    """
    scores = {name: score for name, score in plan.module_scores.items() if score is not None}
    rows = max(len(plan.layers), len(arrange(plan.module_scores or plan.ranks)[0]))
    parts = [*(["scores"] if has_scores(plan) else []), *(["ranks"] if plan.ranks else [])]
    figure = make_figure((1 + 6.5 * len(parts), max(5.0, 1.5 + ROW_HEIGHT * rows)))
    axes = figure.subplot_mosaic([[*parts]])
    if scores:
        draw_grid(axes["scores"], scores, plan.modules, modules=plan.module_scores)
        axes["scores"].set(title=f"scores by {plan.method}; a dot: kept")
    elif "scores" in axes:
        draw_layer_scores(axes["scores"], plan)
    if plan.ranks:
        draw_grid(axes["ranks"], plan.ranks, (), numbers=True, modules=[*plan.module_scores, *plan.ranks])
        axes["ranks"].set(title="rank of the kept modules")
    save(figure, path)


def draw_layer_scores(axes: "Axes", plan: Plan) -> None:
    """Draw the score of every layer as a bar, in colour if the layer is kept."""
    places = range(len(plan.layers))
    colours = ["tab:blue" if choice.selected else GREY for choice in plan.layers]
    axes.barh(places, [choice.score or 0.0 for choice in plan.layers], color=colours)
    # A kept layer without a score has no bar, so its name is bold too.
    axes.set_yticks(places, [clean(str(choice.layer)) for choice in plan.layers], fontsize=7, parse_math=False)
    for label, choice in zip(axes.get_yticklabels(), plan.layers):
        label.set_fontweight("bold" if choice.selected else "normal")
    axes.set_ylim(len(plan.layers) - 0.5, -0.5)
    title = f"scores by {plan.method}, the {len(plan.selected)} kept of {len(plan.layers)} layers in colour"
    axes.set(xlabel="score", ylabel="layer", title=title)


# --- Parts of pictures ------------------------------------------------------------------------------------------------


def choose_named(final: Mapping[str, float], kept: Collection[str]) -> list[str]:
    """Return the gates to name: all if there is room, else the kept ones, else the highest and the lowest."""
    for names in (list(final), [name for name in final if name in set(kept)]):
        if 0 < len(names) <= MOST_NAMES:
            return names
    ordered = sorted(final, key=lambda name: final[name])
    return ordered[:OUTERMOST] + ordered[-OUTERMOST:]


def spread_colours(names: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Return a colour for each name along a colour map, dark enough for text on white."""
    from matplotlib import colormaps

    points = [0.03 + 0.94 * index / max(1, len(names) - 1) for index in range(len(names))]
    return {name: tuple(0.8 * part for part in colormaps["turbo"](point)[:3]) for name, point in zip(names, points)}


def name_ends(
    axes: "Axes", step: int, ends: Mapping[str, float], colours: Mapping[str, object], bold: Collection[str]
) -> None:
    """Write names next to the ends of lines at ``step``, moved up or down so that none covers another.

    Args:
        axes: the axes, which have all their lines.
        step: the last step of the lines.
        ends: the last value of each line, by name.
        colours: the colour of each name.
        bold: the names in bold.
    """
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    figure: Any = axes.figure
    figure.draw_without_rendering()  # determines the height of the axes
    height = axes.get_window_extent().height / figure.dpi
    lines = {name: (value - low) / (high - low) for name, value in ends.items()}
    texts = spread_out(lines, NAME_HEIGHT / height)
    for name, at in lines.items():
        axes.annotate(
            clean(name),
            xy=(step, at),
            xycoords=("data", "axes fraction"),
            xytext=(1.04, texts[name]),
            textcoords="axes fraction",
            color=colours[name],
            fontsize=8,
            fontweight="bold" if name in bold else "normal",
            va="center",
            annotation_clip=False,
            parse_math=False,
            arrowprops=dict(arrowstyle="-", color=colours[name], linewidth=0.5, shrinkA=0, shrinkB=0, relpos=(0, 0.5)),
        )


def spread_out(heights: Mapping[str, float], gap: float) -> dict[str, float]:
    """Return heights from 0 to 1, close to ``heights`` and in their order, at least ``gap`` apart.

    The gaps are smaller and equal if there is too little room.
    """
    gap = min(gap, 1 / max(1, len(heights) - 1))
    names = sorted(heights, key=lambda name: heights[name])
    # One pass moves crowded names up, the other down; the mean keeps both distances and centres the names.
    up = push_up([heights[name] for name in names], gap)
    down = push_up([1 - heights[name] for name in reversed(names)], gap)[::-1]
    return {name: (low + 1 - high) / 2 for name, low, high in zip(names, up, down)}


def push_up(heights: Sequence[float], gap: float) -> list[float]:
    """Return ascending heights from 0 to 1, each at least ``gap`` above the one before it."""
    placed: list[float] = []
    for index, height in enumerate(heights):
        room = 1 - gap * (len(heights) - 1 - index)  # for the names above
        placed.append(min(max(height, placed[-1] + gap if placed else 0.0), room))
    return placed


def draw_grid(
    axes: "Axes",
    values: Mapping[str, float],
    marked: Collection[str],
    numbers: bool = False,
    modules: Collection[str] = (),
) -> None:
    """Draw a value of every module as a coloured cell, by layer and type.

    Args:
        axes: empty axes.
        values: the values by the module's name.
        marked: the modules that get a dot.
        numbers: write the values into the cells, instead of drawing a colour bar.
        modules: the modules that have a cell, which is empty without a value; by default those with a value.
    """
    rows, columns = arrange(modules or values)
    cells = {name: (columns.index(column), y) for y, row in enumerate(rows.values()) for column, name in row.items()}
    grid = [[values.get(row.get(column, ""), math.nan) for column in columns] for row in rows.values()]
    largest = max(map(abs, values.values())) or 1
    cmap, low, high = ("Blues", 0.0, 1.3 * largest) if numbers else ("RdBu_r", -largest, largest)
    image = axes.imshow(grid, aspect="auto", cmap=cmap, vmin=low, vmax=high)
    dots = [cells[name] for name in marked if name in cells]
    axes.scatter([x for x, _ in dots], [y for _, y in dots], s=6, color="black")
    axes.set_xticks(
        range(len(columns)), map(clean, columns), rotation=45, ha="right", fontsize="small", parse_math=False
    )
    axes.set_yticks(range(len(rows)), map(clean, rows), fontsize=7, parse_math=False)
    axes.set_ylabel("layer")
    if numbers:
        for name in filter(values.__contains__, cells):
            axes.text(*cells[name], str(values[name]), ha="center", va="center", fontsize=7)
    else:
        figure: Any = axes.figure
        figure.colorbar(image, ax=axes, shrink=min(1.0, 5 / figure.get_size_inches()[1]), anchor=(0, 1))


def make_figure(size: tuple[float, float]) -> "Figure":
    """Return an empty figure of ``size`` inches. Raise LayerselError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise LayerselError(MISSING) from error
    return Figure(figsize=size, layout="constrained")


def save(figure: "Figure", path: Path) -> None:
    """Write ``figure`` to ``path``, which appears at once and complete."""
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:].lower(), dpi=150)
    write_atomically(path, content.getvalue())
