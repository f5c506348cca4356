"""Weights that each process creates, such as a head or rows of added tokens: all take those of the first process."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers.documents import find_blocks
from helpers.models import make_small_llama
from helpers.new_weights import (
    list_places,
)
from helpers.places import ROOT
from helpers.plain_trainer import check_adapter, make_bert, run_python
from helpers.processes import check_same_choices, launch_processes
from helpers.settings import preferences, selection
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return make_bert(tmp_path_factory.mktemp("glue"))


SAID = "weights were new in each process, such as "


@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp2"])
def test_all_processes_score_and_train_from_the_new_weights_of_the_first(zygote, tmp_path, engine):
    for folder in (engine, "alone"):
        (tmp_path / folder / "shared").mkdir(parents=True)
    base = make_small_llama(layers=4, pad_token_id=0)
    shared = launch_processes(zygote, "helpers.new_weights:run_process", engine, tmp_path / engine / "shared", base)
    places = list_places(engine)
    for place in places:
        first, second = (torch.load(shared / f"{place}-before-{rank}.pt") for rank in (0, 1))
        if engine != "zero3":  # which holds one of each
            assert any(not torch.equal(value, second[name]) for name, value in first.items())
        for rank in (0, 1):
            after = torch.load(shared / f"{place}-after-{rank}.pt")
            assert all(torch.equal(value, after[name]) for name, value in first.items())
    arguments = {"start": str(shared)}
    alone = launch_processes(zygote, "helpers.new_weights:run_process", "single", tmp_path / "alone", base, **arguments)
    check_same_choices(alone, shared, engine, places, make_resized(shared / "base"))
    if engine != "zero3":
        assert (shared / "log.0").read_text().count(SAID) == len(places)
    assert SAID not in (shared / "log.1").read_text() + (alone / "log.0").read_text()


def make_resized(base: Path):
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(100)
    return model


@pytest.mark.parametrize("engine", ["zero2", "fsdp2-sharded"])
@pytest.mark.nightly
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


@pytest.mark.nightly
def test_the_example_of_the_manual_runs_under_torchrun(bert, tmp_path):
    (example,) = find_blocks(ROOT / "docs" / "trainer.md", "python")
    (tmp_path / "train.tsv").symlink_to(bert / "train.tsv")
    base = tmp_path / "google-bert" / "bert-base-uncased"
    shutil.copytree(bert / "google-bert" / "bert-base-uncased", base)
    weights = load_file(base / "model.safetensors")  # of an encoder without a classifier
    encoder = {name: value for name, value in weights.items() if not name.startswith("classifier")}
    save_file(encoder, base / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "script.py").write_text(f"import logging\nlogging.basicConfig(level=logging.INFO)\n{example.text}")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "script.py"]
    done = run_python(tmp_path, *command)
    assert done.stderr.count(SAID) == 1
    check_adapter(tmp_path / "out", base, 2)
