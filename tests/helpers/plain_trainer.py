"""A BERT and its data for a plain Trainer, and a check of its adapter."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, BertTokenizer

from axolotl_layersel.lora.modules import find_lora_modules
from helpers.places import ENVIRONMENT, HANGS

WORDS = ["a", "bad", "good", "film", "play", "story", "with", "fine", "actors"]


def make_bert(folder: Path) -> Path:
    """Write a random BERT of 4 layers and its tokenizer to a folder, and files in the format of GLUE's SST-2."""
    model = folder / "google-bert" / "bert-base-uncased"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(model)
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 4}
    config = BertConfig(vocab_size=len(vocabulary), initializer_range=0.1, **size)
    BertForSequenceClassification(config).save_pretrained(model)
    rows = [(f"a {WORDS[1 + i % 2]} {WORDS[3 + i % 3]}{' with fine actors' * (i % 5 < 2)}", i % 2) for i in range(24)]
    text = "sentence\tlabel\n" + "".join(f"{sentence}\t{label}\n" for sentence, label in rows)
    (folder / "train.tsv").write_text(text)
    (folder / "dev.tsv").write_text(text)
    return folder


def run_python(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run Python in ``folder`` with a cache of its own there, and return what it printed."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**ENVIRONMENT, "HF_HOME": str(folder / "cache"), "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def check_adapter(folder: Path, model: Path, chosen: int) -> None:
    """Check that stock PEFT rebuilds the adapter, in ``chosen`` of the layers, and its classifier."""
    plan = json.loads((folder / "layersel" / "plan.json").read_text())
    selected = [choice["layer"] for choice in plan["layers"] if choice["selected"]]
    assert len(selected) == chosen
    base = AutoModelForSequenceClassification.from_pretrained(model)
    new = base.classifier.weight.clone()
    rebuilt = PeftModel.from_pretrained(base, folder)
    layers = {int(name.split(".")[3]) for name in find_lora_modules(base) if ".layer." in name}
    assert layers == set(selected)
    assert not torch.equal(rebuilt.get_base_model().classifier.modules_to_save["default"].weight, new)
