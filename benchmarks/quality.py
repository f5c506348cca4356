"""Compare held-out loss by trainable parameters: LoRA in all layers, and the ways to choose layers and ranks.

    python benchmarks/quality.py train BASE TRAIN.jsonl TEST.jsonl runs.csv --ranks 1 2 4 8 --seeds 0 1 2
    python benchmarks/quality.py report runs.csv --against lora --picture curves.svg

Rows of a JSONL file have a ``question`` and an ``answer``; the loss is over the tokens of the answers. A TSV file has
the columns ``sentence`` and ``label``, for an encoder. Every arm has at most as many trainable parameters as LoRA of
the same rank in all layers. The learning rate of an arm is the one of ``--rates`` with the lowest mean loss on
validation rows, which are neither trained nor tested on. A GPU is used if there is one, in TF32. Time is CPU time, so
that other work on the machine does not count. Each run appends a line to the CSV file. A run whose line exists is
skipped, so that a benchmark can be resumed.
"""

import argparse
import csv
import itertools
import json
import math
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    logging,
)

from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.training.prepare import prepare_trainer

DECODER_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ENCODER_TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
SAMPLES = 128
HALF = {"ratio": 0.5, "rank_allocation": "match"}
SCORED = {"rank_allocation": "score", "num_samples": SAMPLES}
# The layersel block of every arm. EVA, PEFT's allocation of rank by the data, has none.
ARMS: dict[str, dict[str, Any] | None] = {
    "lora": {"selection": {"method": "first", "ratio": 1.0}},
    "gradient": {"selection": {"method": "gradient", **SCORED}},
    "gradient group": {"selection": {"method": "gradient", "granularity": "group", **SCORED}},
    "gradient layer": {"selection": {"method": "gradient", "granularity": "layer", **SCORED}},
    "fisher": {"selection": {"method": "fisher", "granularity": "module", **SCORED}},
    "cka": {"selection": {"method": "cka", "num_samples": SAMPLES, **HALF}},
    "random": {"selection": {"method": "random", **HALF}},
    "cka same rank": {"selection": {"method": "cka", "num_samples": SAMPLES, "ratio": 0.5}},
    "random same rank": {"selection": {"method": "random", "ratio": 0.5}},
    "last": {"selection": {"method": "last", **HALF}},
    "l1ra": {"l1ra": {}},
    "pressure": {"l1ra": {"rule": "pressure"}},
    "gradient l1ra": {"selection": {"method": "gradient", **SCORED}, "l1ra": {}},
    "eva": None,
}
FIGURES = ["validation", "test", "accuracy", "parameters", "seconds_choosing", "seconds_training"]
COLUMNS = ["arm", "rank", "seed", "rate", "steps", *FIGURES, "chosen"]
IGNORED = -100
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def read_rows(path: Path, tokenizer: Any, longest: int) -> list[dict[str, Any]]:
    """Return the rows of a file, questions with answers or sentences with labels, as tokens and labels."""
    if path.suffix == ".tsv":
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file, delimiter="\t"))
        ids = tokenizer([line["sentence"] for line in lines], truncation=True, max_length=longest)["input_ids"]
        return [make_row(tokens, int(line["label"])) for tokens, line in zip(ids, lines)]
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        question = tokenizer(f"Question: {row['question']}\nAnswer:", add_special_tokens=False)["input_ids"]
        answer = tokenizer(f" {row['answer']}", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        if len(question) < longest:
            labels = [IGNORED] * len(question) + answer
            rows.append(make_row((question + answer)[:longest], labels[:longest]))
    return rows


def make_row(ids: list[int], labels: int | list[int]) -> dict[str, Any]:
    """Return a row of a dataset."""
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return rows as a batch, padded on the right."""
    if isinstance(batch[0]["labels"], int):
        fill = {"input_ids": 0, "attention_mask": 0}
    else:
        fill = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    filled = {key: pad_sequence([torch.tensor(row[key]) for row in batch], True, value) for key, value in fill.items()}
    return {"labels": torch.tensor([row["labels"] for row in batch])} | filled if len(fill) == 2 else filled


@torch.no_grad()
def measure(model: PeftModel, rows: list[dict[str, Any]], batch_size: int) -> tuple[float, float]:
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


def make_model(arguments: argparse.Namespace, arm: str, rank: int, rows: list[dict[str, Any]]) -> PeftModel:
    """Return the base under LoRA."""
    settings: dict[str, Any] = {"r": rank, "lora_alpha": 2 * rank}
    if arguments.train.suffix == ".tsv":
        base = AutoModelForSequenceClassification.from_pretrained(arguments.base, dtype=torch.float32, num_labels=2)
        settings |= {"target_modules": ENCODER_TARGETS, "task_type": "SEQ_CLS"}
    else:
        base = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32)
        settings |= {"target_modules": DECODER_TARGETS, "task_type": "CAUSAL_LM"}
    base.to(DEVICE)
    if arm != "eva":
        return get_peft_model(base, LoraConfig(**settings))
    model = get_peft_model(base, LoraConfig(**settings, init_lora_weights="eva", eva_config=EvaConfig(rho=2.0)))
    batches = [
        {key: value.to(DEVICE) for key, value in collate(rows[start : start + 4]).items()}
        for start in range(0, SAMPLES, 4)
    ]
    initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    return model


def run_arm(
    arguments: argparse.Namespace, arm: str, rank: int, seed: int, rate: float, data: dict[str, list]
) -> dict[str, Any]:
    """Train one arm, and return its line of the CSV file."""
    torch.manual_seed(seed)
    started = time.process_time()
    model = make_model(arguments, arm, rank, data["train"])
    with tempfile.TemporaryDirectory() as folder:
        values = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=arguments.batch_size,
            max_steps=arguments.steps,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, arguments.steps // 20),
            weight_decay=0.0,
            seed=seed,
            use_cpu=DEVICE == "cpu",
            tf32=DEVICE == "cuda" or None,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(model, values, train_dataset=Dataset.from_list(data["train"]), data_collator=collate)
        block, chosen = ARMS[arm], ""
        if block is not None:
            plan = prepare_trainer(trainer, LayerselConfig.model_validate(block))
            chosen = json.dumps(plan.ranks or plan.selected) if plan else ""
        if "l1ra" in (block or {}):  # modules of l1ra have room for more rank than they use
            shapes = [p.shape for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name]
            parameters = sum(rows * columns for rows, columns in shapes) * rank // model.peft_config["default"].r
        else:
            parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        ready = time.process_time()
        trainer.train()
        ended = time.process_time()
    loss, accuracy = measure(model, data["test"], 16)
    return {
        "arm": arm,
        "rank": rank,
        "seed": seed,
        "rate": rate,
        "steps": arguments.steps,
        "validation": round(measure(model, data["validation"], 16)[0], 5),
        "test": round(loss, 5),
        "accuracy": round(accuracy, 5),
        "parameters": parameters,
        "seconds_choosing": round(ready - started, 1),
        "seconds_training": round(ended - ready, 1),
        "chosen": chosen,
    }


def read_runs(path: Path) -> list[dict[str, Any]]:
    """Return the lines of the CSV file; an empty list if the file does not exist."""
    if not path.exists():
        return []
    kinds = {"arm": str, "rank": int, "seed": int, "steps": int, "parameters": int, "chosen": str}
    with path.open(newline="", encoding="utf-8") as file:
        return [{key: kinds.get(key, float)(value) for key, value in row.items()} for row in csv.DictReader(file)]


def train(arguments: argparse.Namespace) -> None:
    """Run the arms that the command line asks for and that the CSV file does not have."""
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    rows = read_rows(arguments.train, tokenizer, arguments.longest)
    data = {
        "validation": rows[: arguments.held_out],
        "train": rows[arguments.held_out : arguments.held_out + arguments.train_rows],
        "test": read_rows(arguments.test, tokenizer, arguments.longest)[: arguments.test_rows],
    }
    wanted = itertools.product(arguments.seeds, arguments.ranks, arguments.rates, arguments.arms)
    for seed, rank, rate, arm in wanted:
        keys = {"arm": arm, "rank": rank, "seed": seed, "rate": rate}
        if any(keys.items() <= run.items() for run in read_runs(arguments.output)):
            continue
        line = run_arm(arguments, arm, rank, seed, rate, data)
        new = not arguments.output.exists()
        with arguments.output.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerow(line)
        print({key: line[key] for key in COLUMNS[:-1]}, flush=True)


def choose_rates(runs: list[dict[str, Any]]) -> dict[tuple[str, int], float]:
    """Return the learning rate with the lowest mean validation loss for each arm and rank.

    The mean is over the seeds that were run with all rates of the arm.
    """
    losses: dict[tuple[str, int], dict[float, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        losses[run["arm"], run["rank"]][run["rate"]][run["seed"]] = run["validation"]
    chosen = {}
    for key, rates in losses.items():
        seeds = set.intersection(*(set(by_seed) for by_seed in rates.values()))
        means = {rate: statistics.mean(by_seed[seed] for seed in seeds) for rate, by_seed in rates.items()}
        chosen[key] = min(means, key=means.__getitem__)
    return chosen


def describe_difference(differences: list[float]) -> str:
    """Return the mean of paired differences and its 95 % interval by Student's t."""
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return f"{mean:+.4f}"
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{mean:+.4f} ± {student.ppf(0.975, len(differences) - 1) * error:.4f}"


def find_mean(by_seed: dict[int, dict[str, Any]], name: str) -> float:
    """Return the mean of a column over the runs of an arm."""
    return statistics.mean(run[name] for run in by_seed.values())


def report(arguments: argparse.Namespace) -> None:
    """Print each arm's mean test loss and accuracy, and their paired differences to another arm's."""
    runs = [run for path in arguments.runs for run in read_runs(path)]
    rates = choose_rates(runs)
    arms: dict[tuple[str, int], dict[int, dict[str, Any]]] = defaultdict(dict)
    for run in runs:
        if rates[run["arm"], run["rank"]] == run["rate"]:
            arms[run["arm"], run["rank"]][run["seed"]] = run
    wanted = ["test", "accuracy", "seconds_choosing", "seconds_training"]
    figures = [name for name in wanted if all(name in run for run in runs)]
    less = f"less {arguments.against}'s"
    table = Table("rank", "arm", "rate", "seeds", *(title for name in figures for title in (name, less)))
    for (arm, rank), by_seed in sorted(arms.items(), key=lambda item: (item[0][1], find_mean(item[1], "test"))):
        others = arms.get((arguments.against, rank), {})
        cells = []
        for name in figures:
            pairs = [run[name] - others[seed][name] for seed, run in by_seed.items() if seed in others]
            cells += [
                f"{find_mean(by_seed, name):.4f}",
                describe_difference(pairs) if pairs and arm != arguments.against else "",
            ]
        table.add_row(str(rank), arm, f"{rates[arm, rank]:g}", str(len(by_seed)), *cells)
    Console(width=180).print(table)
    if arguments.picture:
        draw_curves(arms, arguments.picture)


def draw_curves(arms: dict[tuple[str, int], dict[int, dict[str, Any]]], path: Path) -> None:
    """Draw the mean test loss of the arms with several ranks by trainable parameters and by time."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    by_parameters, by_time = figure.subplots(1, 2, sharey=True)
    for arm in dict.fromkeys(arm for arm, _ in arms):
        points = [by_seed for (name, _), by_seed in sorted(arms.items(), key=lambda item: item[0][1]) if name == arm]
        if len(points) > 1:
            losses = [find_mean(by_seed, "test") for by_seed in points]
            seconds = [find_mean(runs, "seconds_choosing") + find_mean(runs, "seconds_training") for runs in points]
            by_parameters.plot([find_mean(runs, "parameters") for runs in points], losses, marker="o", label=arm)
            by_time.plot(seconds, losses, marker="o", linestyle="none", label=arm)
    by_parameters.set(xscale="log", xlabel="trainable parameters", ylabel="loss of held-out answers")
    by_time.set(xlabel="processor seconds, choosing and training")
    by_parameters.xaxis.set_minor_formatter(NullFormatter())
    by_parameters.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train", help="run the arms that the CSV file does not have yet")
    training.set_defaults(function=train)
    for name in ("base", "train", "test", "output"):
        training.add_argument(name, type=Path)
    training.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    training.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    training.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    training.add_argument("--rates", nargs="+", type=float, default=[1e-3, 2e-3])
    training.add_argument("--steps", type=int, default=120)
    training.add_argument("--batch-size", type=int, default=8)
    training.add_argument("--longest", type=int, default=512, help="tokens after which rows are cut")
    training.add_argument("--train-rows", type=int, default=2000)
    training.add_argument("--held-out", type=int, default=200, help="rows to validate on")
    training.add_argument("--test-rows", type=int, default=200)
    reporting = commands.add_parser("report", help="print the table")
    reporting.set_defaults(function=report)
    reporting.add_argument("runs", type=Path, nargs="+")
    reporting.add_argument("--against", choices=ARMS, default="lora", help="the arm that the others are compared with")
    reporting.add_argument("--picture", type=Path, help="file to draw the curves into")
    arguments = parser.parse_args()
    arguments.function(arguments)


if __name__ == "__main__":
    main()
