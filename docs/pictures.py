"""Draw the pictures of the runs in benchmarks/results: ``python docs/pictures.py``."""

import math
import statistics
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from scipy.stats import t as student

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.held_out.rates import choose_rates  # noqa: E402
from benchmarks.held_out.runs import read_runs  # noqa: E402
from benchmarks.held_out.tables import draw_regimes  # noqa: E402

PICTURE = ROOT / "docs" / "images" / "held-out-loss.svg"
REGIMES = ROOT / "benchmarks" / "results" / "regimes"
MODELS = {
    "small Llama, 5.5 M parameters": "small-llama-gsm8k.csv",
    "SmolLM2-135M": "smollm2-gsm8k.csv",
}
# Told apart without colours too.
ARMS = {
    "gradient": ("method: gradient", {"marker": "o", "color": "#0072b2"}),
    "l1ra": ("l1ra", {"marker": "s", "color": "#d55e00"}),
    "cka": ("cka, half of the layers", {"marker": "^", "color": "#666666", "linestyle": "dashed"}),
}
# Text stays text, and the same runs draw the same file.
matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "axolotl-layersel", "font.size": 11})


def find_differences(path: Path) -> dict[str, list[tuple[int, float, float]]]:
    """Return the points of each arm.

    A point has the rank, the mean difference of the test loss from LoRA's in percent, and half of the 95 % interval of
    that mean by Student's t.
    """
    runs = read_runs(path)
    rates = choose_rates(runs)
    losses: dict[tuple[str, int], dict[int, float]] = {}
    for run in runs:
        if run["rate"] == rates[run["arm"], run["rank"]]:
            losses.setdefault((run["arm"], run["rank"]), {})[run["seed"]] = run["test"]
    points: dict[str, list[tuple[int, float, float]]] = {arm: [] for arm in ARMS}
    for (arm, rank), by_seed in sorted(losses.items()):
        if arm not in ARMS:
            continue
        plain = losses["lora", rank]
        base = statistics.mean(plain.values())
        differences = [100 * (loss - plain[seed]) / base for seed, loss in by_seed.items() if seed in plain]
        error = statistics.stdev(differences) / math.sqrt(len(differences))
        half = student.ppf(0.975, len(differences) - 1) * error
        points[arm].append((rank, statistics.mean(differences), float(half)))
    return points


def draw(path: Path) -> None:
    """Draw the held-out loss less plain LoRA's, by the rank whose parameters all arms have."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, len(MODELS), sharey=True)
    said = []
    for panel, (title, name) in zip(panels, MODELS.items()):
        panel.axhline(0, color="black", linewidth=1)
        for shift, (arm, points) in enumerate(find_differences(ROOT / "benchmarks" / "results" / name).items()):
            said += [f"{title}, {arm}, r {rank}: {mean:+.2f} ± {half:.2f} %" for rank, mean, half in points]
            if points:
                ranks, means, halves = zip(*points)
                label, style = ARMS[arm]
                # Side by side, so that intervals do not cover each other.
                places = [rank * 1.06 ** (shift - 1) for rank in ranks]
                panel.errorbar(places, means, halves, label=label, capsize=3, linewidth=1.5, **style)
        panel.set(title=title, xscale="log", xlabel="trainable parameters, as LoRA of rank", xlim=(0.85, 20))
        panel.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        panel.xaxis.set_minor_locator(NullLocator())
    panels[0].set_ylabel("held-out loss, less LoRA's, %")
    panels[-1].annotate("plain LoRA", (1, 0), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=9)
    panels[-1].legend(frameon=False, fontsize=9, loc="lower right")
    metadata = {"Date": None, "Creator": None, "Description": "; ".join(said)}
    figure.savefig(path, metadata=metadata if path.suffix == ".svg" else None)


if __name__ == "__main__":
    draw(PICTURE)
    draw_regimes([run for path in sorted(REGIMES.glob("*.csv")) for run in read_runs(path)], PICTURE.parent / "regimes")
