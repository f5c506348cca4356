"""Shared fixtures: a small pre-trained base, its data, and runs of real Axolotl on every engine."""

import contextlib
import csv
import hashlib
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's library is imported

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support import Support, read_file, write_file

from axolotl_layersel.config.methods import METHODS

TESTS = Path(__file__).parent
ROOT = TESTS.parent
ENGINES = ["single", "ddp", "zero1", "zero2", "zero3", "fsdp2-full", "fsdp2-sharded"]
# The methods that score layers on rows.
SCORING = [name for name, method in METHODS.items() if method.draws_rows]
ENVIRONMENT = {
    "AXOLOTL_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": f"{TESTS}{os.pathsep}{ROOT}",
    "TOKENIZERS_PARALLELISM": "false",
}


def make_small_llama(layers: int = 6, seed: int = 0, **settings):
    """Return a random Llama of width 32 with ``layers`` layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    values = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **{"vocab_size": 97, **values, **settings}))


def make_small_bert(kind: str = "BertForMaskedLM", **settings):
    """Return a random BERT of width 32 with 4 layers, of one of transformers' classes."""
    import transformers

    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 4}
    return getattr(transformers, kind)(transformers.BertConfig(vocab_size=97, **size, **settings))


def make_lora(model, targets: object = ("q_proj", "v_proj", "down_proj"), **settings):
    """Return ``model`` under LoRA of rank 4, the target modules a list or a regular expression."""
    from peft import LoraConfig, get_peft_model

    targets = targets if isinstance(targets, str) else list(targets)
    return get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets, **settings}))


def make_rows(count: int = 24, seed: int = 0, longest: int = 20) -> list[dict]:
    """Return token rows of different lengths that all end in the token 1."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(6, longest, (1,), generator=generator))
        ids = [*torch.randint(3, 97, (length,), generator=generator).tolist(), 1]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * 3 + ids[3:]})
    return rows


def make_selection(trainer, method: str = "cka", **settings):
    """Return what is to be chosen by ``method`` in a trainer's run."""
    from axolotl_layersel.config.selection import SelectionArgs
    from axolotl_layersel.lora.layers import find_layer_stack
    from axolotl_layersel.lora.run import Run
    from axolotl_layersel.selection.choosing import Selection

    run = Run.of(trainer)
    settings = SelectionArgs(method=method, **settings)
    return Selection.of(run, find_layer_stack(run.model), settings.resolve(trainer.args.seed))


def describe_engine(kind: str, plugins: dict):
    """Return what of a trainer its engine's name is read from."""
    state = types.SimpleNamespace(**plugins)
    accelerator = types.SimpleNamespace(
        distributed_type=types.SimpleNamespace(value=kind), state=state, parallelism_config=None
    )
    return types.SimpleNamespace(accelerator=accelerator)


def make_trainer(model, folder: Path, rows: list[dict] | None = None, **arguments):
    """Return a plain transformers Trainer of ``model`` on ``rows``; the model may be made from its arguments."""
    from datasets import Dataset
    from torch.nn.utils.rnn import pad_sequence
    from transformers import Trainer, TrainingArguments

    def collate(batch: list[dict]) -> dict:
        fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        columns = {name: [torch.tensor(row[name]) for row in batch] for name in fill}
        return {
            name: pad_sequence(columns[name], True, value) if columns[name][0].dim() else torch.stack(columns[name])
            for name, value in fill.items()
        }

    values = {"per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-2, "report_to": [], "seed": 3}
    arguments = TrainingArguments(output_dir=str(folder), **{"use_cpu": True, **values, **arguments})
    model = model if isinstance(model, torch.nn.Module) else model(arguments)
    return Trainer(model, arguments, train_dataset=Dataset.from_list(rows or make_rows()), data_collator=collate)


def selection(method: str = "cka", **values) -> dict:
    """Return a ``layersel`` block; methods that score take an odd number of rows, for unequal shares of two."""
    scoring = {"num_samples": 15} if method in SCORING else {}
    return {"layersel": {"selection": {"method": method, **scoring, **values}}}


# The best checkpoint is the first one: the loss falls, so the greatest eval loss is the earliest.
BEST_IS_FIRST = {
    "eval_steps": 2,
    "val_set_size": 0.1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,
}
CHECKPOINTING = {"none": None, "reentrant": {"use_reentrant": True}, "non-reentrant": {"use_reentrant": False}}


# For what must not change plain LoRA. Two micro-batches a step, and gradients that are clipped.
ACCUMULATED = {
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.01,
    "max_steps": 6,
    "num_epochs": 2,
    "save_steps": 6,
    "val_set_size": 0.1,
    "warmup_steps": 2,
}
PLAIN = {**ACCUMULATED, **selection("flexora", ratio=1.0, flexora={"steps": 6, "gate_lr": 0, "val_source": "eval"})}


PACKED_QLORA = {
    "adapter": "qlora",
    "load_in_4bit": True,
    "sample_packing": True,
    "pad_to_sequence_len": True,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 2,
}


def l1ra(**values) -> dict:
    """Return a ``layersel`` block that redistributes rank."""
    return {"layersel": {"l1ra": values}}


def pressure(**values) -> dict:
    """Return a ``layersel`` block that redistributes rank by the paper's rule, with the sum of ranks as the budget."""
    return l1ra(**{"rule": "pressure", "budget": "rank", **values})


def preferences(folder: Path, rl: str = "dpo") -> dict:
    """Write 24 pairs of answers to ``folder``, and return the YAML keys of preference training on them.

    ``rl``: such as dpo or orpo; reward for a reward model.
    """
    path = folder / "preferences.jsonl"
    rows = []
    for i in range(24):
        asked = {"role": "user", "content": f"How many apples are {i} and {i + 1}?"}
        chosen = {"role": "assistant", "content": f"They are {2 * i + 1} apples."}
        rejected = {"role": "assistant", "content": f"They are {2 * i} pears."}
        if rl == "orpo":
            rows.append({"chosen": [asked, chosen], "rejected": [asked, rejected]})
        elif rl == "reward":
            answers = {"chosen": chosen["content"], "rejected": rejected["content"]}
            rows.append({"system": "", "input": asked["content"], **answers})
        else:
            rows.append({"conversation": [asked], "chosen": chosen, "rejected": rejected})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(path), "ds_type": "json"}
    if rl == "orpo":
        data["type"] = "chat_template.argilla"
    elif rl == "reward":
        data["type"] = "bradley_terry.chat_template"
    else:
        data.update(type="chat_template.default", field_messages="conversation")
    kind = {"reward_model": True} if rl == "reward" else {"rl": rl}
    return {**kind, "datasets": [data], "chat_template": "chatml"}


def deepspeed_config(stage: int) -> dict:
    zero = {"stage": stage, "overlap_comm": False, "contiguous_gradients": True}
    if stage == 3:
        # By default no parameter under 1e5 elements is partitioned: a small model would test nothing.
        zero.update(stage3_param_persistence_threshold=0, stage3_gather_16bit_weights_on_model_save=False)
    automatic = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    return {"zero_optimization": zero, "gradient_clipping": "auto", **dict.fromkeys(automatic, "auto")}


def engine_settings(engine: str, folder: Path) -> tuple[dict, int]:
    """Return the YAML keys that choose ``engine``, and its number of processes.

    ``fsdp2-full`` loads weights on one process alone, ``fsdp2-full-everywhere`` on each, as 4-bit ones need.
    """
    if engine == "single":
        return {}, 1
    if engine == "ddp":
        return {}, 2
    if engine.startswith("zero"):
        path = folder / f"{engine}.json"
        path.write_text(json.dumps(deepspeed_config(int(engine[-1]))))
        return {"deepspeed": str(path)}, 2
    kind = "SHARDED_STATE_DICT" if "sharded" in engine else "FULL_STATE_DICT"
    offloaded = engine.endswith("offloaded")
    config = {
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "cpu_ram_efficient_loading": "full" in engine and not engine.endswith("everywhere"),
        "offload_params": offloaded,
        # Memory is pinned for an accelerator, and there is none.
        **({"cpu_offload_pin_memory": False} if offloaded else {}),
        # False also leaves whole weights behind after an evaluation, in the way of whoever writes to shards.
        "reshard_after_forward": "full" in engine,
        "state_dict_type": kind,
        "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
    }
    return {"fsdp_version": 2, "fsdp_config": config}, 2


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-support", action="store_true", help="write what the tests show to docs/support.json and support.md"
    )


@pytest.fixture
def support() -> Support:
    """What the test shows of a table in docs/support.md; if it passes, that must be what is written there."""
    return Support()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    result = yield
    shown = item.funcargs.get("support")
    if shown is not None:
        item.user_properties.append(("support", shown.describe()))
        if not item.config.getoption("--write-support"):
            written = read_file().get(item.nodeid, [])
            assert written == shown.describe(), "run `pytest --write-support` on this file, and look at what changed"
    return result


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--write-support") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(SupportWriter())


class SupportWriter:
    """Writes what the tests of a session have shown; a test that failed shows nothing."""

    def __init__(self) -> None:
        self.shown: dict[str, list[dict]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.failed:
            self.shown[report.nodeid] = dict(report.user_properties).get("support", []) if report.passed else []

    def pytest_sessionfinish(self) -> None:
        write_file({**read_file(), **self.shown})
        subprocess.run([sys.executable, ROOT / "docs" / "generate.py"], check=True)


LAUNCHING_FIXTURES = {"zygote", "base_model"}


COLLECTED = pytest.StashKey[set[str]]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, items: list[pytest.Item]) -> None:
    """Mark tests that start processes, by the fixtures that they use: ``make check`` leaves them out.

    The names of all tests are kept, before any are left out.
    """
    session.stash[COLLECTED] = {item.nodeid for item in items}
    for item in items:
        if LAUNCHING_FIXTURES & set(item.fixturenames):
            item.add_marker("launches")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    """Let no test train or start a process, nor a fixture for it, that is not marked so: ``make check`` stays quick."""
    from transformers import Trainer

    with pytest.MonkeyPatch.context() as patch:
        if not item.get_closest_marker("trains"):
            patch.setattr(Trainer, "train", lambda *args, **kwargs: refuse_unmarked("trains"))
        if not item.get_closest_marker("launches"):
            patch.setattr(subprocess, "Popen", QuietPopen)
        return (yield)


class QuietPopen(subprocess.Popen):
    """Starts anything but a program of Python's, as libraries do to learn about the machine."""

    def __init__(self, args, *rest, **options):
        program = Path(args.split()[0] if isinstance(args, str) else args[0]).name
        if "python" in program or program.startswith(("axolotl", "accelerate", "torchrun")):
            refuse_unmarked("launches")
        super().__init__(args, *rest, **options)


def refuse_unmarked(mark: str) -> NoReturn:
    raise AssertionError(f"mark this test, or its module, with `pytest.mark.{mark}`")


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
        """Where the configuration says that LoRA is: ends of names, layers, and what the layers are called."""
        config = self.config(place)
        return tuple(sorted(config[key]) for key in ("target_modules", "layers_to_transform", "layers_pattern"))

    def pattern(self, key: str = "rank_pattern", place: str = ".") -> dict[str, int]:
        """What PEFT reads from ``rank_pattern`` or ``alpha_pattern`` for each module in the adapter's file."""
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
        """Return what tells whether a file changed: the adapter, all checkpoints, and what this package wrote."""
        owned = [self.folder / "adapter_model.safetensors", *self.folder.glob("layersel/*")]
        files = [*owned, *(path for path in self.folder.glob("checkpoint-*/**/*") if path.is_file())]
        return {
            str(path.relative_to(self.folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)
        }

    def log_history(self) -> list[dict[str, float]]:
        """Return what the run logged until its last checkpoint, but for times, and Axolotl's counts of tokens."""
        checkpoints = sorted(self.folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        history = json.loads((checkpoints[-1] / "trainer_state.json").read_text())["log_history"]
        left_out = ("time", "sec", "memory", "tokens")
        return [{k: v for k, v in entry.items() if not any(word in k for word in left_out)} for entry in history]

    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.log_history() if "loss" in entry]


@dataclass
class Zygote:
    """The server that forks training processes (see zygote.py), and what it answered."""

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
        timeout: float = 240,
        nodes: list[dict] | None = None,
    ) -> list[int]:
        """Return the exit codes of the job's ranks. ``args``: those of all, or of each; ``nodes``: see zygote.py."""
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


@pytest.fixture(scope="session")
def zygote(tmp_path_factory):
    process = subprocess.Popen(
        [sys.executable, str(TESTS / "zygote.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
    )
    assert json.loads(process.stdout.readline()) == {"ready": True}
    server = Zygote(process)
    threading.Thread(target=server.listen, daemon=True).start()
    yield server
    process.stdin.close()
    process.wait(timeout=30)


@pytest.fixture(scope="session")
def base_model(tmp_path_factory) -> Path:
    """A Llama of 8 layers, pre-trained for a few steps so that its layers differ."""
    folder = tmp_path_factory.mktemp("base") / "base"
    code = (
        "from pathlib import Path; from demo.prepare import pretrain;"
        f"pretrain(Path({str(folder)!r}), seconds=3600, max_steps=40, hidden_size=64, layers=8, heads=4)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={**os.environ, **ENVIRONMENT})
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory, base_model) -> Path:
    """64 word problems as JSON lines whose answers have equally many tokens.

    Axolotl's loss weighs ranks, not tokens: only with equal counts do one and two processes train alike.
    """
    from collections import Counter

    from tokenizers import Tokenizer

    from demo.prepare import write_problems

    tokenizer = Tokenizer.from_file(str(base_model / "tokenizer.json"))
    problems = [(len(tokenizer.encode(row["output"]).ids), row) for row in write_problems(600, seed=2)]
    ((most_common, _),) = Counter(length for length, _ in problems).most_common(1)
    rows = [row for length, row in problems if length == most_common][:64]
    assert len(rows) == 64
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def make_config(base_model, data, tmp_path_factory):
    """Return a function that writes a YAML file for a small LoRA run and returns its path and processes."""

    def make(engine: str = "single", output: Path | None = None, **overrides) -> tuple[Path, int, Path]:
        folder = tmp_path_factory.mktemp(engine)
        output = output or folder / "output"
        chosen, world = engine_settings(engine, folder)
        values = {
            "base_model": str(base_model),
            "plugins": [
                "cpu_engines.CpuEnginesPlugin",
                "probe.ProbePlugin",
                "axolotl_layersel.LayerSelectionPlugin",
                "probe.RankProbePlugin",
            ],
            "datasets": [{"path": str(data), "type": "alpaca", "ds_type": "json"}],
            "dataset_prepared_path": str(tmp_path_factory.getbasetemp() / "prepared"),
            "output_dir": str(output),
            "adapter": "lora",
            "lora_r": 4,
            "lora_alpha": 8,
            "lora_dropout": 0.0,
            "lora_target_modules": ["q_proj", "v_proj", "down_proj"],
            "sequence_len": 128,
            "micro_batch_size": 2 // world,
            "gradient_accumulation_steps": 1,
            "num_epochs": 1,
            "max_steps": 6,
            "learning_rate": 0.005,
            "optimizer": "adamw_torch",
            "lr_scheduler": "cosine",
            "bf16": False,
            "tf32": False,
            "lora_mlp_kernel": False,
            "lora_qkv_kernel": False,
            "lora_o_kernel": False,
            "gradient_checkpointing": False,
            "seed": 7,
            "val_set_size": 0,
            "save_steps": 2,
            "logging_steps": 1,
            **selection(ratio=0.5),
            **chosen,
            **overrides,
        }
        path = folder / "config.yml"
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
        return path, world, output

    return make


@pytest.fixture(scope="session")
def train(zygote, make_config):
    """Return a function that trains with real Axolotl on an engine and returns the finished run.

    ``elsewhere``: settings that ranks above 0 have differently; ``timeout``: seconds, after which all are killed.
    """

    def run(
        engine: str = "single",
        *,
        expect: int | None = 0,
        env: dict | None = None,
        elsewhere: dict | None = None,
        timeout: float = 240,
        **settings,
    ) -> Run:
        path, world, output = make_config(engine, **settings)
        log = path.with_suffix(f".{zygote.jobs}.log")
        paths = [path] * world
        if elsewhere is not None:
            other, _, _ = make_config(engine, **{**settings, "output": output, **elsewhere})
            paths = [path, *[other] * (world - 1)]
        args = [{"config": str(each)} for each in paths]
        codes = zygote.run("axolotl.cli.train:do_cli", args, world, log, env or {}, timeout)
        text = "\n".join(Path(f"{log}.{rank}").read_text() for rank in range(world))
        if expect is not None:
            assert codes == [expect] * world, f"exit codes {codes}\n{text[-6000:]}"
        return Run(output, codes, re.sub(r"\x1b\[[0-9;]*m", "", text))

    return run


@pytest.fixture(scope="session")
def make_plan(zygote, make_config):
    """Return a function that selects on an engine without training, and returns the plan."""

    def make(engine: str = "single", **settings) -> dict:
        path, world, output = make_config(engine, **settings)
        log = path.with_suffix(".plan.log")
        codes = zygote.run("axolotl_layersel.cli.worker:main", {"config": str(path)}, world, log, {})
        assert codes == [0] * world, (path.parent / f"{log.name}.0").read_text()[-4000:]
        plan = json.loads((output / "layersel" / "plan.json").read_text())
        assert plan["engine"] == engine.split("-")[0]
        return plan

    return make


class RunsByEngine(dict):
    """Runs that are made when they are first asked for, and once."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def __missing__(self, engine: str):
        self[engine] = self.make(engine)
        return self[engine]


@pytest.fixture(scope="session")
def plain_runs(train) -> dict[str, Run]:
    """On each engine plain LoRA in all layers, in two micro-batches a step, with gradients that are clipped.

    Before it a search whose gates are held at 0, of as many steps, on the same rows in the same order: plain LoRA too.
    """
    return RunsByEngine(lambda engine: train(engine, **PLAIN))
