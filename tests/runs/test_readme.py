"""The README's file and its commands run as they are written, with a small model in the place of its own."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.documents import README, find_blocks
from helpers.places import ENVIRONMENT, HANGS
from safetensors.torch import load_file

from axolotl_layersel.common.paths import plan_path
from axolotl_layersel.selection.plan_file import read_plan

# The others install, or run programs that are not here; tests/runs/test_demo.py does what `make demo` does.
RUN = ("axolotl", "axolotl-layersel")
PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def folder(tmp_path_factory, base_model, data) -> Path:
    """A folder with the model, the data and the file that the README asks for."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(base_model, folder / "HuggingFaceTB" / "SmolLM2-135M")
    shutil.copy(data, folder / "train.jsonl")
    (block,) = find_blocks(README, "yaml")
    (folder / "run.yml").write_text(block.text)
    return folder


def test_the_commands_of_the_readme_examine_train_show_merge_and_export(folder):
    lines = [line for block in find_blocks(README, "bash") for line in block.text.splitlines()]
    commands = [words for line in lines if (words := shlex.split(line, comments=True))[0] in RUN]
    assert [words[1] for words in commands] == ["doctor", "train", "show", "merge-lora", "export"]
    printed = []
    for words in commands:
        done = subprocess.run(
            words, cwd=folder, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=HANGS
        )
        assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        printed.append(done.stdout)
    run = folder / "outputs" / "run"
    planned = read_plan(plan_path(run)).ranks
    assert len(set(planned.values())) > 2 and "method gradient keeps" in printed[2]
    for adapter in (run, folder / "adapter"):
        tensors = load_file(adapter / "adapter_model.safetensors")
        ranks = {name: len(tensor) for name, tensor in tensors.items() if name.endswith("lora_A.weight")}
        assert {name.removeprefix(PREFIX).removesuffix(".lora_A.weight"): rank for name, rank in ranks.items()} == {
            name: rank for name, rank in planned.items() if rank
        }
    assert (run / "merged" / "model.safetensors").exists()
