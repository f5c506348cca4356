"""Plans in the experiment trackers that Axolotl installs, by the Trainer's own callbacks for them."""

import contextlib
import inspect
import json
import logging
import sqlite3
import uuid
from pathlib import Path

import pytest
from helpers.plans import list_modules, make_plan
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import integration_utils

from axolotl_layersel.common.paths import picture_path, plan_path
from axolotl_layersel.reports.pictures import RunPictures
from axolotl_layersel.reports.trackers import TRACKERS, send_plan, tabulate
from axolotl_layersel.selection.plan import Plan
from axolotl_layersel.selection.plan_file import write_plan

MODULES = list_modules(2)
PLAN = make_plan(scores=[0.5, None, 0.125], selected=(0, 2))


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """Begin a run with a tracker, and return the tracker's callback and a function that ends it."""
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb"))
    (tmp_path / "wandb").mkdir()
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    begun = []

    def begin(name: str):
        callback = getattr(integration_utils, name)()
        arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, run_name="a run")
        state, control = TrainerState(is_world_process_zero=True), TrainerControl()
        callback.on_train_begin(arguments, state, control)
        begun.append(lambda: callback.on_train_end(arguments, state, control))
        return callback, begun.pop

    yield begin
    for end in begun:
        end()


def send(callback, folder: Path, plan: Plan = PLAN) -> None:
    write_plan(plan, plan_path(folder))
    RunPictures(folder, plan, None).draw_plan()
    send_plan([callback], plan, folder)


def test_every_tracker_that_is_served_is_one_of_transformers():
    assert set(TRACKERS) <= {kind.__name__ for kind in integration_utils.INTEGRATION_TO_CALLBACK.values()}
    # MLflow's cannot be made, because Axolotl does not install mlflow.
    assert "self._ml_flow = mlflow\n" in inspect.getsource(integration_utils.MLflowCallback)


def test_tensorboard_shows_the_table_and_the_picture(tmp_path, begin):
    callback, end = begin("TensorBoardCallback")
    send(callback, tmp_path)
    end()()
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    log = EventAccumulator(str(events)).Reload()
    (table,) = log.Tensors("layersel/plan/text_summary")
    text = table.tensor_proto.string_val[0].decode()
    assert text.splitlines() == [
        "| layer | score | kept |",
        "| --- | --- | --- |",
        "| 0 | 0.5 | yes |",
        "| 1 |  |  |",
        "| 2 | 0.125 | yes |",
    ]
    (picture,) = log.Images("layersel/picture")
    assert picture.step == table.step == 0 and picture.width > 1000
    assert log.Tags()["scalars"] == []


def test_wandb_gets_the_table_the_picture_and_the_plan_as_an_artifact(tmp_path, begin):
    callback, _ = begin("WandbCallback")
    send(callback, tmp_path)
    import wandb

    run = wandb.run
    run.finish()
    wandb.teardown()  # its service may hold the record back until it ends
    files = Path(run.dir)
    (table,) = (files / "media" / "table").rglob("*.table.json")
    assert json.loads(table.read_text()) == {
        "columns": ["layer", "score", "kept"],
        "data": [[0, 0.5, True], [1, None, False], [2, 0.125, True]],
    }
    (picture,) = (files / "media" / "images").rglob("*.png")
    assert picture.read_bytes() == picture_path(tmp_path, "scores", ".png").read_bytes()
    (record,) = files.parent.glob("*.wandb")
    assert b"layersel-plan-" in record.read_bytes()


@pytest.mark.filterwarnings("ignore")
def test_trackio_gets_the_table_the_picture_and_the_plan_as_a_file(tmp_path):
    import trackio
    from trackio.utils import TRACKIO_DIR

    # The callback of transformers 5.16.1 needs a trackio that is newer than the 0.19.0 that Axolotl installs.
    callback, project = integration_utils.TrackioCallback(), f"layersel-{uuid.uuid4().hex}"
    trackio.init(project=project, name="a-run", embed=False)
    send(callback, tmp_path)
    trackio.finish()
    with contextlib.closing(sqlite3.connect(TRACKIO_DIR / f"{project}.db")) as store:
        ((content,),) = store.execute("select metrics from metrics")
    content = json.loads(content)
    assert content["layersel/plan"]["_value"] == [
        {"layer": 0, "score": 0.5, "kept": True},
        {"layer": 1, "score": "-", "kept": False},
        {"layer": 2, "score": 0.125, "kept": True},
    ]
    media = TRACKIO_DIR / "media"
    picture = media / content["layersel/picture"]["file_path"]
    assert picture.read_bytes() == picture_path(tmp_path, "scores", ".png").read_bytes()
    assert (media / project / "files" / "plan.json").read_bytes() == plan_path(tmp_path).read_bytes()


def test_a_tracker_that_fails_is_one_warning_and_the_others_get_the_plan(tmp_path, begin, caplog):
    broken, _ = begin("TensorBoardCallback")
    broken.tb_writer.file_writer = broken.tb_writer.all_writers = None
    (tmp_path / "file").touch()
    broken.tb_writer.log_dir = str(tmp_path / "file" / "log")  # where no folder can be made
    whole, end = begin("TensorBoardCallback")
    write_plan(PLAN, plan_path(tmp_path))
    with caplog.at_level(logging.WARNING, "axolotl.layersel"):
        send_plan([broken, TrainerCallback(), whole], PLAN, tmp_path)
    (warning,) = caplog.messages
    assert warning.startswith("layersel: TensorBoard has not received the plan (")
    assert warning.endswith(f"The run goes on; the plan is in {plan_path(tmp_path)}.")
    end()()
    broken.tb_writer = None
    logs = [EventAccumulator(str(events)).Reload() for events in tmp_path.rglob("events.out.tfevents.*")]
    assert sum("layersel/plan/text_summary" in log.Tags()["tensors"] for log in logs) == 1


@pytest.mark.parametrize(
    ("plan", "columns", "first"),
    [
        (PLAN, ["layer", "score", "kept"], [0, 0.5, True]),
        (
            make_plan(ranks={MODULES[0]: 8}, modules=MODULES[:1]),
            ["module", "score", "kept", "rank"],
            [MODULES[0], 0.5, True, 8],
        ),
        (
            make_plan(modules=MODULES[1:2], module_scores={name: 0.25 for name in MODULES}, granularity="module"),
            ["module", "score", "kept"],
            [MODULES[0], 0.25, False],
        ),
    ],
    ids=["layers", "ranks", "modules"],
)
def test_a_plan_as_a_table(plan, columns, first):
    headings, rows = tabulate(plan)
    assert headings == columns
    assert rows[0] == first
    assert {len(row) for row in rows} == {len(headings)}
