"""Fine-tune an encoder on a task of GLUE with LoRA in the layers that matter, with only transformers and PEFT.

    python example_configs/bert_glue.py --model google-bert/bert-base-uncased \
        --train SST-2/train.tsv --dev SST-2/dev.tsv --text sentence --output runs/sst2

The files have the format of GLUE: tab-separated, with a header line, without quotation marks. ``--text`` takes two
columns for tasks on pairs, such as ``sentence1 sentence2``; ``--label`` is the column with the classes.
"""

import argparse
import csv
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
)

from axolotl_layersel import LayerselConfig, SelectionConfig, prepare_trainer


def read_glue(path: Path, text: list[str], label: str) -> tuple[list[list[str]], list[str]]:
    """Return the one or two texts of each row and its class."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [[row[column] for column in text] for row in rows], [row[label] for row in rows]


def measure_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the share of rows with the right class."""
    return {"accuracy": float((prediction.predictions.argmax(axis=-1) == prediction.label_ids).mean())}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train, save the adapter to ``--output``, and return the metrics on ``--dev``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="an encoder, by its name on the hub or its folder")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--dev", type=Path, required=True)
    parser.add_argument("--text", nargs="+", default=["sentence"])
    parser.add_argument("--label", default="label")
    parser.add_argument("--output", required=True)
    parser.add_argument("--method", default="cka", help="how layers are chosen")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of the layers that keep LoRA")
    parser.add_argument("--num-samples", type=int, default=128, help="training rows that the scores are computed from")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    paths = {"train": options.train, "dev": options.dev}
    files = {name: read_glue(path, options.text, options.label) for name, path in paths.items()}
    classes = sorted(set(files["train"][1]))
    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def tokenize(name: str) -> Dataset:
        texts, labels = files[name]
        rows = tokenizer(*map(list, zip(*texts)), truncation=True, max_length=128)
        return Dataset.from_dict({**rows, "labels": [classes.index(label) for label in labels]})

    torch.manual_seed(options.seed)  # for the new classifier
    base = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=len(classes))
    # PEFT puts LoRA on the linear modules of the body, and trains the whole new classifier.
    lora = LoraConfig(task_type="SEQ_CLS", r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear")
    trainer = Trainer(
        get_peft_model(base, lora),
        TrainingArguments(
            output_dir=options.output,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            seed=options.seed,
            report_to=[],
        ),
        train_dataset=tokenize("train"),
        eval_dataset=tokenize("dev"),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=measure_accuracy,
    )
    selection = SelectionConfig(method=options.method, ratio=options.ratio, num_samples=options.num_samples)
    prepare_trainer(trainer, LayerselConfig(selection=selection))
    trainer.train()
    trainer.save_model()
    return trainer.evaluate()


if __name__ == "__main__":
    print(main())
