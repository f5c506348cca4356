"""Compare the runs of the demo: loss, parameters, time, and what the choice of layers gained and did not gain."""

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

from demo.runs import NAMES

FASTER = 0.97  # a step that takes more than this part of plain LoRA's counts as no faster


@dataclass(frozen=True)
class Result:
    """What one run came to.

    Args:
        layers: the chosen layers; None without the plugin.
        before, after: loss on the held-out rows before the first step and after the last.
        parameters: trainable parameters.
        step_seconds: time of an undisturbed step; None if the run was too short to measure it.
        scoring_seconds: how long the choice took; 0 without scores.
    """

    label: str
    layers: list[int] | None
    before: float
    after: float
    steps: int
    parameters: int
    step_seconds: float | None
    scoring_seconds: float


def read_result(output: Path) -> Result:
    """Return what the run in ``output`` came to.

    Raises:
        SystemExit: if the run did not finish.
    """
    weights = output / "adapter_model.safetensors"
    if not weights.exists():
        raise SystemExit(f"{output} has no adapter: the run did not finish.")
    before, after, steps, step_seconds = read_events(output)
    plan_path = output / "layersel" / "plan.json"
    plan = json.loads(plan_path.read_text(encoding="utf-8")) if plan_path.exists() else None
    layers = [choice["layer"] for choice in plan["layers"] if choice["selected"]] if plan else None
    label = f"{plan['method']}, {len(layers)} of {len(plan['layers'])} layers" if plan else "plain LoRA, all layers"
    scoring_seconds = plan["seconds"] if plan and plan["calibration_rows"] else 0.0
    return Result(label, layers, before, after, steps, count_parameters(weights), step_seconds, scoring_seconds)


def read_events(output: Path) -> tuple[float, float, int, float | None]:
    """Return the eval loss before and after training, the number of steps, and the seconds of a step.

    TensorBoard's records say when each loss was logged. The lower quartile of these times counts, because other
    programs on the machine make steps longer and never shorter.

    Raises:
        SystemExit: if the records lack an eval loss before or after training.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = sorted(output.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise SystemExit(f"{output} has no records of TensorBoard. Set use_tensorboard.")
    events = EventAccumulator(str(files[-1]))
    events.Reload()
    losses = events.Scalars("eval/loss") if "eval/loss" in events.Tags()["scalars"] else []
    if len(losses) < 2:
        raise SystemExit(f"{output} has no eval losses before and after training. Set eval_steps.")
    logged = events.Scalars("train/loss")
    paces = [
        (later.wall_time - earlier.wall_time) / (later.step - earlier.step)
        for earlier, later in itertools.pairwise(logged)
        if later.step > earlier.step  # the last one may be the mean of the whole run
    ]
    pace = statistics.quantiles(paces)[0] if len(paces) > 1 else None
    return losses[0].value, losses[-1].value, losses[-1].step, pace


def count_parameters(weights: Path) -> int:
    """Return the number of parameters in a file of weights."""
    from safetensors import safe_open

    with safe_open(weights, "np") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def lay_out(results: list[Result]) -> list[str]:
    """Return the lines of a table of ``results``."""
    rows = [("", "loss before", "loss after", "parameters", "s a step")]
    for result in results:
        pace = "" if result.step_seconds is None else f"{result.step_seconds:.2f}"
        rows.append((result.label, f"{result.before:.3f}", f"{result.after:.3f}", f"{result.parameters:,}", pace))
    label_width, *widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "   ".join([f"{label:{label_width}}", *(f"{cell:>{width}}" for cell, width in zip(cells, widths))]).rstrip()
        for label, *cells in rows
    ]


def compare_losses(lora: Result, choice: Result, drawn: Result) -> str:
    """Return a sentence on whether the choice won, and over what."""

    def differ(other: Result) -> str:
        percent = 100 * (choice.after / other.after - 1)
        return f"{abs(percent):.1f} % {'below' if percent < 0 else 'above'}"

    beats_lora, beats_drawn = choice.after < lora.after, choice.after < drawn.after
    first = f"The choice ends {differ(lora)} plain LoRA's loss and {differ(drawn)} the random choice's."
    if beats_lora and beats_drawn:
        verdict = "It wins both comparisons here."
    elif beats_lora:
        verdict = "It does not win: layers drawn by chance did as well or better, so the scores gained nothing here."
    elif beats_drawn:
        verdict = "It does not win: its scores beat chance here, and LoRA in all layers does as well or better."
    else:
        verdict = "It does not win: neither plain LoRA nor a random choice is worse here."
    return f"{first} {verdict} These are single runs; docs/results.md has means over several seeds."


def compare_times(lora: Result, choice: Result) -> str:
    """Return a sentence on what the choice saves."""
    if lora.step_seconds is None or choice.step_seconds is None:
        return "The runs were too short to compare the time of a step."
    part = choice.step_seconds / lora.step_seconds
    if part > FASTER:
        return f"The choice saves no time here: its step takes {part:.2f} of plain LoRA's."
    lowest = min(choice.layers or [0])
    why = f", because the backward pass ends at layer {lowest}" if lowest else ""
    needed = math.ceil(choice.scoring_seconds / (lora.step_seconds - choice.step_seconds))
    return (
        f"A step takes {part:.2f} of plain LoRA's time{why}. "
        f"Choosing took {choice.scoring_seconds:.1f} s, once, which {needed} steps save."
    )


def list_pictures(outputs: list[Path]) -> list[Path]:
    """Return the pictures that the runs in ``outputs`` drew."""
    return [path for output in outputs for path in sorted((output / "layersel").glob("*.png"))]


def describe_next() -> list[str]:
    """Return the lines that say how to go on with data of one's own."""
    activate = []
    if sys.prefix != sys.base_prefix:
        folder = os.path.relpath(sys.prefix)
        activate = [f"  source {sys.prefix if folder.startswith('..') else folder}/bin/activate"]
    return [
        "Next, on your own data: write train.jsonl and run.yml as docs/start.md shows, then",
        *activate,
        "  axolotl-layersel check run.yml",
        "  axolotl train run.yml",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("demo/work"), help="the folder of the runs")
    work = parser.parse_args().work
    outputs = {name: work / name for name in NAMES}
    results = {name: read_result(output) for name, output in outputs.items()}
    steps = results["choice"].steps
    print(f"\n{steps} steps on word problems at equal trainable parameters, and the loss on problems held out:\n")
    print("\n".join(lay_out(list(results.values()))))
    for sentences in (compare_losses(*results.values()), compare_times(results["lora"], results["choice"])):
        print(f"\n{textwrap.fill(sentences, 100)}")
    print(f"\nadapter: {outputs['choice']}")
    for picture in list_pictures(list(outputs.values())):
        print(f"picture: {picture}")
    print("\n" + "\n".join(describe_next()))


if __name__ == "__main__":
    main()
