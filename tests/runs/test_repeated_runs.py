"""The same run with a plain Trainer writes the same bytes."""

import hashlib
import os
import subprocess
import sys

import pytest
from helpers.places import ENVIRONMENT, ROOT

SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from helpers.writing import BLOCKS, prepare
from axolotl_layersel.lora.export import export_adapter

for name, block in BLOCKS.items():
    folder = Path(sys.argv[2]) / name
    trainer = prepare(folder, block, max_steps=6, save_steps=3)
    trainer.train()
    trainer.save_model()
    trainer.model.save_pretrained(str(folder / "alone"))
    for layout in ("ragged", "uniform"):
        export_adapter(folder / "checkpoint-3", layout, folder / layout)
"""


@pytest.mark.nightly
def test_the_same_run_writes_the_same_bytes(tmp_path):
    digests, processes = [], []
    for seed in ("1", "2"):
        command = [sys.executable, "-c", SCRIPT, str(ROOT / "tests"), str(tmp_path / seed)]
        environment = {**os.environ, **ENVIRONMENT, "PYTHONHASHSEED": seed}
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment))
    assert [process.wait() for process in processes] == [0, 0]
    for seed in ("1", "2"):
        found = [path for pattern in ("adapter_*", "README.md") for path in (tmp_path / seed).rglob(pattern)]
        names = {path: str(path.relative_to(tmp_path / seed)) for path in found}
        digests.append({name: hashlib.sha256(path.read_bytes()).hexdigest() for path, name in names.items()})
    first, second = digests
    assert len(first) == 2 * 6 * 2 + 2 * 4
    assert first == second
