"""Pictures of a plan's scores, of a search's gates and losses, and of ranks, by the extra ``plots`` (matplotlib).

Nothing here uses ``matplotlib.pyplot``, which would choose a window system and keep figures.
"""

import contextlib
import io
import itertools
import logging
import math
import os
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.files import write_atomically
from axolotl_layersel.common.paths import PICTURE_ENDINGS, PICTURES, gates_path, name_model, picture_path
from axolotl_layersel.common.tables import arrange, find_places
from axolotl_layersel.common.terminal import clean
from axolotl_layersel.config.layer_names import is_layer_name
from axolotl_layersel.l1ra.records import RankHistory
from axolotl_layersel.selection.gate_history import GateHistory
from axolotl_layersel.selection.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOG = logging.getLogger("axolotl.layersel")

UNUSABLE = ("pgf", "raw", "rgba")  # formats of matplotlib that need LaTeX, or that no viewer opens
MOST_NAMES = 40  # more names at the ends of lines are not readable
OUTERMOST = 15  # with more lines, so many of the highest and of the lowest have names
MOST_NUMBERS = 40  # columns of a grid; more are drawn narrower, without numbers
# Inches at 150 dots each. Text of 9 points is still readable at half the size.
NAME_HEIGHT = 0.17
ROW_HEIGHT = 0.2
HEADING_HEIGHT = 2.0  # of a figure's title, its axes' titles, and the names below them
NAMES_WIDTH = 0.9  # of the names of rows
SMALL = 9  # points
GREY, DARK_GREY = "0.75", "0.35"
DARK, PALE = "#1f4e8c", "0.8"  # kept and not kept, which also differ in grey
# Text stays text, and files of the same content have the same bytes.
STYLE = {"svg.hashsalt": "axolotl-layersel", "svg.fonttype": "none", "font.size": 10, "axes.titlesize": 11}
UNDATED = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
INSTALL = "pip install 'axolotl-layersel[plots]'"
MISSING = f"--picture needs matplotlib. Install it: {INSTALL}."


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


# --- The pictures of a run --------------------------------------------------------------------------------------------


@dataclass
class RunPictures:
    """The pictures in a run's folder, which process 0 draws at the end of each phase.

    A failure is one warning a run, and a missing matplotlib is one line. Neither ends the run.

    Attributes:
        folder: the folder of the run.
        plan: its plan, None without one.
        base_model: the path or hub name of its base model.
    """

    folder: Path
    plan: Plan | None
    base_model: str | None
    silent: bool = False  # a failure was said

    def draw_plan(self) -> None:
        """Draw what the selection has decided, and remove pictures that it does not have."""
        if self.plan is not None:
            self.draw(PICTURES, None)

    def draw_ranks(self, history: RankHistory) -> None:
        """Draw the ranks before and after ``l1ra``."""
        self.draw(("ranks",), history)

    def draw(self, names: Sequence[str], history: RankHistory | None) -> None:
        """Draw the pictures ``names``, after removing those of an earlier run, which would seem to be of this one."""
        places = {name: [picture_path(self.folder, name, ending) for ending in PICTURE_ENDINGS] for name in names}
        try:
            for path in itertools.chain(*places.values()):
                path.unlink(missing_ok=True)
            has_gates = self.plan is not None and gates_path(self.folder).exists()
            gates = GateHistory.read(self.folder) if has_gates else None
            figures = list_figures(self.folder, self.plan, gates, history, self.base_model)
            wanted = {name: figures[name] for name in names if name in figures}
            if has_matplotlib():
                for name, make in wanted.items():
                    write_figure(make, places[name])
            elif wanted and not self.silent:
                self.silent = True
                LOG.info(
                    "layersel: no pictures are drawn, because matplotlib is not installed: %s. "
                    "`axolotl-layersel show %s --picture FILE` draws them later.",
                    INSTALL,
                    self.folder,
                )
        except Exception as error:  # a picture must not end a run
            if not self.silent:
                self.silent = True
                LOG.warning(
                    "layersel: not all pictures of the run can be drawn (%s: %s). The run goes on; "
                    "`axolotl-layersel show %s --picture FILE` draws them later.",
                    type(error).__name__,
                    clean(str(error)),
                    self.folder,
                )


def has_matplotlib() -> bool:
    """Return whether matplotlib can be imported."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def list_figures(
    folder: Path,
    plan: Plan | None,
    gates: GateHistory | None,
    history: RankHistory | None,
    base_model: str | None,
) -> dict[str, Callable[[], "Figure"]]:
    """Return a function for each picture of a run that makes its figure, by name, the last phase's first.

    Args:
        folder: the run's, or that of a checkpoint, or the path of a plan, for the titles.
        plan: the plan, None without one.
        gates: the history of a search, None without one.
        history: the ranks by step with ``l1ra``, None without.
        base_model: the path or hub name of the base model, None if it is unknown.
    """
    figures: dict[str, Callable[[], Figure]] = {}
    if history is not None:
        methods = " + ".join([*([plan.method] if plan else []), "l1ra"])
        ranks, moved = history.ranks, make_title(folder, methods, base_model)
        figures["ranks"] = lambda: draw_moved_ranks(ranks, moved)
    if plan is not None:
        title = make_title(folder, plan.method, base_model)
        if gates is not None:
            search, kept = gates, find_kept(plan, gates)
            figures["gates"] = lambda: draw_gates(search, kept, title)
        if has_scores(plan):
            figures["scores"] = lambda: draw_scores(plan, title)
        if plan.ranks and history is None:
            figures["ranks"] = lambda: draw_plan_ranks(plan, title)
    elif gates is not None:
        search, title = gates, make_title(folder, "flexora", base_model)
        figures["gates"] = lambda: draw_gates(search, (), title)
    return figures


def make_title(folder: Path, method: str, base_model: str | None) -> str:
    """Return the title of a run's pictures: the name of its folder, its method, and its base model."""
    place = folder.resolve()
    if place.parent.name == "layersel":  # a plan in its run's folder
        place = place.parent.parent
    name = f"{place.parent.name}/{place.name}" if place.name.startswith("checkpoint-") else place.name
    return clean(f"{name}: {method}" + (f" on {name_model(base_model)}" if base_model else ""))


def find_kept(plan: Plan, gates: GateHistory) -> list[str]:
    """Return the names of the gates whose layers or modules a plan keeps."""
    modules = tuple(f"{name}." for name in plan.modules) if plan.module_scores else ()
    # The name of a unit is its layer's number, or the common beginning of its modules' names.
    units = [unit for unit in gates.names if any(name.startswith(f"{unit}.") for name in modules)]
    return [*map(str, plan.selected), *units]


def has_scores(plan: Plan) -> bool:
    """Return whether a plan has the score of any layer or module."""
    scores = [*plan.module_scores.values(), *(choice.score for choice in plan.layers)]
    return any(score is not None for score in scores)


# --- Figures ----------------------------------------------------------------------------------------------------------


def draw_scores(plan: Plan, title: str) -> "Figure":
    """Return a figure of the scores of a plan's layers, or of its modules, with the kept ones marked."""
    if not plan.module_scores:
        figure = make_figure((8.0, max(4.0, HEADING_HEIGHT + ROW_HEIGHT * len(plan.layers))), title)
        draw_layer_scores(figure.subplots(), plan)
        return figure
    scores = {name: score for name, score in plan.module_scores.items() if score is not None}
    unit = find_unit(scores.values())
    figure = make_figure(find_grid_size(plan.module_scores, 0.6), title)
    axes = figure.subplots()
    kept = set(plan.modules)
    texts = {name: f"{score / unit:.2f}" for name, score in scores.items()}
    draw_grid(axes, scores, texts, plan.module_scores, {name for name in scores if name not in kept})
    scale = "" if unit == 1 else f" in units of {unit:.0e}"
    axes.set_title(f"scores{scale}\nthe {len(kept)} kept of {len(plan.module_scores)} modules are coloured")
    return figure


def find_unit(scores: Iterable[float]) -> float:
    """Return the power of ten in which scores have few digits; 1 if they have few anyway."""
    largest = max(map(abs, scores), default=0.0)
    if largest == 0 or 0.1 <= largest < 1000:
        return 1.0
    return max(10.0 ** math.floor(math.log10(largest)), sys.float_info.min)


def draw_layer_scores(axes: "Axes", plan: Plan) -> None:
    """Draw the score of every layer as a bar with its number; bars of kept layers are dark, their names have a dot."""
    places = range(len(plan.layers))
    bars = axes.barh(
        places,
        [choice.score or 0.0 for choice in plan.layers],
        color=[DARK if choice.selected else PALE for choice in plan.layers],
    )
    said = ["not scored" if choice.score is None else f"{choice.score:.3g}" for choice in plan.layers]
    for text in axes.bar_label(bars, said, padding=3, fontsize=SMALL):
        text.set_in_layout(False)
    names = [f"{clean(str(choice.layer))}{' ●' if choice.selected else '   '}" for choice in plan.layers]
    axes.set_yticks(places, names, fontsize=SMALL, parse_math=False)
    for label, choice in zip(axes.get_yticklabels(), plan.layers):
        label.set_fontweight("bold" if choice.selected else "normal")
    axes.set_ylim(len(plan.layers) - 0.5, -0.5)
    axes.margins(x=0.15)  # for the numbers
    kept = f"scores; the {len(plan.selected)} kept of {len(plan.layers)} layers are dark"
    axes.set(xlabel="score", ylabel="layer", title=kept)


def draw_gates(history: GateHistory, kept: Collection[str], title: str) -> "Figure":
    """Return a figure of the gates and both losses by step of a search, and of the final gates if they are modules'.

    Args:
        history: the history of the search.
        kept: the names of the gates whose layers or modules are kept.
        title: the title of the figure.
    """
    kept = [name for name in history.names if name in set(kept)]  # a plan lists layers and modules together
    if all(map(is_layer_name, history.names)):
        names = len(choose_named(history.final, kept))
        figure = make_figure((13, max(5.0, HEADING_HEIGHT + NAME_HEIGHT * names)), title)
        axes = figure.subplot_mosaic([["gates", "losses"]], width_ratios=(3, 2))
    else:
        width, height = find_grid_size(history.names, 0.6)
        lines = 0.5 + NAME_HEIGHT * len(choose_named(history.final, kept))  # inches of the gates' lines
        figure = make_figure((8 + width, max(HEADING_HEIGHT + lines + 3, height)), title)
        axes = figure.subplot_mosaic(
            [["gates", "grid"], ["losses", "grid"]],
            height_ratios=(lines, max(3.0, height - HEADING_HEIGHT - lines)),
            width_ratios=(8, width),
        )
        texts = {name: f"{gate:.2f}" for name, gate in history.final.items()}
        draw_grid(axes["grid"], history.final, texts, history.names, set(history.names) - set(kept))
        axes["grid"].set(title=f"gates after step {len(history.gates)}, coloured if kept")
    draw_gate_lines(axes["gates"], history, kept)
    draw_losses(axes["losses"], history)
    return figure


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
    axes.plot(steps, history.train_losses, label="training", color="0.6", linewidth=1.0)
    validated = [(step, loss) for step, loss in zip(steps, history.validation_losses) if loss is not None]
    axes.plot(*zip(*validated), label="validation", color=DARK, linewidth=1.8)
    axes.set(xlabel="optimizer step of the search", ylabel="loss", title="losses of the search")
    axes.legend()


def draw_plan_ranks(plan: Plan, title: str) -> "Figure":
    """Return a figure of the ranks of a plan's modules by layer and type; modules that are not kept are empty."""
    modules = [*plan.module_scores, *(name for name in plan.ranks if name not in plan.module_scores)]
    figure = make_figure(find_grid_size(modules), title)
    axes = figure.subplots()
    draw_grid(axes, plan.ranks, {name: str(rank) for name, rank in plan.ranks.items()}, modules)
    axes.set_title(f"rank of the {len(plan.ranks)} kept modules")
    return figure


def draw_moved_ranks(history: Mapping[int, Mapping[str, int]], title: str) -> "Figure":
    """Return a figure of ranks that moved: the means of each type by step, and all ranks before and after.

    Args:
        history: the rank of every module, by optimizer step.
        title: the title of the figure.
    """
    steps = sorted(history)
    rows, kinds = arrange(history[steps[-1]])
    width, height = find_grid_size(history[steps[-1]])
    lines = 4.0  # inches of the lines, which do not grow with the number of layers
    figure = make_figure((5.5 + 2 * width, height), title)
    axes = figure.subplot_mosaic(
        [["lines", "before", "after"], [".", "before", "after"]],
        height_ratios=(lines, max(height - lines, 0.01)),
        width_ratios=(5.5, width, width),
    )
    members = {kind: [row[kind] for row in rows.values() if kind in row] for kind in kinds}
    means = {kind: [mean(history[step][name] for name in names) for step in steps] for kind, names in members.items()}
    colours = spread_colours(kinds)
    for kind, values in means.items():
        axes["lines"].step(steps, values, where="post", color=colours[kind], linewidth=1.8)
    axes["lines"].set(xlabel="optimizer step", ylabel="mean rank", title="mean rank by type of module")
    largest = max(rank for step in (steps[0], steps[-1]) for rank in history[step].values())
    for name, step in (("before", steps[0]), ("after", steps[-1])):
        ranks = history[step]
        draw_grid(axes[name], ranks, {module: str(rank) for module, rank in ranks.items()}, ranks, largest=largest)
        axes[name].set_title(f"rank {name}, {sum(ranks.values())} in all")
    if len(kinds) <= MOST_NAMES:
        ends = {kind: values[-1] for kind, values in means.items()}
        name_ends(axes["lines"], steps[-1], ends, colours, bold=means)
    return figure


# --- Parts of figures -------------------------------------------------------------------------------------------------


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
    return {name: tuple(0.65 * part for part in colormaps["turbo"](point)[:3]) for name, point in zip(names, points)}


def name_ends(
    axes: "Axes",
    step: float | Mapping[str, float],
    ends: Mapping[str, float],
    colours: Mapping[str, object],
    bold: Collection[str],
) -> None:
    """Write names next to the ends of lines, moved up or down so that none covers another.

    Args:
        axes: the axes, which have all their lines.
        step: where the lines end: all of them, or each.
        ends: the last value of each line, by name.
        colours: the colour of each name.
        bold: the names in bold.
    """
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    figure: Any = axes.figure
    figure.get_layout_engine().execute(figure)  # determines the height of the axes
    height = axes.get_window_extent().height / figure.dpi
    lines = {name: (value - low) / (high - low) for name, value in ends.items()}
    texts = spread_out(lines, NAME_HEIGHT / height)
    for name, at in lines.items():
        axes.annotate(
            clean(name),
            xy=(step[name] if isinstance(step, Mapping) else step, at),
            xycoords=("data", "axes fraction"),
            xytext=(1.04, texts[name]),
            textcoords="axes fraction",
            color=colours[name],
            fontsize=SMALL,
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


def find_grid_size(modules: Iterable[str], cell_width: float = 0.5) -> tuple[float, float]:
    """Return the width and height of a grid with its names and its title, in inches."""
    rows, columns = arrange(modules)
    widest = max(map(len, rows), default=0)
    cells = len(columns) * (cell_width if len(columns) <= MOST_NUMBERS else 0.15)
    return max(4.0, NAMES_WIDTH + 0.07 * widest + cells), max(5.0, HEADING_HEIGHT + ROW_HEIGHT * len(rows))


def draw_grid(
    axes: "Axes",
    values: Mapping[str, float],
    texts: Mapping[str, str],
    modules: Iterable[str],
    white: Collection[str] = (),
    largest: float | None = None,
) -> None:
    """Draw a cell for every module by layer and type, the darker the higher its value, with its number.

    Args:
        axes: empty axes.
        values: the values by the module's name.
        texts: the numbers in the cells.
        modules: the modules that have a cell, which is empty without a value.
        white: the modules whose cells are not coloured.
        largest: the value of the darkest cell; default: the highest of ``values``.
    """
    rows, columns = arrange(modules)
    cells = {name: (columns.index(column), y) for y, row in enumerate(rows.values()) for column, name in row.items()}
    shown = {name: value for name, value in values.items() if name in cells}
    coloured = [value for name, value in shown.items() if name not in white]
    high = max(coloured, default=1.0) if largest is None else largest
    low = min([0.0, *coloured])
    span = (high - low) or 1.0
    grid = [[float("nan")] * len(columns) for _ in rows]
    for name, value in shown.items():
        if name not in white:
            x, y = cells[name]
            grid[y][x] = 0.2 + 0.4 * (value - low) / span  # never white, and light enough for black numbers
    axes.pcolormesh(grid, cmap="Blues", vmin=0, vmax=1, edgecolors="white", linewidth=0.8)
    axes.set_ylim(len(rows), 0)
    middles = [index + 0.5 for index in range(len(columns))]
    axes.set_xticks(middles, map(clean, columns), rotation=45, ha="right", rotation_mode="anchor", parse_math=False)
    axes.set_yticks([y + 0.5 for y in range(len(rows))], map(clean, rows), fontsize=SMALL, parse_math=False)
    axes.tick_params(length=0)
    axes.set_ylabel("layer")
    if len(columns) <= MOST_NUMBERS:
        for name in shown:
            x, y = cells[name]
            colour = DARK_GREY if name in white else "black"
            text = axes.text(x + 0.5, y + 0.5, texts[name], ha="center", va="center", fontsize=SMALL, color=colour)
            text.set_in_layout(False)  # it is within the axes, and measuring it takes long


# --- Files ------------------------------------------------------------------------------------------------------------


def make_figure(size: tuple[float, float], title: str) -> "Figure":
    """Return an empty figure of ``size`` inches with a title, which is broken into lines that fit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    lines = textwrap.fill(title, width=int(9 * size[0]))
    figure.suptitle(lines, fontsize=12, fontweight="bold", parse_math=False)
    return figure


@contextlib.contextmanager
def own_style() -> Iterator[None]:
    """Use matplotlib's default style with ``STYLE`` within the block, whatever the style of the process is."""
    from matplotlib import style

    with style.context(["default", STYLE]):
        yield


def write_figure(make: Callable[[], "Figure"], paths: Iterable[Path]) -> None:
    """Make a figure and write it to each of ``paths``, whose ending is its format; each appears at once and complete.

    Raises:
        LayerselError: if matplotlib is not installed, or a file cannot be written.
    """
    if not has_matplotlib():
        raise LayerselError(MISSING)
    with own_style():
        figure: Any = make()
        figure.get_layout_engine().execute(figure)
        figure.set_layout_engine("none")  # formats would each do it again
        for path in paths:
            content, kind = io.BytesIO(), path.suffix[1:].lower()
            figure.savefig(content, format=kind, dpi=150, metadata=UNDATED.get(kind))
            write_atomically(path, content.getvalue())
