"""A short version of ``make demo``: prepare, train with real Axolotl, report."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.places import ENVIRONMENT, ROOT
from safetensors.torch import load_file

from axolotl_layersel.reports.closing import describe_run

STEPS = 4


def run(*command: str) -> str:
    """Return the output of a command, which must succeed."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout[-6000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, str, str]:
    """The folder of the demo, and the output of its training and of its report."""
    work = tmp_path_factory.mktemp("demo")
    run(sys.executable, "-m", "demo.prepare", "--work", str(work), "--max-steps", "5")
    text = (ROOT / "example_configs" / "demo.yml").read_text().replace("demo/work", str(work))
    text, replaced = re.subn(r"^eval_steps: .*$", f"eval_steps: {STEPS}\nmax_steps: {STEPS}", text, flags=re.MULTILINE)
    assert replaced == 1
    (work / "demo.yml").write_text(text)
    trained = run("axolotl", "train", str(work / "demo.yml"))
    return work, trained, run(sys.executable, "-m", "demo.report", "--output", str(work / "output"))


def test_the_base_model_is_kept_for_the_next_time(demo):
    work, *_ = demo
    before = (work / "base" / "model.safetensors").stat()
    printed = run(sys.executable, "-m", "demo.prepare", "--work", str(work), "--max-steps", "5")
    assert "exists already" in printed
    assert (work / "base" / "model.safetensors").stat().st_mtime_ns == before.st_mtime_ns


def test_training_prints_the_layer_table(demo):
    _, trained, _ = demo
    assert "cka keeps 4 of 8 layers" in trained
    rows = re.findall(r"│\s+(\d)\s+│\s+([\d.e-]+)\s+│[█\s]*│\s+(yes)?\s+│", trained)
    assert [int(layer) for layer, _, _ in rows] == list(range(8))
    assert sum(bool(chosen) for _, _, chosen in rows) == 4


def test_training_ends_with_what_it_has_come_to(demo):
    work, trained, _ = demo
    closing = describe_run(work / "output", work / "demo.yml")
    assert trained.splitlines()[-len(closing) :] == closing
    assert trained.count(closing[0]) == 1


def test_the_adapter_holds_the_chosen_layers(demo):
    work, *_ = demo
    plan = json.loads((work / "output" / "layersel" / "plan.json").read_text())
    chosen = {choice["layer"] for choice in plan["layers"] if choice["selected"]}
    tensors = load_file(work / "output" / "adapter_model.safetensors")
    assert {int(re.search(r"\.layers\.(\d+)\.", name)[1]) for name in tensors} == chosen
    assert len(plan["calibration_rows"]) == 64


def test_the_report_ends_with_the_adapter_and_the_losses(demo):
    work, _, report = demo
    adapter, losses = report.splitlines()[-2:]
    assert adapter == f"adapter: {work / 'output'}"
    history = json.loads((work / "output" / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
    before, after = (entry["eval_loss"] for entry in history if "eval_loss" in entry)
    assert losses == f"eval loss: {before:.3f} before training, {after:.3f} after {STEPS} steps"
    assert after < before
