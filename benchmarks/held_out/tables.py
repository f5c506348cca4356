"""Tables and pictures of runs: means over seeds, and paired differences with their intervals."""

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student

from benchmarks.held_out.arms import HALF_RANK, strip_draw
from benchmarks.held_out.rates import choose_rate, choose_rates, is_at_edge
from benchmarks.held_out.runs import REGIME, add_half_ranks, find_regime

BySeed = dict[int, dict[str, Any]]
# Figures that are compared with the rivals' in tables of their own.
COMPARED = {
    "test": "loss at the end",
    "test_best": "loss at its best",
    "accuracy": "accuracy at the end",
    "forgetting": "forgetting",
}
RIVALS = ("lora", HALF_RANK, "random same rank")  # the arms that a choice must beat
# The columns of a regime's first table; those of seconds have one decimal.
SHOWN = {
    "parameters": "parameters",
    "seconds_choosing": "s choosing",
    "seconds_training": "s training",
    "training": "loss on trained rows",
    **COMPARED,
}
DECIMALS = {"parameters": 0, "seconds_choosing": 1, "seconds_training": 1}
EDGE = "(edge)"
MARKERS = "osD^vP*X"  # arms are told apart without colours too


def describe_difference(differences: Sequence[float]) -> str:
    """Return the mean of paired differences and its 95 % interval by Student's t."""
    mean = statistics.mean(differences)
    half = find_half(differences)
    return f"{mean:+.4f}" if half is None else f"{mean:+.4f} ± {half:.4f}"


def find_half(differences: Sequence[float]) -> float | None:
    """Return half of the 95 % interval of the mean by Student's t; None of a single difference."""
    if len(differences) < 2:
        return None
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return float(student.ppf(0.975, len(differences) - 1)) * error


def find_mean(by_seed: BySeed, name: str) -> float:
    """Return the mean of a column over the runs of an arm."""
    return statistics.mean(run[name] for run in by_seed.values())


# --- One table and its picture ------------------------------------------------------------------------------------


def print_table(runs: list[dict[str, Any]], against: str, picture: Path | None) -> None:
    """Print each arm's mean figures at its best rate, and their paired differences to those of ``against``.

    Raises:
        ValueError: if the runs are of several regimes, which one table cannot tell apart.
    """
    if len({find_regime(run) for run in runs}) > 1:
        raise ValueError("the runs are of several regimes. Use the command `regimes`, which has a table for each.")
    rates = choose_rates(runs)
    arms: dict[tuple[str, int], BySeed] = defaultdict(dict)
    for run in runs:
        if rates[run["arm"], run["rank"]] == run["rate"]:
            arms[run["arm"], run["rank"]][run["seed"]] = run
    wanted = ["test", "accuracy", "seconds_choosing", "seconds_training"]
    figures = [name for name in wanted if all(name in run for run in runs)]
    less = f"less {against}'s"
    table = Table("rank", "arm", "rate", "seeds", *(title for name in figures for title in (name, less)))
    for (arm, rank), by_seed in sorted(arms.items(), key=lambda item: (item[0][1], find_mean(item[1], "test"))):
        others = arms.get((against, rank), {})
        cells = []
        for name in figures:
            pairs = [run[name] - others[seed][name] for seed, run in by_seed.items() if seed in others]
            cells += [
                f"{find_mean(by_seed, name):.4f}",
                describe_difference(pairs) if pairs and arm != against else "",
            ]
        table.add_row(str(rank), arm, f"{rates[arm, rank]:g}", str(len(by_seed)), *cells)
    Console(width=180).print(table)
    if picture:
        draw_curves(arms, picture)


def draw_curves(arms: Mapping[tuple[str, int], BySeed], path: Path) -> None:
    """Draw the mean test loss of the arms with several ranks by trainable parameters and by time."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    by_parameters, by_time = figure.subplots(1, 2, sharey=True)
    for arm in dict.fromkeys(arm for arm, _ in arms):
        points = [by_seed for (name, _), by_seed in sorted(arms.items(), key=lambda item: item[0][1]) if name == arm]
        if len(points) > 1:
            losses = [find_mean(by_seed, "test") for by_seed in points]
            seconds = [find_mean(runs, "seconds_choosing") + find_mean(runs, "seconds_training") for runs in points]
            by_parameters.plot([find_mean(runs, "parameters") for runs in points], losses, marker="o", label=arm)
            by_time.plot(seconds, losses, marker="o", linestyle="none", label=arm)
    by_parameters.set(xscale="log", xlabel="trainable parameters", ylabel="loss of held-out answers")
    by_time.set(xlabel="processor seconds, choosing and training")
    by_parameters.xaxis.set_minor_formatter(NullFormatter())
    by_parameters.legend()
    figure.savefig(path)


# --- Tables by regime ---------------------------------------------------------------------------------------------


def list_sections(runs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return the runs of each regime and rank with several arms, in the order of their sections."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for run in add_half_ranks(runs):
        key = (*find_regime(run), run["rank"])
        groups[key].append(run)
    # A group of nothing but LoRA at half of its rank belongs to another rank.
    sections = [group for group in groups.values() if len({run["arm"] for run in group} - {HALF_RANK}) > 1]
    return sorted(sections, key=order_setting)


def describe_regimes(runs: list[dict[str, Any]], rivals: Sequence[str], pictures: str | None = None) -> list[str]:
    """Return the lines of a section of Markdown for each regime and rank: the figures, and who beats whom.

    ``pictures`` is the folder of the pictures that ``draw_regimes`` draws, as the sections refer to it.
    """
    lines = []
    for section in list_sections(runs):
        heading, *others = describe_regime(section, rivals)
        name = find_picture_name(section[0])
        picture = [f"![Loss by parameters, time and forgetting]({pictures}/{name})", ""] if pictures else []
        lines += [heading, "", *picture, *others[1:], ""]
    return lines


def draw_regimes(runs: list[dict[str, Any]], folder: Path) -> None:
    """Draw the picture of each section into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for section in list_sections(runs):
        draw_regime(section, folder / find_picture_name(section[0]))


def order_setting(runs: list[dict[str, Any]]) -> tuple[Any, ...]:
    """Return the key by which sections are sorted: the model and the data, then few rows and long training first."""
    run = runs[0]
    return run.get("base") or "", run.get("task") or "", run.get("rows") or 0, -(run.get("epochs") or 0), run["rank"]


def find_picture_name(run: Mapping[str, Any]) -> str:
    """Return the name of a section's picture."""
    return "-".join(re.findall(r"[a-z0-9]+", describe_setting(run).lower())) + ".svg"


def describe_regime(runs: list[dict[str, Any]], rivals: Sequence[str]) -> list[str]:
    """Return the lines of Markdown about the runs of one regime and rank."""
    groups = group_by_arm(runs)
    arms = {name: choose_runs(group) for name, group in groups.items()}
    lines = [f"## {describe_setting(runs[0])}", ""]
    titles = {name: title for name, title in SHOWN.items() if is_measured(runs, name)}
    if all(run.get("test_best") == run["test"] for run in runs):
        titles.pop("test_best", None)  # every run was evaluated only at its end, or was best there
    ordered = sorted(arms, key=lambda name: find_mean(arms[name][0], "test"))
    rows = []
    for name in ordered:
        by_seed, at_edge = arms[name]
        rate = f"{next(iter(by_seed.values()))['rate']:g}" + (f" {EDGE}" if at_edge else "")
        figures = [f"{find_mean(by_seed, column):.{DECIMALS.get(column, 4)}f}" for column in titles]
        rows.append([name, rate, str(len(by_seed)), *figures])
    lines += format_table(["arm", "rate", "seeds", *titles.values()], rows)
    if any(at_edge for _, at_edge in arms.values()):
        lines += [
            "",
            f"{EDGE}: this rate is the lowest or highest one that was tried, so a better one may be beyond it.",
        ]
    against = {rival: average_draws(arms, rival) for rival in rivals}
    present = [rival for rival in rivals if against[rival]]
    for column, title in COMPARED.items():
        if present and column in titles:
            cells = [[name, *(compare(arms[name][0], against[rival], column) for rival in present)] for name in ordered]
            lines += ["", *format_table([title, *(f"less that of {rival}" for rival in present)], cells)]
    return [*lines, "", *describe_rates({name: groups[name] for name in ordered})]


def describe_rates(groups: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    """Return the lines of a table with the loss, and the forgetting if measured, at each rate that was tried.

    The figures are those of the lowest seed, which was run at all rates. ``groups``: the runs of each arm.
    """
    runs = [run for group in groups.values() for run in group]
    seed, rates = min(run["seed"] for run in runs), sorted({run["rate"] for run in runs})
    forgets = is_measured(runs, "forgetting")

    def describe(run: dict[str, Any]) -> str:
        return f"{run['test']:.3f}" + (f"; {run['forgetting']:.2f}" if forgets else "")

    rows = []
    for name, group in groups.items():
        by_rate = {run["rate"]: describe(run) for run in list_by_rate(group, seed)}
        rows.append([name, *(by_rate.get(rate, "") for rate in rates)])
    title = f"seed {seed}: loss at the end{'; forgetting' if forgets else ''}, by rate"
    return format_table([title, *(f"{rate:g}" for rate in rates)], rows)


def list_by_rate(runs: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Return the runs of an arm with a seed, lowest rate first."""
    return sorted((run for run in runs if run["seed"] == seed), key=lambda run: run["rate"])


def describe_setting(run: Mapping[str, Any]) -> str:
    """Return what a run is trained on, and its rank."""
    base, task, rows, epochs, steps, batch_size, longest, *_ = (run.get(name) for name in REGIME)
    length = f"{epochs} epochs" if epochs else f"{steps} steps"
    place = f"{base}, {task}: {rows} rows, " if base else ""
    batch = f" of {batch_size} rows cut at {longest} tokens" if batch_size else ""
    return f"{place}{length}{batch}, r {run['rank']}"


def group_by_arm(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the runs of each arm."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        groups[run["arm"]].append(run)
    return groups


def choose_runs(runs: list[dict[str, Any]]) -> tuple[BySeed, bool]:
    """Return the runs of an arm at its best rate by seed, and whether that rate is at the edge of those tried."""
    losses: dict[float, dict[int, float]] = defaultdict(dict)
    for run in runs:
        losses[run["rate"]][run["seed"]] = run["validation"]
    best = choose_rate(losses)
    return {run["seed"]: run for run in runs if run["rate"] == best}, is_at_edge(best, losses)


def is_measured(runs: list[dict[str, Any]], name: str) -> bool:
    """Return whether all runs have a figure."""
    return all(run.get(name) is not None for run in runs)


def average_draws(arms: Mapping[str, tuple[BySeed, bool]], rival: str) -> dict[int, dict[str, float]]:
    """Return the figures of a rival by seed, each the mean over its draws.

    Only seeds that all draws were run with count, so that every mean is over as many draws.
    """
    draws = [by_seed for name, (by_seed, _) in arms.items() if strip_draw(name) == rival]
    if not draws:
        return {}
    seeds = set.intersection(*(set(by_seed) for by_seed in draws))
    names = [name for name in COMPARED if all(is_measured([*by_seed.values()], name) for by_seed in draws)]
    return {seed: {name: statistics.mean(draw[seed][name] for draw in draws) for name in names} for seed in seeds}


def compare(by_seed: BySeed, rival: Mapping[int, Mapping[str, float]], name: str) -> str:
    """Return the paired difference of a figure to a rival's, its interval, and the difference in percent.

    It is bold if the interval does not hold 0. It is empty if no seed is common or no pair differs, as for the rival
    itself.
    """
    seeds = [seed for seed in by_seed if seed in rival]
    pairs = [by_seed[seed][name] - rival[seed][name] for seed in seeds]
    if not pairs or not any(pairs):
        return ""
    mean, half = statistics.mean(pairs), find_half(pairs)
    text, level = describe_difference(pairs), abs(statistics.mean(rival[seed][name] for seed in seeds))
    if level:
        text += f" ({100 * mean / level:+.1f} %)"
    return f"**{text}**" if half is not None and abs(mean) > half else text


def format_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table in Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def draw_regime(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw the loss at the end less LoRA's, with its interval, by parameters, by time and by forgetting.

    The panel of forgetting also has a line for each arm through the rates that LoRA's lowest seed was run at.
    """
    groups = group_by_arm(runs)
    arms = {name: choose_runs(group)[0] for name, group in groups.items()}
    plain = arms["lora"]
    seed = min(plain)
    sums = {name: [{**run, "seconds": find_seconds(run)} for run in by_seed.values()] for name, by_seed in arms.items()}
    axes = {"parameters": "trainable parameters", "seconds": "processor seconds, choosing and training"}
    if is_measured(runs, "forgetting"):
        axes["forgetting"] = "forgetting: rise of the loss on general text"
    figure = Figure(figsize=(5 * len(axes), 5), layout="constrained")
    for panel, (column, title) in zip(figure.subplots(1, len(axes), sharey=True), axes.items()):
        for place, (name, by_seed) in enumerate(arms.items()):
            pairs = [run["test"] - plain[seed]["test"] for seed, run in by_seed.items() if seed in plain]
            if pairs:
                x, half = statistics.mean(run[column] for run in sums[name]), find_half(pairs) or 0.0
                look = {"color": f"C{place % 10}", "marker": MARKERS[place % len(MARKERS)], "capsize": 3}
                panel.errorbar(x, statistics.mean(pairs), half, label=name, **look)
            if column == "forgetting":
                tried = list_by_rate(groups[name], seed)
                losses = [run["test"] - plain[seed]["test"] for run in tried]
                forgotten = [run["forgetting"] for run in tried]
                panel.plot(forgotten, losses, color=f"C{place % 10}", linewidth=0.8, linestyle="dotted")
        panel.axhline(0, color="grey", linewidth=0.8)
        panel.set(xlabel=title)
        if column == "forgetting":
            panel.set_title("dotted: every rate that was tried, first seed", fontsize="small")
        else:
            panel.set_xlim(0, 1.1 * max(run[column] for by_seed in sums.values() for run in by_seed))
    figure.axes[0].set(ylabel="loss of held-out answers, less LoRA's")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.suptitle(describe_setting(runs[0]))
    # Text stays text, and the same runs draw the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "axolotl-layersel"}):
        figure.savefig(path, metadata={"Date": None})


def find_seconds(run: Mapping[str, Any]) -> float:
    """Return the processor seconds of choosing and training."""
    return run["seconds_choosing"] + run["seconds_training"]
