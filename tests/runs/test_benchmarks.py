"""Every script of benchmarks/ whose figures the documentation has runs in small, as it is started there."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.encoder_decoders import make_tokenizer
from helpers.models import make_small_llama
from helpers.places import ENVIRONMENT, HANGS, ROOT

from benchmarks.planted import make_model

SMALL = "--hidden-size 64 --layers 4 --vocabulary 256 --batch-size 2 --rank 2"
SCRIPTS = {
    "selection_cost.py": f"{SMALL} --lengths 16 --samples 8 --repeats 1 --memory-repeats 1 --json out.json",
    "training_cost.py": f"{SMALL} --tokens 16 --steps 3 --warmup 1 --memory-repeats 1 --json out.json",
    "gradient_cost.py": f"{SMALL} --tokens 16 --samples 4 --repeats 1 --json out.json",
    "l1ra_cost.py": f"{SMALL} --max-rank 4 --tokens 16 --steps 3 --memory-repeats 1 --update-layers 2 --update-steps 4 "
    "--json out.json",
    "flexora_cost.py": f"{SMALL} --tokens 16 --steps 3 --seeds 1 --search-steps 2 --json out.json",
    "scaling.py": f"{SMALL} --depths 2 --tokens 16 --samples 4 --repeats 1 --long-tokens 32 --long-vocabulary 256 "
    "--json out.json",
    "edit_cost.py": "--repeats 1",
    "gate_overhead.py": "--layers 2 --rounds 1",
}


def start(folder: Path, script: str, *arguments: str) -> str:
    """Return what a script printed."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *arguments],
        cwd=folder,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.nightly
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_benchmark_of_cost_runs_in_small(tmp_path, script):
    printed = start(tmp_path, script, *SCRIPTS[script].split())
    assert printed.strip()
    if "--json" in SCRIPTS[script]:
        assert json.loads((tmp_path / "out.json").read_text())


@pytest.mark.nightly
def test_the_benchmarks_of_quality_gains_and_gates_run_in_small(tmp_path):
    base = tmp_path / "base"
    tokenizer = make_tokenizer()
    make_small_llama(layers=3).save_pretrained(base)
    tokenizer.save_pretrained(base)
    rows = [{"question": f"{10 + i % 50} {11 + i % 7}", "answer": f"{20 + i % 50} 5 {30 + i % 9}"} for i in range(150)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ("--longest", "32", "--held-out", "8")
    grid = (
        "--rates",
        "1e-3",
        "2e-3",
        "--ranks",
        "2",
        "--steps",
        "2",
        "--seeds",
        "0",
        "--rows",
        "130",
        "--test-rows",
        "8",
    )
    arms = ("--arms", "lora", "gradient")
    start(tmp_path, "quality.py", "train", "base", "rows.jsonl", "rows.jsonl", "runs.csv", *data, *grid, *arms)
    start(tmp_path, "gain.py", "measure", "base", "rows.jsonl", "runs.csv", "gains.csv", *data, "--train-rows", "130")
    (gain,) = csv.DictReader((tmp_path / "gains.csv").open())
    assert gain["arm"] == "gradient" and float(gain["chosen_over_uniform"]) > 1
    steps = ("--rows", "16", "--steps", "2", "--search-steps", "2", "--rank", "2")
    start(tmp_path, "gate_worth.py", "base", "rows.jsonl", "gates.csv", *data, *steps)
    assert len((tmp_path / "gates.csv").read_text().splitlines()) == 4


@pytest.mark.nightly
def test_the_benchmark_of_comparisons_runs_in_small(tmp_path):
    (tmp_path / "work").mkdir()
    torch.save(make_model().state_dict(), tmp_path / "work" / "base.pt")
    small = ("--tasks", "intact", "--seeds", "0", "--training-seeds", "2")
    start(tmp_path, "planted_compare.py", "work", "planted.csv", *small)
    (line,) = csv.DictReader((tmp_path / "planted.csv").open())
    assert (line["task"], line["seeds"]) == ("intact", "2") and line["standing"]
    assert set(json.loads(line["losses"])) == {"lora", "gradient", "random"}
