"""Tables and messages print on every terminal, and the content of files cannot control it."""

import os
import subprocess
import sys

import pytest
from helpers.places import ENVIRONMENT, ROOT
from helpers.plans import make_plan

from axolotl_layersel.common.paths import plan_path
from axolotl_layersel.l1ra.records import RankHistory
from axolotl_layersel.selection.plan_file import write_plan

MODULE = "model.layers.0.self_attn.q_proj"


SHOW = "import sys; from axolotl_layersel.cli.main import app; app(['show', sys.argv[1]])"


TRAIN = """
import sys
from pathlib import Path
from helpers.models import make_lora, make_small_llama, make_trainer
from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.training.prepare import prepare_trainer
block = {"selection": {"method": "cka", "num_samples": 8}, "l1ra": {"update_ratio": 0.2}}
trainer = make_trainer(make_lora(make_small_llama(2)), Path(sys.argv[1]), max_steps=12)
prepare_trainer(trainer, LayerselConfig.model_validate(block))
trainer.train()
"""


NARROW = {"PYTHONIOENCODING": "ascii", "COLUMNS": "40"}


ENCODINGS = [NARROW, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "cp1252"}]


def run(code: str, *args: object, **env: str) -> str:
    """Run Python code with its output in a file, and return the output with single spaces."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, **env},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
    return " ".join(done.stdout.decode(env.get("PYTHONIOENCODING", "ascii")).split())


@pytest.mark.parametrize("env", ENCODINGS)
def test_show_prints_on_a_terminal_that_is_not_unicode(tmp_path, env):
    write_plan(make_plan((0.5, None, 0.1), unscored={1: "ärger ☃"}, modules=[MODULE]), plan_path(tmp_path))
    RankHistory({0: {MODULE: 4}, 9: {MODULE: 123456789}}).write(tmp_path)
    text = run(SHOW, tmp_path, **env)
    assert "method cka keeps 1 of 3 layers" in text
    assert "#" * 24 in text
    assert "\\u2603" in text
    assert "123456789" in text


def test_a_run_prints_its_tables_where_the_output_is_not_unicode(tmp_path):
    text = run(f"import sys; sys.path.insert(0, 'tests')\n{TRAIN}", tmp_path, **NARROW)
    assert "layersel: method cka keeps 1 of 2 layers" in text
    assert "layersel: ranks after l1ra" in text
