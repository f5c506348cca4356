"""Every method, and l1ra, in real runs of Axolotl with each trainer and kind of data: the table of trainers."""

import json
from pathlib import Path

import pytest
import torch
from helpers.generation import ask, make_generating_trainer, train_by_grpo, write_rows
from helpers.launched import load_with_stock_peft
from helpers.models import make_small_llama
from helpers.places import at_night
from helpers.probe import TOKENS
from helpers.refusals import FILE, say_by_file
from helpers.settings import preferences, selection
from helpers.support import L1RA, check_rank_moves, make_selection_config
from peft import PeftModel
from safetensors.torch import load_file

from axolotl_layersel import L1RAConfig, LayerselConfig
from axolotl_layersel.config.methods import METHODS
from axolotl_layersel.config.root import LayerselArgs

PLUGINS = [
    "helpers.cpu_engines.CpuEnginesPlugin",
    "helpers.probe.ProbePlugin",
    "helpers.probe.MethodsPlugin",
    "axolotl_layersel.LayerSelectionPlugin",
]
SCORING = ("cka", "cosine", "relative", "fisher", "gradient")
UNGENERATED = dict.fromkeys((*SCORING, "flexora"), "trains on prompts whose answers are not generated yet")
STREAMED = dict.fromkeys((*SCORING, "flexora"), "streaming: True cannot be sampled for")
REWARDED = dict.fromkeys(("fisher", "gradient"), "learns from pairs of answers and has no labels")


def train_on_chats(folder: Path) -> dict:
    asked = [{"role": "user", "content": ask(i)} for i in range(24)]
    rows = [{"messages": [row, {"role": "assistant", "content": f"{2 * i + 1}."}]} for i, row in enumerate(asked)]
    return {**write_rows(folder, rows, "chat_template"), "chat_template": "chatml"}


def train_on_texts(folder: Path) -> dict:
    return write_rows(folder, [{"text": f"{ask(i)} They are {2 * i + 1}."} for i in range(40)], "completion")


def train_on_packs(folder: Path) -> dict:
    rows = [{"instruction": ask(i), "input": "", "output": f"{2 * i + 1}."} for i in range(200)]
    packing = {"sample_packing": True, "pad_to_sequence_len": True, "micro_batch_size": 1, "num_epochs": 8}
    return {**write_rows(folder, rows, "alpaca"), **packing}


def train_on_a_stream(folder: Path) -> dict:
    rows = [{"instruction": ask(i), "input": "", "output": f"{2 * i + 1}."} for i in range(60)]
    return {**write_rows(folder, rows, "alpaca"), "streaming": True}


def train_by_kto(folder: Path) -> dict:
    rows = [
        {"instruction": ask(i), "completion": f"They are {2 * i + i % 2}.", "label": i % 2 == 1, "system": ""}
        for i in range(24)
    ]
    return {**write_rows(folder, rows, "chatml.argilla"), "rl": "kto", "remove_unused_columns": False}


def train_by_simpo(folder: Path) -> dict:
    return {**preferences(folder, "simpo"), "rl_beta": 0.1, "cpo_alpha": 1.0, "simpo_gamma": 0.5}


# The trainers with their data, and for refused methods a part of the message.
TRAINERS = {
    "SFT": (lambda folder: {}, {}),
    "SFT, `chat_template`": (train_on_chats, {}),
    "completion": (train_on_texts, {}),
    "SFT, packed": (train_on_packs, {}),
    "SFT, streamed": (train_on_a_stream, STREAMED),
    "DPO": (lambda folder: preferences(folder, "dpo"), {}),
    "IPO": (lambda folder: preferences(folder, "ipo"), {}),
    "KTO": (train_by_kto, {}),
    "ORPO": (lambda folder: preferences(folder, "orpo"), {}),
    "SimPO": (train_by_simpo, {}),
    "reward model": (lambda folder: preferences(folder, "reward"), REWARDED),
    "GRPO": (train_by_grpo, UNGENERATED),
}
# The two whose batches differ most from those of SFT, which all other runs train by: packed rows, and prompts.
BY_DAY = ("SFT, packed", "GRPO")


def make_block(method: str) -> dict:
    """Return the ``layersel`` block of a YAML file that chooses by ``method``."""
    return {"selection": make_selection_config(method, [1, 2]).model_dump(exclude_none=True)}


@pytest.fixture(scope="module")
def plan(train) -> Path:
    """The plan of a run of SFT."""
    run = train(**selection(), max_steps=1)
    return run.folder / "layersel" / "plan.json"


@pytest.mark.parametrize("name", [*BY_DAY, *at_night(*(name for name in TRAINERS if name not in BY_DAY))])
def test_every_method_chooses_in_a_run_with_a_trainer_and_rank_moves(name, train, plan, base_model, tmp_path, support):
    make_settings, refused = TRAINERS[name]
    settings = make_settings(tmp_path)
    messages = {method: say_by_file(make_block(method), settings) for method in refused}
    assert all(part in messages[method] for method, part in refused.items()), messages
    methods = [method for method in METHODS if method not in refused]
    for method in methods:
        LayerselArgs.model_validate({**FILE, **settings, "layersel": make_block(method)})
    # A plan of another run also works if rows cannot be scored.
    given = {"selection": {"method": "cka", "plan": str(plan)}}
    block = {**(make_block("cka") if "cka" in methods else given), "l1ra": {"update_ratio": 0.16, "move_ratio": 0.3}}
    env = {"LAYERSEL_TEST_METHODS": " ".join(methods)}
    run = train(env=env, **{"plugins": PLUGINS, **settings, "layersel": block, "save_steps": 6})

    found = json.loads((run.folder / "methods.json").read_text())
    for method in methods:
        scores = [score for score in found[method]["scores"].values() if score is not None]
        if METHODS[method].needs_data:
            assert len(scores) == 8 and torch.tensor(scores).isfinite().all()
            assert len(set(scores)) == 8, f"{method} tells no layers apart"
            assert len(set(found[method]["rows"])) == {"flexora": 4}.get(method, 8)
        assert found[method]["selected"]
        support.tested("trainer", name, method)
    assert len(run.selected) == 4 and ("nothing is scored" in run.log) == ("cka" in refused)
    assert "cka" in refused or found["cka"]["selected"] == run.selected
    for method in refused:
        support.refused("trainer", name, method, messages[method])

    assert len({tuple(ranks.values()) for ranks in run.ranks().values()}) > 1, "no rank moved"
    assert run.pattern() == run.ranks()[6]
    tensors = [name for name in run.adapter() if ".layers." in name]
    assert {int(name.split(".layers.")[1][0]) for name in tensors} == set(run.selected)
    losses = run.losses()
    assert losses and torch.tensor(losses).isfinite().all()
    if name == "reward model":  # its head is new, and trains in addition to LoRA
        assert set(run.adapter()) - set(tensors) == {"base_model.model.score.weight"}
        stock = compute_rewards(base_model, run.folder)
    else:
        stock = load_with_stock_peft(base_model, [run.folder], tmp_path)[str(run.folder)]
    trained = load_file(run.folder / "logits.safetensors")["logits"]
    torch.testing.assert_close(stock, trained, atol=1e-5, rtol=1e-5)
    support.tested("trainer", name, L1RA)


def compute_rewards(base_model: Path, adapter: Path) -> torch.Tensor:
    """Return the output of a reward model in stock PEFT on the tokens of the probe."""
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(base_model, num_labels=1, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        # One row at a time, which needs no padding token.
        return torch.cat([model(input_ids=tokens[None]).logits for tokens in TOKENS])


def test_rank_moves_by_pressure_too_in_a_model_that_generates_what_it_trains_on(tmp_path):
    trainer = make_generating_trainer(tmp_path, max_steps=6, learning_rate=1e-2, max_completion_length=8)
    config = LayerselConfig(l1ra=L1RAConfig(rule="pressure", update_ratio=0.16))
    batch = {"input_ids": torch.arange(10, 30)[None]}
    check_rank_moves(trainer, config, make_small_llama(), tmp_path, batch)


@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp2-full"])
@pytest.mark.nightly
def test_engines_generate_with_a_model_in_which_rank_moves(engine, train, tmp_path, base_model):
    settings = {**train_by_grpo(tmp_path), "micro_batch_size": 4}
    block = {"selection": {"method": "last"}, "l1ra": {"update_ratio": 0.16, "move_ratio": 0.3}}
    run = train(engine, plugins=[name for name in PLUGINS if "Methods" not in name], layersel=block, **settings)
    assert run.engine["engine"] == engine.partition("-")[0] and run.engine["processes"] == 2
    assert len({tuple(ranks.values()) for ranks in run.ranks().values()}) > 1, "no rank moved"
    assert run.selected == [4, 5, 6, 7]
    stock = load_with_stock_peft(base_model, [run.folder], tmp_path)[str(run.folder)]
    torch.testing.assert_close(stock, load_file(run.folder / "logits.safetensors")["logits"], atol=1e-5, rtol=1e-5)
