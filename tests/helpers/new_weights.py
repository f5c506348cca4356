"""Models with weights that their checkpoint does not hold."""

import os
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from axolotl_layersel import LayerselConfig, SelectionConfig, prepare_trainer
from axolotl_layersel.lora.run import Run
from helpers.models import make_lora, make_rows, make_trainer
from helpers.processes import make_arguments, train_and_record

NEW = ("score", "embed_tokens", "lm_head")


TARGETS = ["q_proj", "v_proj"]


def make_with_head(base: str):
    """Return a classifier with LoRA whose head is in no file."""
    model = LlamaForSequenceClassification.from_pretrained(base, num_labels=3, dtype=torch.float32)
    return make_lora(model, TARGETS, task_type="SEQ_CLS")


def make_with_tokens(base: str):
    """Return a language model with LoRA and three new tokens, whose embeddings train."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(100)
    return make_lora(model, TARGETS, modules_to_save=["embed_tokens", "lm_head"])


def make_with_frozen_tokens(base: str):
    """Return such a model whose embeddings do not train."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(100)
    return make_lora(model, TARGETS)


MODELS = {"frozen": make_with_frozen_tokens, "head": make_with_head, "tokens": make_with_tokens}


# DeepSpeed 0.18.9 confuses attributes of modules that PEFT 0.20.0 wraps with those of the wrapper. On ZeRO-3 no run
# with modules_to_save trains, with or without this package.
UNTRAINABLE = {"zero3": {"head", "tokens"}}


def make_data(place: str) -> list[dict]:
    """Return rows with one of the new tokens, and a class if the model has a head for it."""
    rows = make_rows(12)
    for number, row in enumerate(rows):
        row["input_ids"][4] = 97 + number % 3 if place != "head" else 5
        row["labels"] = number % 3 if place == "head" else [-100] * 4 + row["input_ids"][4:]
    return rows


@torch.no_grad()
def run_process(engine: str, base: str, folder: str, start: str | None = None) -> None:
    """Choose with ``gradient``, train, and write the new weights before and after the choice.

    If ``start`` is given, the new weights are those of the first process that wrote to this folder.
    """
    import helpers.cpu_engines  # noqa: F401  # lets the engines run without a GPU

    for place in list_places(engine if start is None else Path(start).parent.name):
        load = MODELS[place]
        # A trainer has given all processes one seed. These differ, and are the same whenever the test runs.
        torch.manual_seed(1 + int(os.environ.get("RANK", "0")))
        arguments = {**make_arguments(engine, ["LlamaDecoderLayer"]), "use_cpu": engine == "single"}
        trainer = make_trainer(lambda _, load=load: load(base), Path(folder) / place, make_data(place), **arguments)
        run = Run.of(trainer)
        new = {name: weight for name, weight in run.model.named_parameters() if any(part in name for part in NEW)}
        if start is not None:
            for name, value in torch.load(f"{start}/{place}-before-0.pt").items():
                new[name].copy_(value)
        write(run, new, f"{folder}/{place}-before")
        block = SelectionConfig(method="fisher", num_samples=6, ratio=0.5)
        with torch.enable_grad():
            prepare_trainer(trainer, LayerselConfig(selection=block))
            write(run, new, f"{folder}/{place}-after")
            train_and_record(trainer, folder)


def list_places(engine: str) -> list[str]:
    """Return the models that stock PEFT trains on an engine."""
    return [place for place in MODELS if place not in UNTRAINABLE.get(engine, ())]


def write(run: Run, weights: dict, path: str) -> None:
    """Write this process's values of some weights."""
    values = {name: run.engine.gather_parameter(weight) for name, weight in weights.items()}
    torch.save(values, f"{path}-{run.trainer.args.process_index}.pt")
