"""What the block refuses by itself; tests/test_bad_input.py shows it through Axolotl."""

import json

import pytest
from pydantic import ValidationError

from axolotl_layersel.args import FlexoraArgs, LayerselArgs, SelectionArgs
from axolotl_layersel.errors import LayerselError
from axolotl_layersel.plan import LayerChoice, Plan, check_settings

PLUGIN = "axolotl_layersel.LayerSelectionPlugin"


def check(search: dict | None = None, **values) -> None:
    selection = {"method": "flexora", "flexora": search or {}}
    LayerselArgs.model_validate(
        {"plugins": [PLUGIN], "adapter": "lora", "layersel": {"selection": selection}, **values},
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "flexora", "keep": "positive", "ratio": 0.5}, "keep: positive and ratio: 0.5 both say how many"),
        ({"method": "cka", "keep": "positive"}, "selection.keep: positive has no effect with method cka"),
        ({"method": "cka", "flexora": {"steps": 3}}, "selection.flexora: the block has no effect with method cka"),
        ({"method": "flexora", "num_samples": 9}, "selection.num_samples: 9 has no effect with method flexora"),
        ({"method": "flexora", "token": "last"}, "selection.token: last has no effect with method flexora"),
        ({"method": "flexora", "keep": "negative"}, "selection.keep: 'negative' is not known"),
        (
            {"method": "flexora", "num_layers": 2, "flexora": {"granularity": "module"}},
            "num_layers: 2 counts layers, but flexora.granularity: module chooses modules",
        ),
        ({"method": "flexora", "flexora": {"granularity": "modul"}}, "granularity: 'modul' is not known: did you mean"),
        ({"method": "flexora", "flexora": {"val_batches": 0}}, "flexora.val_batches: 0 is too few"),
        ({"method": "flexora", "flexora": {"patience": 0}}, "flexora.patience: 0 is too few"),
        ({"method": "flexora", "flexora": {"gate_lr": -1}}, "flexora.gate_lr: -1.0 is not a learning rate"),
        ({"method": "flexora", "flexora": {"gate_lr": float("nan")}}, "flexora.gate_lr: nan is not a learning rate"),
    ],
)
def test_a_block_that_contradicts_itself_is_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        SelectionArgs(**settings)


@pytest.mark.parametrize(
    ("search", "run", "message"),
    [
        ({}, {"peft_use_dora": True}, "peft_use_dora: true. DoRA ties .* of which layersel.selection.method: flexora"),
        ({}, {"fp16": True}, "fp16: True scales the loss"),
        ({}, {"rl": "grpo"}, "rl: 'grpo' generates text"),
        ({}, {"peft_init_lora_weights": "pissa"}, "peft_init_lora_weights: 'pissa' is not supported by layersel.sel"),
        ({}, {"auto_find_batch_size": True}, "auto_find_batch_size: true starts training over"),
        ({}, {"streaming": True}, "streaming: True cannot be sampled for layersel.selection.method: 'flexora'"),
        (
            {"hypergradient": "unrolled"},
            {"plugins": [PLUGIN, "axolotl.integrations.liger.LigerPlugin"]},
            "'unrolled' differentiates twice, which the fused code of the plugin axolotl.integrations.liger",
        ),
        ({"hypergradient": "unrolled"}, {"flash_attention": True}, "twice, which flash_attention does not support"),
        (
            {"hypergradient": "unrolled"},
            {"attn_implementation": "flash_attention_2"},
            "twice, which flash_attention_2 does not support",
        ),
        ({"hypergradient": "unrolled"}, {"tiled_mlp": True}, "twice, which tiled_mlp: True does not support"),
        ({"hypergradient": "unrolled"}, {"sample_packing": True}, "the attention kernel for packed rows does not sup"),
        ({"hypergradient": "unrolled"}, {"loraplus_lr_ratio": 16}, "with one learning rate, and loraplus_lr_ratio: 16"),
        (
            {"hypergradient": "unrolled"},
            {"deepspeed": {"zero_optimization": {"stage": 3}}},
            "whole on every process, and ZeRO-3 splits them",
        ),
    ],
)
def test_a_run_that_cannot_be_searched_is_refused(search, run, message):
    with pytest.raises(ValidationError, match=message):
        check(search, **run)


def test_a_deepspeed_file_is_read_for_its_stage(tmp_path):
    path = tmp_path / "zero.json"
    for stage in (2, 3):
        path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        if stage == 2:
            check({"hypergradient": "unrolled"}, deepspeed=str(path))
        else:
            with pytest.raises(ValidationError, match="and ZeRO-3 splits them"):
                check({"hypergradient": "unrolled"}, deepspeed=str(path))
    check({"hypergradient": "unrolled"}, deepspeed="nowhere.json")  # Axolotl says what is wrong with it


def test_what_takes_effect_is_written_out():
    values = SelectionArgs(method="flexora").resolve(run_seed=4)
    assert values["keep"] == "positive" and values["ratio"] is None and values["num_samples"] is None
    assert values["flexora"] == {**FlexoraArgs.defaults, "patience": None}
    assert SelectionArgs(method="flexora", ratio=0.3).resolve(4)["keep"] is None
    assert SelectionArgs(method="cka").resolve(4)["keep"] is None


def test_dumped_defaults_are_valid_again():
    for settings in ({"method": "flexora"}, {"method": "flexora", "ratio": 0.5, "flexora": {"steps": 9}}):
        first = SelectionArgs(**settings)
        assert SelectionArgs(**first.model_dump()) == first


def test_a_plan_of_another_search_is_refused_by_the_key_that_differs():
    settings = SelectionArgs(method="flexora", ratio=0.5, flexora={"steps": 9})
    layers = [LayerChoice(layer=layer, score=float(layer), selected=layer > 0) for layer in range(2)]
    about = {"base_model": None, "versions": {}, "engine": "single", "processes": 1, "seconds": 0.0}
    plan = Plan(
        method="flexora",
        layers=layers,
        unselected="remove",
        stack="model.layers",
        modules=["model.layers.1.q_proj"],
        settings=settings.resolve(1),
        seed=1,
        calibration_rows=[],
        dataset_fingerprint=None,
        **about,
    )
    check_settings(plan, settings, "there")
    for left_out in (None, {}, {"steps": 9}):
        check_settings(plan, SelectionArgs(method="flexora", flexora=left_out), "there")
    with pytest.raises(LayerselError, match=r"selection\.flexora\.steps: 8 contradicts the plan from there.* with 9\."):
        check_settings(plan, SelectionArgs(method="flexora", flexora={"steps": 8}), "there")
