"""The public function with a plain Trainer: the manual's example, the example script, and the imports."""

import re
from pathlib import Path

import pytest
import torch
from helpers.documents import find_blocks
from helpers.models import make_small_llama
from helpers.places import ROOT
from helpers.plain_trainer import check_adapter, make_bert, run_python
from helpers.processes import OPTIMIZER_STATES, launch_processes
from safetensors.torch import load_file

from axolotl_layersel.common.paths import plan_path
from axolotl_layersel.l1ra.records import RankHistory
from axolotl_layersel.selection.plan_file import read_plan


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return make_bert(tmp_path_factory.mktemp("glue"))


def test_the_example_of_the_manual_runs_where_there_is_no_axolotl(bert, tmp_path):
    (example,) = find_blocks(ROOT / "docs" / "trainer.md", "python")
    for name in ("google-bert", "train.tsv"):
        (tmp_path / name).symlink_to(bert / name)
    code = (
        "import sys, time; sys.modules['axolotl'] = None; start = time.perf_counter(); import axolotl_layersel;"
        "print('seconds', time.perf_counter() - start, 'torch' in sys.modules)"
    )
    done = run_python(tmp_path, "-c", f"{code}\n{example.text}")
    (seconds, torch_too), *_ = re.findall(r"^seconds (\S+) (\S+)$", done.stdout, flags=re.MULTILINE)
    assert float(seconds) < 1
    assert torch_too == "False"
    assert "method cka keeps 2 of 4 layers" in done.stdout
    check_adapter(tmp_path / "out", tmp_path / "google-bert" / "bert-base-uncased", 2)


@pytest.mark.parametrize("engine", OPTIMIZER_STATES)
def test_a_plain_trainer_searches_and_resumes_on_engines_and_all_processes_miss_what_is_lacking(
    engine, zygote, tmp_path
):
    base = make_small_llama(layers=4)
    folder = launch_processes(zygote, "helpers.processes:train_and_resume", engine, tmp_path, base)
    assert len({choice.score for choice in read_plan(plan_path(folder / "searched")).layers}) == 4
    whole, resumed = (RankHistory.read(folder / place).ranks for place in ("whole", "resumed"))
    assert whole == resumed and len({tuple(ranks.values()) for ranks in whole.values()}) > 1
    one, other = (load_file(folder / place / "adapter_model.safetensors") for place in ("whole", "resumed"))
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=1e-6, rtol=0)
    refusals = {(folder / f"refusal-{rank}").read_text() for rank in (0, 1)}
    (refusal,) = refusals
    checkpoint = folder / "whole" / "checkpoint-2"
    assert refusal.startswith(f"resume_from_checkpoint: {checkpoint} cannot be resumed from: ")
    assert " is missing" in refusal
