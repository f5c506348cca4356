"""Shared parts of the benchmarks: a Llama with LoRA, a process for each measurement, and true peak memory."""

import argparse
import contextlib
import ctypes
import gc
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.managers import SyncManager
from pathlib import Path
from threading import Semaphore
from typing import Any, TypeVar

import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

T = TypeVar("T")

MIB = 2**20
# From glibc's malloc.h: parameters of mallopt.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
TURN_TIMEOUT = 3600.0
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Setup:
    """The model and the device, the same for everything that is compared."""

    hidden_size: int
    layers: int
    vocabulary: int
    batch_size: int
    rank: int
    device: str
    dtype: str

    @property
    def intermediate_size(self) -> int:
        """Width of the MLP, in Llama's proportion to the hidden size."""
        return 32 * round(self.hidden_size * 11008 / 4096 / 32)

    def describe(self) -> str:
        """Return the setup in one line, for a table's title."""
        return (
            f"Llama, {self.layers} layers, hidden {self.hidden_size}, MLP {self.intermediate_size}, vocabulary "
            f"{self.vocabulary}, {self.dtype}, LoRA r {self.rank}; batch {self.batch_size}; {describe_device(self)}"
        )


def add_setup_arguments(
    parser: argparse.ArgumentParser, hidden_size: int, layers: int, vocabulary: int, batch_size: int
) -> None:
    """Add the options of ``Setup`` and ``--json``, with this benchmark's defaults."""
    parser.add_argument("--hidden-size", type=int, default=hidden_size, help="a multiple of 64")
    parser.add_argument("--layers", type=int, default=layers)
    parser.add_argument("--vocabulary", type=int, default=vocabulary)
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--rank", type=int, default=16, help="rank of LoRA, on all linear modules of a layer")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on CPU, bfloat16 on CUDA")
    parser.add_argument("--json", type=Path, metavar="PATH", help="file for all measurements")


def read_setup(arguments: argparse.Namespace) -> Setup:
    """Return the setup on the command line."""
    dtype = arguments.dtype or ("float32" if arguments.device == "cpu" else "bfloat16")
    return Setup(
        hidden_size=arguments.hidden_size,
        layers=arguments.layers,
        vocabulary=arguments.vocabulary,
        batch_size=arguments.batch_size,
        rank=arguments.rank,
        device=arguments.device,
        dtype=dtype,
    )


def describe_device(setup: Setup) -> str:
    """Return the name of the GPU, or the number of CPU threads."""
    return torch.cuda.get_device_name() if setup.device == "cuda" else f"CPU threads: {torch.get_num_threads()}"


def make_model(setup: Setup, lora_layers: list[int] | None = None, adapter: PeftConfig | None = None) -> PeftModel:
    """Return a randomly initialised Llama with LoRA in ``lora_layers`` (default: all of them), or with ``adapter``."""
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    heads = setup.hidden_size // 64
    config = LlamaConfig(
        hidden_size=setup.hidden_size,
        intermediate_size=setup.intermediate_size,
        num_hidden_layers=setup.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=setup.vocabulary,
        max_position_embeddings=8192,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, setup.dtype))
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=setup.rank,
        target_modules=LORA_TARGETS,
        layers_to_transform=lora_layers,
        layers_pattern=None if lora_layers is None else "layers",
    )
    return get_peft_model(model, adapter or lora).to(setup.device)


def make_trainer(
    setup: Setup,
    model: PeftModel,
    folder: str,
    dataset: list[dict[str, list[int]]] | None = None,
    callbacks: list[TrainerCallback] | None = None,
    **options: Any,
) -> Trainer:
    """Return a plain Trainer that writes nothing unless ``options``, arguments of the Trainer, say so."""
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=setup.batch_size,
        use_cpu=setup.device == "cpu",
        bf16=setup.dtype == "bfloat16",
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    return Trainer(model=model, args=arguments, train_dataset=dataset, callbacks=callbacks)


def synchronize(device: str) -> None:
    """Wait until the GPU has finished."""
    if device == "cuda":
        torch.cuda.synchronize()


class PeakMemory:
    """Measures the peak memory of a ``with`` block in bytes, in addition to the memory in use before it.

    On CUDA this is memory of the allocator's tensors. On a CPU (Linux with glibc) it is the resident set of the
    process, whose peak Linux lets a process reset. From then on malloc returns every freed block of 64 KiB or more to
    the system at once, so that only memory in use is resident. This takes time: measure time elsewhere.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.bytes = 0
        self.before = 0

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            libc = ctypes.CDLL(None)
            libc.mallopt(M_MMAP_THRESHOLD, 65536)
            libc.mallopt(M_TRIM_THRESHOLD, 65536)
            libc.malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self.before = read_resident("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else read_resident("VmHWM")
        self.bytes = peak - self.before


def read_resident(key: str) -> int:
    """Return ``VmRSS`` (resident memory) or ``VmHWM`` (its peak) of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}: peak memory on a CPU is measured on Linux only")


def check_peak_memory(device: str) -> None:
    """Measure two allocations of known size, the larger one first.

    Raises:
        RuntimeError: if a measurement is wrong, or the first peak hides the second one.
    """
    for size in (64 * MIB, 16 * MIB):
        with PeakMemory(device) as peak:
            torch.ones(size // 4, device=device)
        if not size - MIB <= peak.bytes <= size + 4 * MIB:
            raise RuntimeError(f"{size} bytes were measured as {peak.bytes}: peak memory cannot be measured here")


def draw_rows(setup: Setup, tokens: int, count: int) -> list[dict[str, list[int]]]:
    """Return ``count`` rows of random tokens, all with labels."""
    draw = random.Random(0)
    rows = [[draw.randrange(setup.vocabulary) for _ in range(tokens)] for _ in range(count)]
    return [{"input_ids": row, "labels": row} for row in rows]


def warm_up(trainer: Trainer, setup: Setup) -> None:
    """Run a short row forward and backward once, so that code and buffers of the libraries are not counted."""
    row = {"input_ids": list(range(8)), "labels": list(range(8))}
    inputs = trainer._prepare_inputs(trainer.data_collator([row]))
    trainer.model.train()
    with trainer.compute_loss_context_manager():
        trainer.model(**inputs).loss.backward()
    trainer.model.zero_grad(set_to_none=True)


def process_pool(setup: Setup, processes: int = 1) -> ProcessPoolExecutor:
    """Return a pool of fresh processes, forked unless the device is CUDA, which does not survive a fork.

    Importing the libraries takes longer than most measurements. Forking is safe only if this process has not run torch,
    so it must only start others.
    """
    return ProcessPoolExecutor(processes, mp_context=get_context("fork" if setup.device == "cpu" else "spawn"))


def run_alone(function: Callable[..., T], setup: Setup, *arguments: object) -> T:
    """Return ``function(setup, *arguments)``, run in a fresh process, without what it prints."""
    with process_pool(setup) as pool:
        return pool.submit(run_quietly, function, setup, *arguments).result()


def run_quietly(function: Callable[..., T], *arguments: object) -> T:
    """Return ``function(*arguments)`` without what it prints to standard output."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        return function(*arguments)


@dataclass(frozen=True)
class Turns:
    """The turns of an arm: it waits for ``mine`` before each step, and releases ``following`` after it."""

    mine: Semaphore
    following: Semaphore


class Stopwatch:
    """Measures the time between ``start`` and ``stop``: wall time, and CPU time of this process."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.started = self.started_cpu = 0.0

    def start(self) -> None:
        synchronize(self.device)
        self.started, self.started_cpu = time.perf_counter(), time.process_time()

    def stop(self) -> tuple[float, float]:
        """Return wall time and CPU time in seconds."""
        synchronize(self.device)
        return time.perf_counter() - self.started, time.process_time() - self.started_cpu


class StepTimer(TrainerCallback):
    """Times every step, and takes turns with the other arms."""

    def __init__(self, device: str, turns: Turns | None) -> None:
        self.stopwatch = Stopwatch(device)
        self.turns = turns
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if self.turns is not None and not self.turns.mine.acquire(timeout=TURN_TIMEOUT):
            raise TimeoutError("the arm before this one has not finished its step")
        self.stopwatch.start()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        seconds, cpu_seconds = self.stopwatch.stop()
        self.seconds.append(seconds)
        self.cpu_seconds.append(cpu_seconds)
        if self.turns is not None:
            self.turns.following.release()

    def train(self, trainer: Trainer) -> None:
        """Train to the end; after a failure the other arms do not wait for the turns of this one."""
        try:
            trainer.train()
        finally:
            if self.turns is not None:
                for _ in range(trainer.args.max_steps - len(self.seconds)):
                    self.turns.following.release()


def take_turns(function: Callable[..., T], setup: Setup, arms: Sequence[str], *arguments: object) -> dict[str, T]:
    """Return ``function(setup, arm, *arguments, turns)`` for every arm, each run in a process of its own."""
    with SyncManager() as manager, process_pool(setup, len(arms)) as pool:
        gates = [manager.Semaphore(int(position == 0)) for position in range(len(arms))]
        turns = [Turns(gate, gates[(place + 1) % len(arms)]) for place, gate in enumerate(gates)]
        runs = {
            arm: pool.submit(run_quietly, function, *(setup, arm, *arguments, turn)) for arm, turn in zip(arms, turns)
        }
        return {arm: run.result() for arm, run in runs.items()}


def median_ratio(ours: list[float], others: list[float]) -> float:
    """Return the median of the ratios of measurements that were taken next to each other."""
    return statistics.median(one / other for one, other in zip(ours, others))


@dataclass(frozen=True)
class Goal:
    """A goal of a benchmark: ``measured`` is at most ``limit``."""

    what: str
    measured: float
    limit: float

    @property
    def met(self) -> bool:
        return self.measured <= self.limit


def report_goals(console: Console, goals: list[Goal]) -> None:
    """Print each goal, the measured value, and whether the goal is met."""
    for goal in goals:
        colour, word = ("green", "met") if goal.met else ("red", "MISSED")
        line = f"[{colour}]{word:>6}[/{colour}]  {goal.what}: {goal.measured:.3f}, goal at most {goal.limit:.3f}"
        console.print(line, soft_wrap=True, highlight=False)


def write_json(path: Path | None, benchmark: str, setup: Setup, goals: list[Goal], **content: object) -> None:
    """Write the setup, all measurements and the goals, if ``path`` is given."""
    if path is None:
        return
    document = {
        "benchmark": benchmark,
        "setup": {**vars(setup), "intermediate_size": setup.intermediate_size, "hardware": describe_device(setup)},
        "versions": {name: version(name) for name in ("axolotl-layersel", "torch", "transformers", "peft")},
        **content,
        "goals": [{**vars(goal), "met": goal.met} for goal in goals],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n")
