"""Weights that are new in each process, such as a head or the rows of added tokens: all take those of the first."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, ROOT, make_lora, make_rows, make_small_llama, make_trainer, preferences, selection
from ranks import check_same_choices, launch_ranks, make_arguments, train_and_record
from safetensors.torch import load_file, save_file
from test_plain_trainer import bert, check_adapter  # noqa: F401  # a fixture
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from axolotl_layersel import LayerselConfig, SelectionConfig, prepare_trainer
from axolotl_layersel.lora.run import Run
from axolotl_layersel.training.process_agreement import SAMPLED_VALUES, digest

SAID = "weights were new in each process, such as "
NEW = ("score", "embed_tokens", "lm_head")
TARGETS = ["q_proj", "v_proj"]


def make_with_head(base: str):
    """Return a classifier under LoRA, whose head no file holds."""
    model = LlamaForSequenceClassification.from_pretrained(base, num_labels=3, dtype=torch.float32)
    return make_lora(model, TARGETS, task_type="SEQ_CLS")


def make_with_tokens(base: str):
    """Return a language model under LoRA with three new tokens, whose embeddings train."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(100)
    return make_lora(model, TARGETS, modules_to_save=["embed_tokens", "lm_head"])


def make_with_frozen_tokens(base: str):
    """Return one whose embeddings do not train."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(100)
    return make_lora(model, TARGETS)


MODELS = {"frozen": make_with_frozen_tokens, "head": make_with_head, "tokens": make_with_tokens}
# DeepSpeed 0.18.9 takes attributes of what PEFT 0.20.0 wraps for those of the wrapper, so that on ZeRO-3 no run with
# modules_to_save trains, with or without this package.
UNTRAINABLE = {"zero3": {"head", "tokens"}}


def make_data(place: str) -> list[dict]:
    """Return rows with one of the new tokens, and a class where there is a head for it."""
    rows = make_rows(12)
    for number, row in enumerate(rows):
        row["input_ids"][4] = 97 + number % 3 if place != "head" else 5
        row["labels"] = number % 3 if place == "head" else [-100] * 4 + row["input_ids"][4:]
    return rows


@torch.no_grad()
def be_a_rank(engine: str, base: str, folder: str, start: str | None = None) -> None:
    """Choose by the gradient of the loss and train, and leave what the new weights were before and after the choice.

    ``start``: the folder of ranks whose first one's new weights are taken.
    """
    import cpu_engines  # noqa: F401  # lets the engines run without a GPU

    for place in list_places(engine if start is None else Path(start).parent.name):
        load = MODELS[place]
        torch.seed()  # a trainer has given both the same one
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
    """Write this rank's values of some weights."""
    values = {name: run.engine.gather_parameter(weight) for name, weight in weights.items()}
    torch.save(values, f"{path}-{run.trainer.args.process_index}.pt")


@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp2"])
def test_all_processes_score_and_train_from_the_new_weights_of_the_first(zygote, tmp_path, engine):
    for folder in (engine, "alone"):
        (tmp_path / folder / "shared").mkdir(parents=True)
    base = make_small_llama(layers=4, pad_token_id=0)
    shared = launch_ranks(zygote, "test_new_weights:be_a_rank", engine, tmp_path / engine / "shared", base)
    places = list_places(engine)
    for place in places:
        first, second = (torch.load(shared / f"{place}-before-{rank}.pt") for rank in (0, 1))
        if engine != "zero3":  # which holds one of each
            assert any(not torch.equal(value, second[name]) for name, value in first.items())
        for rank in (0, 1):
            after = torch.load(shared / f"{place}-after-{rank}.pt")
            assert all(torch.equal(value, after[name]) for name, value in first.items())
    arguments = {"start": str(shared)}
    alone = launch_ranks(zygote, "test_new_weights:be_a_rank", "single", tmp_path / "alone", base, **arguments)
    check_same_choices(alone, shared, engine, places, make_resized(shared / "base"))
    if engine != "zero3":
        assert (shared / "log.0").read_text().count(SAID) == len(places)
    assert SAID not in (shared / "log.1").read_text() + (alone / "log.0").read_text()


def make_resized(base: Path):
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(100)
    return model


def test_what_does_not_train_is_looked_at_where_a_vocabulary_grows():
    weight = torch.zeros(40 * SAMPLED_VALUES)
    grown = weight.clone()
    grown[-1] = 1
    assert digest(weight, whole=False) != digest(grown, whole=False)
    inside = weight.clone()
    inside[SAMPLED_VALUES + 1] = 1
    assert digest(weight) != digest(inside)


@pytest.mark.parametrize("engine", ["zero2", "fsdp2-sharded"])
def test_axolotl_adds_tokens_on_several_processes(train, engine):
    added = {"tokens": ["<one>", "<two>"], "lora_modules_to_save": ["embed_tokens", "lm_head"]}
    run = train(engine, **added, **selection("fisher", num_samples=6))
    assert run.engine["engine"] == engine.partition("-")[0]
    assert run.log.count(SAID) == 1
    assert {"base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"} <= run.adapter().keys()


def test_axolotl_trains_a_reward_model_on_several_processes(train, tmp_path):
    run = train("ddp", **preferences(tmp_path, "reward"), **selection("cka"))
    assert run.engine["engine"] == "ddp"
    assert run.log.count(SAID) == 1
    assert any("score" in name for name in run.adapter())


@pytest.mark.launches
def test_the_example_of_the_readme_runs_under_torchrun(bert, tmp_path):  # noqa: F811
    section = (ROOT / "README.md").read_text().split("\n## Without Axolotl\n")[1].split("\n## ")[0]
    (example,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    (tmp_path / "train.tsv").symlink_to(bert / "train.tsv")
    base = tmp_path / "google-bert" / "bert-base-uncased"
    shutil.copytree(bert / "google-bert" / "bert-base-uncased", base)
    weights = load_file(base / "model.safetensors")  # of an encoder, whose classifier is yet to be made
    encoder = {name: value for name, value in weights.items() if not name.startswith("classifier")}
    save_file(encoder, base / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "script.py").write_text(f"import logging\nlogging.basicConfig(level=logging.INFO)\n{example}")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "script.py"]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env={**ENVIRONMENT, "HF_HOME": str(tmp_path / "cache"), "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count(SAID) == 1
    check_adapter(tmp_path / "out", base, 2)
