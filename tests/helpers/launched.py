"""Runs of Axolotl in processes of their own, and the files that they leave."""

import contextlib
import csv
import hashlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from helpers.places import ENVIRONMENT, HANGS, ROOT, WITHOUT_PACKAGE


@dataclass
class Run:
    """A finished run of Axolotl."""

    folder: Path
    codes: list[int]
    log: str

    @property
    def plan(self) -> dict:
        return json.loads((self.folder / "layersel" / "plan.json").read_text())

    @property
    def selected(self) -> list[int]:
        return [choice["layer"] for choice in self.plan["layers"] if choice["selected"]]

    @property
    def engine(self) -> dict:
        return json.loads((self.folder / "engine.json").read_text())

    def adapter(self, place: str = ".") -> dict:
        return load_file(self.folder / place / "adapter_model.safetensors")

    def config(self, place: str = ".") -> dict:
        return json.loads((self.folder / place / "adapter_config.json").read_text())

    def target(self, place: str = ".") -> tuple[list[str], list[int], list[str]]:
        """The places of LoRA in the adapter's configuration: ends of names, layers, and the name of the stack."""
        config = self.config(place)
        return tuple(sorted(config[key]) for key in ("target_modules", "layers_to_transform", "layers_pattern"))

    def pattern(self, key: str = "rank_pattern", place: str = ".") -> dict[str, int]:
        """Return PEFT's value of ``rank_pattern`` or ``alpha_pattern`` for each module in the adapter's file."""
        from peft.utils.other import get_pattern_key

        pattern = self.config(place)[key]
        saved = [name.removeprefix("base_model.model.") for name in self.adapter(place)]
        names = {name.rpartition(".lora_")[0] for name in saved if ".lora_" in name}
        return {name: pattern[get_pattern_key(pattern, name)] for name in names}

    def ranks(self, place: str = ".") -> dict[int, dict[str, int]]:
        with open(self.folder / place / "layersel" / "ranks.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        steps = {int(row["step"]): {} for row in rows}
        for row in rows:
            assert row["module"] not in steps[int(row["step"])], f"{row} is there twice"
            steps[int(row["step"])][row["module"]] = int(row["rank"])
        return steps

    def digest(self) -> dict[str, str]:
        """Return a fingerprint of each file of the adapter, of all checkpoints and of this package."""
        owned = [self.folder / "adapter_model.safetensors", *self.folder.glob("layersel/*")]
        files = [*owned, *(path for path in self.folder.glob("checkpoint-*/**/*") if path.is_file())]
        return {
            str(path.relative_to(self.folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)
        }

    def log_history(self) -> list[dict[str, float]]:
        """Return the log of the run up to its last checkpoint, without times and Axolotl's counts of tokens."""
        checkpoints = sorted(self.folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        history = json.loads((checkpoints[-1] / "trainer_state.json").read_text())["log_history"]
        left_out = ("time", "sec", "memory", "tokens")
        return [{k: v for k, v in entry.items() if not any(word in k for word in left_out)} for entry in history]

    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.log_history() if "loss" in entry]


@contextlib.contextmanager
def start_zygote():
    """Start a server that has imported Axolotl and forks training processes, within the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "helpers.zygote"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
    )
    assert json.loads(process.stdout.readline()) == {"ready": True}
    server = Zygote(process)
    threading.Thread(target=server.listen, daemon=True).start()
    try:
        yield server
    finally:
        process.stdin.close()
        process.wait(timeout=30)


@dataclass
class Zygote:
    """The server that forks training processes (see zygote.py), and its answers."""

    process: subprocess.Popen
    answers: dict[int, queue.Queue] = field(default_factory=dict)
    jobs: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def listen(self) -> None:
        for line in self.process.stdout:
            answer = json.loads(line)
            self.answers[answer["id"]].put(answer)

    def run(
        self,
        target: str,
        args: dict | list[dict],
        world: int,
        log: Path,
        env: dict,
        timeout: float = HANGS,
        nodes: list[dict] | None = None,
    ) -> list[int]:
        """Run a job and return the exit codes of its processes; zygote.py describes the arguments."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        job = {"target": target, "args": args, "world": world, "log": str(log), "env": env, "port": port}
        job["nodes"] = nodes
        with self.lock:
            self.jobs += 1
            mine = self.answers[self.jobs] = queue.Queue()
            self.process.stdin.write(json.dumps({**job, "id": self.jobs}) + "\n")
            self.process.stdin.flush()
        pids = mine.get(timeout=60)["pids"]
        try:
            return mine.get(timeout=timeout)["codes"]
        except queue.Empty:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            raise TimeoutError(f"{target} took over {timeout} s: {log}") from None


class MadeOnce(dict):
    """Runs that are made once, when a test first reads them."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def __missing__(self, key):
        self[key] = self.make(key)
        return self[key]


KILLED = -9


INTERRUPTED = 130


TERMINATED = 143


STOCK_SCRIPT = """
import sys
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

base, output, *folders = sys.argv[1:]
tokens = torch.arange(40).reshape(2, 20) + 300
results = {}
for folder in folders:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder).eval()
    with torch.no_grad():
        results[folder] = model(input_ids=tokens).logits.contiguous()
assert "axolotl_layersel" not in sys.modules
save_file(results, output)
"""


def load_with_stock_peft(base_model: Path, folders: list[Path], tmp_path: Path) -> dict[str, torch.Tensor]:
    """Return each adapter's logits, computed in a process that never imports this package."""
    output = tmp_path / "stock.safetensors"
    command = [sys.executable, "-c", STOCK_SCRIPT, str(base_model), str(output), *map(str, folders)]
    subprocess.run(command, check=True, cwd=ROOT.parent, env=WITHOUT_PACKAGE)
    return load_file(output)


def load_merged(folder: Path, tmp_path: Path) -> torch.Tensor:
    """Return the logits of a merged model, computed in a process that never imports this package."""
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM; from safetensors.torch import save_file;"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval();"
        "logits = model(torch.arange(40).reshape(2, 20) + 300).logits.detach().contiguous();"
        "save_file({'logits': logits}, sys.argv[2])"
    )
    output = tmp_path / "merged.safetensors"
    command = [sys.executable, "-c", code, str(folder / "merged"), str(output)]
    subprocess.run(command, check=True, cwd=ROOT.parent, env=WITHOUT_PACKAGE)
    return load_file(output)["logits"]


def difference(first: dict, second: dict) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def scores(plan: dict) -> list[float]:
    return [choice["score"] for choice in plan["layers"]]


def read_state(run: Run, checkpoint: str) -> dict[str, torch.Tensor]:
    """Return the tensors that ``l1ra`` resumes from, as floats."""
    state = load_file(run.folder / checkpoint / "layersel" / "state.safetensors")
    return {name: value.float() for name, value in state.items()}
