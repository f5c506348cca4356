"""The benchmark for GPUs, run on a CPU."""

import json
import os
import subprocess

import pytest
from helpers.places import ENVIRONMENT, HANGS, ROOT

SIZE = ["--hidden-size", "64", "--layers", "4", "--vocabulary", "256", "--tokens", "16", "--rank", "4", "--steps", "24"]
ARMS = ["lora", "l1ra, kernels", "l1ra, kernels, adamw_bnb_8bit", "half by last, kernels"]


@pytest.mark.nightly
def test_one_command_checks_and_times_the_package(tmp_path):
    path = tmp_path / "gpu.json"
    command = ["benchmarks/gpu.sh", "--device", "cpu", *SIZE, "--json", str(path), "--arms", *ARMS]
    environment = {**os.environ, **ENVIRONMENT, "PROCESSES": "2"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANGS)
    assert run.returncode == 0, run.stderr[-3000:]
    document = json.loads(path.read_text())
    assert list(document["arms"]) == ARMS
    for name, arm in document["arms"].items():
        assert arm["ranks_agree"] and len(arm["seconds"]) == 21 and len(arm["losses"]) == 24
        assert (arm["moments_set_to_zero"] > 0) == ("l1ra" in name)
    assert document["kernel_differences"]["fp32 base"] <= 1e-5
    assert "gates in kernels, fp32 base" in run.stdout and "half by last, kernels" in run.stdout
