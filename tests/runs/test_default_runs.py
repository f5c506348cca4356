"""Defaults that depend on the run, and the warning about keys that nothing reads."""

import json

from helpers.defaults import UNREAD, choose
from helpers.models import make_rows
from helpers.settings import l1ra, selection

from axolotl_layersel.common.paths import plan_path
from axolotl_layersel.selection.plan_file import read_plan


def test_fewer_rows_than_processes_are_enough(zygote, tmp_path):
    codes = zygote.run("helpers.defaults:run_process", {"folder": str(tmp_path)}, 3, tmp_path / "log", {})
    assert codes == [0] * 3, (tmp_path / "log.0").read_text()[-3000:]
    plans = json.loads((tmp_path / "plans.json").read_text())
    for method, block in {"cosine": {"num_samples": 2}, "gradient": {}}.items():
        _, alone = choose(tmp_path / method, make_rows(2, seed=2), method=method, **block)
        assert plans[method] == alone.model_dump(include={"modules", "ranks", "calibration_rows"})
    assert len(plans["flexora"]["calibration_rows"]) == 1


def test_a_run_on_two_processes_names_them_once_and_resumes_without_them(train):
    unread = {**selection("first", num_samples=999)["layersel"], **l1ra(rule="saliency", l1_lambda=0.5)["layersel"]}
    run = train("ddp", layersel=unread)
    assert run.log.count(UNREAD) == 1
    assert "num_samples: 999 (with method: first); layersel.l1ra.l1_lambda: 0.5 (with rule: saliency)" in run.log
    fewer = {**selection("first")["layersel"], **l1ra(rule="saliency")["layersel"]}
    resumed = train("ddp", output=run.folder, layersel=fewer, resume_from_checkpoint=str(run.folder / "checkpoint-4"))
    assert UNREAD not in resumed.log
    assert read_plan(plan_path(resumed.folder)).selected == [0, 1, 2, 3]
