"""vLLM in an environment of its own, which ``make test-serving`` installs."""

import json
import os
import subprocess
from pathlib import Path

from axolotl_layersel.lora.readers import find_vllm_rank, read_adapter_file
from helpers.places import ROOT, TESTS
from helpers.served import PROMPTS, Served

PYTHON = ROOT / "build" / "vllm" / "bin" / "python"
SECONDS = 600


def read(served: Served, adapters: dict[str, Path]) -> dict:
    """Return what vLLM computes with each of ``adapters``, and as ``base`` without one; see serving/read_vllm.py."""
    assert PYTHON.exists(), f"{PYTHON} is missing. Run `make test-serving`."
    job, written = served.base.parent / "job.json", served.base.parent / "answer.json"
    rank = max(read_adapter_file(folder).highest for folder in adapters.values())
    content = {
        "base": str(served.base),
        "prompts": PROMPTS,
        "adapters": {name: str(folder) for name, folder in adapters.items()},
        "max_rank": find_vllm_rank(rank),
        "vocabulary": served.plain.shape[1],
    }
    job.write_text(json.dumps(content))
    words = [PYTHON, TESTS / "serving" / "read_vllm.py", job, written]
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(written.read_text())
