"""Send a plan to a run's experiment trackers: a table, a picture, and where they keep files plan.json.

Relied on, and checked in tests/unit/reports/test_trackers.py:

* transformers 5.16.1: the Trainer's callback of each tracker has the name in ``TRACKERS``, opens its run in
  ``on_train_begin``, and stands before callbacks that are added later. TensorBoard's holds the writer of the run in
  ``tb_writer``. The others hold their library, which has one open run, in ``_wandb``, ``_trackio`` and ``_ml_flow``.
* wandb 0.31.0: ``run``, ``Table``, ``Image`` and ``Artifact``; the callback's axis is ``train/global_step``.
* trackio 0.19.0 and 0.43.0: ``context_vars.current_run``, ``Table`` of mappings, ``Image`` of a path, and ``save``.
* mlflow 3.17.2: ``active_run``, ``log_table`` and ``log_artifact``. It is not among the packages of the tests.
* tensorboard 2.21.0: ``add_text`` shows Markdown, and ``add_image`` takes an array of numbers from 0 to 1.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from axolotl_layersel.common.errors import warning_instead
from axolotl_layersel.common.paths import picture_path, plan_path
from axolotl_layersel.common.terminal import clean
from axolotl_layersel.config.layer_names import find_layer
from axolotl_layersel.selection.plan import Plan

NAME = "layersel/plan"  # of the table and of the file
PICTURE = "layersel/picture"


@dataclass(frozen=True)
class Report:
    """The plan of a run as a tracker shows it.

    Attributes:
        columns: the headings of the table.
        rows: the table: a row for each layer, or for each module where modules have scores or ranks of their own.
        picture: the path of a PNG file, None if none was drawn.
        plan: the path of plan.json.
    """

    columns: list[str]
    rows: list[list[Any]]
    picture: Path | None
    plan: Path


def send_plan(callbacks: Iterable[TrainerCallback], plan: Plan, folder: Path) -> None:
    """Send the plan of the run in ``folder`` to the trackers among ``callbacks``, whose runs are open.

    The error of a tracker is one warning, because it must not end the run.
    """
    then = f"The run goes on; the plan is in {plan_path(folder)}."
    for callback in callbacks:
        name = type(callback).__name__
        if name in TRACKERS:
            with warning_instead(f"{name.removesuffix('Callback')} has not received the plan", then):
                TRACKERS[name](callback, make_report(plan, folder))


def make_report(plan: Plan, folder: Path) -> Report:
    """Return the report of a plan, whose files are in the run's ``folder``."""
    pictures = [picture_path(folder, name, ".png") for name in ("scores", "ranks")]
    picture = next((path for path in pictures if path.exists()), None)
    columns, rows = tabulate(plan)
    return Report(columns, rows, picture, plan_path(folder))


def tabulate(plan: Plan) -> tuple[list[str], list[list[Any]]]:
    """Return the headings and the rows of a plan's table; a score is None where there is none."""
    ranks = ["rank"] if plan.ranks else []
    if not plan.module_scores and not plan.ranks:
        return ["layer", "score", "kept"], [[each.layer, each.score, each.selected] for each in plan.layers]
    scores = plan.module_scores
    if not scores:
        of_layers = {choice.layer: choice.score for choice in plan.layers}
        scores = {
            name: None if (layer := find_layer(plan.stack, name)) is None else of_layers[layer] for name in plan.ranks
        }
    kept = set(plan.modules)
    rows = [
        [clean(name), score, name in kept, *([plan.ranks.get(name)] if ranks else [])] for name, score in scores.items()
    ]
    return ["module", "score", "kept", *ranks], rows


def format_markdown(columns: list[str], rows: list[list[Any]]) -> str:
    """Return a table in Markdown, with empty cells for None."""
    texts = [columns, ["---"] * len(columns), *[[format_cell(value) for value in row] for row in rows]]
    return "\n".join(f"| {' | '.join(text)} |" for text in texts)


def format_cell(value: object) -> str:
    """Return a value of a table as text."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")


# --- One function for each tracker ------------------------------------------------------------------------------------


def send_to_tensorboard(callback: Any, report: Report) -> None:
    """Add the table as text, and the picture. TensorBoard keeps no files."""
    writer = callback.tb_writer
    if writer is None:
        return
    writer.add_text(NAME, format_markdown(report.columns, report.rows), 0)
    if report.picture is not None:
        from matplotlib.image import imread

        writer.add_image(PICTURE, imread(report.picture)[:, :, :3], 0, dataformats="HWC")
    writer.flush()


def send_to_wandb(callback: Any, report: Report) -> None:
    """Log the table and the picture, and plan.json as an artifact."""
    wandb = callback._wandb
    run = wandb.run
    if run is None:
        return
    content: dict[str, Any] = {NAME: wandb.Table(columns=report.columns, data=report.rows), "train/global_step": 0}
    if report.picture is not None:
        content[PICTURE] = wandb.Image(str(report.picture))
    run.log(content)
    artifact = wandb.Artifact(f"layersel-plan-{run.id}", type="layersel-plan")
    artifact.add_file(str(report.plan))
    run.log_artifact(artifact)


def send_to_trackio(callback: Any, report: Report) -> None:
    """Log the table and the picture, and save plan.json among the project's files."""
    trackio = callback._trackio
    if trackio.context_vars.current_run.get() is None:
        return
    # Columns of numbers would show None as NaN.
    rows = [dict(zip(report.columns, ["-" if value is None else value for value in row])) for row in report.rows]
    content: dict[str, Any] = {NAME: trackio.Table(data=rows)}
    if report.picture is not None:
        content[PICTURE] = trackio.Image(str(report.picture))
    trackio.log({**content, "train/global_step": 0})
    trackio.save(report.plan)


def send_to_mlflow(callback: Any, report: Report) -> None:
    """Log the table, the picture and plan.json as artifacts in the folder ``layersel``."""
    mlflow = callback._ml_flow
    if mlflow.active_run() is None:
        return
    columns = {name: [row[index] for row in report.rows] for index, name in enumerate(report.columns)}
    mlflow.log_table(columns, "layersel/table.json")
    for path in filter(None, (report.picture, report.plan)):
        mlflow.log_artifact(str(path), "layersel")


TRACKERS: dict[str, Callable[[Any, Report], None]] = {
    "MLflowCallback": send_to_mlflow,
    "TensorBoardCallback": send_to_tensorboard,
    "TrackioCallback": send_to_trackio,
    "WandbCallback": send_to_wandb,
}
