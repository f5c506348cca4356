"""Every example configuration passes Axolotl's own validation, and none holds a key that would be ignored."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from helpers.axolotl_files import PLUGIN, find_unknown_keys, validate, without_plugins
from helpers.places import ROOT
from pydantic import ValidationError

from axolotl_layersel.config.gate_requirements import LORA_KERNELS
from axolotl_layersel.config.root import LayerselConfig

CONFIGS = sorted((ROOT / "example_configs").glob("*.yml"))
# The first one whose jobs know what to do about a pod that is evicted without a switch being set.
OLDEST_KUBERNETES = "1.31"
PROCESSES = {
    "llama-3.1-8b-qlora-zero2": 8,
    "llama-3.1-8b-fsdp2": 8,
    "llama-3.1-70b-zero3-multinode": 16,
}


@pytest.fixture(autouse=True)
def no_plugins(monkeypatch):
    monkeypatch.chdir(ROOT)
    with without_plugins():
        yield


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def test_the_examples_are_there():
    assert [path.stem for path in CONFIGS] == [
        "demo",
        *sorted([*(f"llama-3.1-8b-{name}" for name in ("flexora", "gradient", "l1ra", "lora")), *PROCESSES]),
        "qwen2.5-vl-7b-both",
    ]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_axolotl_accepts_an_example(path):
    content = read(path)
    cfg = validate(content, PROCESSES.get(path.stem, 1))
    assert content["plugins"] == [PLUGIN]
    assert LayerselConfig.model_validate(cfg.layersel.to_dict()) == LayerselConfig(**content["layersel"])
    assert find_unknown_keys(content) == set()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_misspelt_key_is_refused(path):
    content = read(path)
    block, key = ("selection", "candidates") if "selection" in content["layersel"] else ("l1ra", "update_ratio")
    content["layersel"][block][f"{key[:-2]}{key[-1]}{key[-2]}"] = 0.5
    with pytest.raises(ValidationError, match=rf"layersel\.{block}\.{key[:-2]}.*did you mean '{key}'\?"):
        validate(content, PROCESSES.get(path.stem, 1))


def test_an_unlisted_plugin_or_an_ignored_key_is_found():
    content = read(ROOT / "example_configs" / "llama-3.1-8b-fsdp2.yml")
    del content["plugins"]
    content["fsdp_config"]["offload_parameters"] = True
    content["learning_rates"] = 1
    validate(content, 8)
    assert find_unknown_keys(content) == {"layersel", "offload_parameters", "learning_rates"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_deepspeed_file_is_of_the_stage_that_the_name_says(path):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    content = read(path)
    named = re.search(r"zero(\d)", path.stem)
    assert bool(named) == ("deepspeed" in content)
    if named:
        # DeepSpeed refuses keys that it does not know; the Trainer fills "auto" in.
        settings = yaml.safe_load((ROOT / content["deepspeed"]).read_text())["zero_optimization"]
        zero = DeepSpeedZeroConfig(**{key: value for key, value in settings.items() if value != "auto"})
        assert zero.stage == int(named[1])


def test_the_kernels_that_axolotl_switches_on_by_itself_stay_on_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    for name in ("llama-3.1-8b-lora", "llama-3.1-8b-l1ra", "llama-3.1-8b-flexora"):
        cfg = validate(read(ROOT / "example_configs" / f"{name}.yml"))
        assert [bool(cfg[key]) for key in LORA_KERNELS] == [True] * 4


# In place of Slurm's commands and torchrun: what they are called with, and how they take a signal.
STAND_INS = {
    "scontrol": 'echo "scontrol $*" >> calls; echo first; echo second',
    "srun": 'shift; exec "$@"',
    "torchrun": """
trap 'echo terminated >> calls; exit 1' TERM
echo "torchrun $*" >> calls
[ -e fails ] && exit 7
while true; do sleep 0.1; done
""",
}
ALLOCATION = {
    "SLURM_JOB_ID": "42",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_GPUS_ON_NODE": "8",
}


@pytest.fixture
def start_beside_stand_ins(tmp_path):
    """Return a function that starts a command where those of a cluster are stand-ins, in ``tmp_path``."""
    for name, content in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{content}\n")
        (tmp_path / name).chmod(0o755)

    def start(command: list[str], variables: dict[str, str]) -> subprocess.Popen:
        environment = {**os.environ, **variables, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        return subprocess.Popen(command, cwd=tmp_path, env=environment)

    return start


@pytest.fixture
def start_slurm_script(start_beside_stand_ins):
    """Return a function that starts the script for Slurm."""
    return lambda: start_beside_stand_ins(["bash", str(ROOT / "example_configs" / "slurm.sh"), "run.yml"], ALLOCATION)


def wait_for_call(path: Path, call: str) -> None:
    deadline = time.monotonic() + 30
    while not (path.exists() and call in path.read_text()):
        assert time.monotonic() < deadline, f"no {call}"
        time.sleep(0.05)


def test_the_slurm_script_passes_the_signal_on_and_asks_to_be_started_again(start_slurm_script, tmp_path):
    script = start_slurm_script()
    wait_for_call(tmp_path / "calls", "torchrun")
    script.send_signal(signal.SIGTERM)
    assert script.wait(timeout=30) == 0
    hosts, launch, terminated, requeue = (tmp_path / "calls").read_text().splitlines()
    assert hosts == "scontrol show hostnames n[1-2]"
    assert launch.startswith("torchrun --nnodes 2 --nproc_per_node 8 ") and "--rdzv_endpoint first:29500" in launch
    assert launch.endswith(" -m axolotl.cli.train run.yml")
    assert [terminated, requeue] == ["terminated", "scontrol requeue 42"]


def test_the_slurm_script_ends_with_the_code_of_a_run_that_failed(start_slurm_script, tmp_path):
    (tmp_path / "fails").touch()
    assert start_slurm_script().wait(timeout=30) == 7
    assert "requeue" not in (tmp_path / "calls").read_text()


def read_kubernetes() -> list[dict]:
    return list(yaml.safe_load_all((ROOT / "example_configs" / "kubernetes.yaml").read_text()))


def test_kubernetes_accepts_its_example_and_would_not_accept_a_misspelt_key():
    service, job = read_kubernetes()
    for content in (service, job):
        kubernetes_validate.validate(content, OLDEST_KUBERNETES, strict=True)
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    job["spec"]["template"]["spec"]["terminationGracePeriod"] = 120
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGracePeriod"):
        kubernetes_validate.validate(job, OLDEST_KUBERNETES, strict=True)


def test_a_pod_of_kubernetes_starts_its_share_of_the_run_and_passes_the_signal_on(start_beside_stand_ins, tmp_path):
    pod = read_kubernetes()[1]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    process = start_beside_stand_ins(container["command"], {"JOB_COMPLETION_INDEX": "1"})
    wait_for_call(tmp_path / "calls", "torchrun")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 1
    launch, terminated = (tmp_path / "calls").read_text().splitlines()
    assert launch.startswith("torchrun --nnodes 2 --nproc_per_node 8 --node_rank 1 ")
    assert launch.endswith(" -m axolotl.cli.train /config/run.yml") and terminated == "terminated"
    seconds = int({entry["name"]: entry["value"] for entry in container["env"]}["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert seconds < pod["terminationGracePeriodSeconds"]
