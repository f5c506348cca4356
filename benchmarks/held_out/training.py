"""One run: the base under LoRA, trained by one arm, and the figures that it ends with."""

import json
import math
import statistics
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.optimizers import create_loraplus_optimizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from axolotl_layersel import __version__
from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.lora.patterns import scale_by_rank
from axolotl_layersel.training.prepare import prepare_trainer
from benchmarks.held_out.arms import SAMPLES, Arm, parse_arm
from benchmarks.held_out.rows import IGNORED, collate
from benchmarks.held_out.sensitivity import find_ranks

DECODER_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ENCODER_TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALING = 2  # lora_alpha by r
BATCH = 16  # rows of a batch that is only measured
# Rows of the training set on which the loss is measured at the end.
TRAINED_ROWS = 64

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Data:
    """What a run trains on and is measured on; ``general`` holds texts by name."""

    train: Rows
    validation: Rows
    test: Rows
    general: Mapping[str, Rows]


@dataclass(frozen=True)
class Settings:
    """The base and the length of a run; ``evaluations`` counts the one at the end."""

    base: Path
    is_encoder: bool
    steps: int
    batch_size: int
    evaluations: int


@torch.no_grad()
def measure(model: Any, rows: Rows, batch_size: int) -> tuple[float, float]:
    """Return the mean loss and the accuracy over the tokens of the answers, or over sentences."""
    model.eval()
    loss, right, count = 0.0, 0, 0
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))
    for start in range(0, len(rows), batch_size):
        batch = {key: value.to(model.device) for key, value in collate(rows[start : start + batch_size]).items()}
        output = model(**batch)
        logits, labels = output.logits, batch["labels"]
        if labels.dim() == 2:  # the token after each
            logits, labels = logits[:, :-1], labels[:, 1:]
        counted = labels.ne(IGNORED)
        loss += output.loss.item() * int(counted.sum())
        right += int((logits.argmax(dim=-1) == labels)[counted].sum())
        count += int(counted.sum())
    return loss / count, right / count


def measure_texts(model: Any, texts: Mapping[str, Rows]) -> dict[str, float]:
    """Return the loss on each text."""
    return {name: measure(model, rows, BATCH)[0] for name, rows in texts.items()}


def load_base(path: Path, is_encoder: bool) -> Any:
    """Return the base in fp32 on the device."""
    if is_encoder:
        return AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32, num_labels=2).to(DEVICE)
    base: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return base.to(DEVICE)


def make_model(path: Path, is_encoder: bool, arm: Arm, rank: int, rows: Rows) -> PeftModel:
    """Return the base under LoRA. ``rows`` are those by which EVA and the sensitivity set ranks."""
    settings: dict[str, Any] = {"r": rank, "lora_alpha": SCALING * rank}
    if is_encoder:
        settings |= {"target_modules": ENCODER_TARGETS, "task_type": "SEQ_CLS"}
    else:
        settings |= {"target_modules": DECODER_TARGETS, "task_type": "CAUSAL_LM"}
    base = load_base(path, is_encoder)
    if arm.base == "sensitivity":
        ranks = find_ranks(base, settings["target_modules"], rank, rows[:SAMPLES])
        scalings = {name: scale_by_rank(SCALING, rank, own, arm.power or 0) for name, own in ranks.items()}
        settings |= {"rank_pattern": ranks}
        settings |= {"alpha_pattern": {name: own * scalings[name] for name, own in ranks.items()}}
    if arm.base != "eva":
        return get_peft_model(base, LoraConfig(**settings))
    model = get_peft_model(base, LoraConfig(**settings, init_lora_weights="eva", eva_config=EvaConfig(rho=2.0)))
    batches = [
        {key: value.to(DEVICE) for key, value in collate(rows[start : start + 4]).items()}
        for start in range(0, min(SAMPLES, len(rows)), 4)
    ]
    initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    return model


class Evaluations(TrainerCallback):
    """Measures the validation loss in training, and the test loss where it is the lowest so far.

    Attributes:
        curve: for each evaluation the step, the CPU seconds of training until then, and the validation loss.
        best: the step and the test loss at the lowest validation loss.
    """

    def __init__(self, model: PeftModel, data: Data, count: int) -> None:
        self.model, self.data, self.count = model, data, count
        self.curve: list[tuple[int, float, float]] = []
        self.best: tuple[int, float] = (0, math.inf)
        self.lowest = math.inf
        self.started = time.process_time()
        self.measuring = 0.0  # CPU seconds since then that were not training

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The evaluation at the end comes after training, when l1ra has moved rank for the last time.
        if state.global_step in list_steps(state.max_steps, self.count)[:-1]:
            self.evaluate(state.global_step)

    def evaluate(self, step: int) -> tuple[float, float] | None:
        """Measure the model after ``step``; return the test loss and accuracy if the validation loss is the lowest."""
        began = time.process_time()
        loss, tested = measure(self.model, self.data.validation, BATCH)[0], None
        self.curve.append((step, round(self.find_seconds(began), 1), round(loss, 5)))
        if loss < self.lowest:
            tested = measure(self.model, self.data.test, BATCH)
            self.lowest, self.best = loss, (step, tested[0])
        self.measuring += time.process_time() - began
        return tested

    def find_seconds(self, now: float) -> float:
        """Return the CPU seconds of training until ``now``, without those of the evaluations."""
        return now - self.started - self.measuring


def list_steps(steps: int, count: int) -> list[int]:
    """Return the steps after which a run is evaluated: ``count`` of them, evenly spread, and the last is the end."""
    return sorted({max(1, round(steps * place / count)) for place in range(1, count + 1)})


def get_config(model: PeftModel) -> LoraConfig:
    """Return the configuration of the adapter."""
    config = model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    return config


def count_parameters(model: PeftModel, rank: int, block: Mapping[str, Any] | None) -> int:
    """Return the trainable parameters. With l1ra, those that its budget allows: its modules have room for more."""
    if "l1ra" not in (block or {}):
        return sum(p.numel() for p in model.parameters() if p.requires_grad)
    shapes = [p.shape for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name]
    return sum(rows * columns for rows, columns in shapes) * rank // get_config(model).r


def make_trainer(settings: Settings, model: PeftModel, seed: int, rate: float, rows: Rows, folder: str) -> Trainer:
    """Return the trainer of a run."""
    values = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=settings.batch_size,
        max_steps=settings.steps,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, settings.steps // 20),
        weight_decay=0.0,
        seed=seed,
        use_cpu=DEVICE == "cpu",
        tf32=DEVICE == "cuda" or None,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    return Trainer(model, values, train_dataset=Dataset.from_list(rows), data_collator=collate)


def run_arm(
    settings: Settings, name: str, rank: int, seed: int, rate: float, data: Data, general_before: Mapping[str, float]
) -> dict[str, Any]:
    """Train one arm, and return its figures. ``general_before`` holds the losses of the base on the general texts."""
    arm = parse_arm(name)
    block = arm.make_block(len(data.train), seed)
    torch.manual_seed(seed)
    started, steps = time.process_time(), settings.steps
    model = make_model(settings.base, settings.is_encoder, arm, rank, data.train)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(settings, model, seed, rate, data.train, folder)
        chosen = json.dumps(get_config(model).rank_pattern)
        if block is not None:
            plan = prepare_trainer(trainer, LayerselConfig.model_validate(block))
            chosen = json.dumps(plan.ranks or plan.selected) if plan else ""
            if plan and plan.step_time:
                # As much time as plain LoRA has, by the operations of a step.
                trainer.args.max_steps = steps = round(settings.steps / plan.step_time.share)
        parameters = count_parameters(model, rank, block)
        if arm.ratio is not None:
            betas = (trainer.args.adam_beta1, trainer.args.adam_beta2)
            rates = {"lr": rate, "loraplus_lr_ratio": arm.ratio}
            trainer.optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, **rates, betas=betas)
        evaluations = Evaluations(model, data, settings.evaluations)
        trainer.add_callback(evaluations)
        trainer.train()
        seconds = evaluations.find_seconds(time.process_time())
    loss, accuracy = evaluations.evaluate(steps) or measure(model, data.test, BATCH)
    general = measure_texts(model, data.general)
    changes = [after - general_before[name] for name, after in general.items()]
    return {
        "validation": evaluations.curve[-1][2],
        "test": round(loss, 5),
        "accuracy": round(accuracy, 5),
        "test_best": round(evaluations.best[1], 5),
        "step_best": evaluations.best[0],
        "training": round(measure(model, data.train[:TRAINED_ROWS], BATCH)[0], 5),
        "forgetting": round(statistics.mean(changes), 5) if changes else None,
        "parameters": parameters,
        "seconds_choosing": round(evaluations.started - started, 1),
        "seconds_training": round(seconds, 1),
        "general": json.dumps({name: [round(general_before[name], 5), round(general[name], 5)] for name in general}),
        "curve": json.dumps(evaluations.curve),
        "chosen": chosen,
    }


def find_package() -> str:
    """Return the version of the package, with its commit if it is in a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return __version__
    return f"{__version__} {commit}"
