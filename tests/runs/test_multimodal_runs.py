"""Multimodal models: every method and l1ra in the vision tower, the language model and both, on rows with images."""

import functools
from pathlib import Path

import pytest
from helpers.multimodal import (
    CHOICES,
    NAMES,
    make_multimodal,
    save_multimodal,
)
from helpers.processes import check_same_choices, launch_processes
from safetensors.torch import load_file

from axolotl_layersel.common.paths import plan_path
from axolotl_layersel.config.layer_names import find_layer
from axolotl_layersel.selection.plan_file import read_plan


@pytest.fixture(scope="module")
def launch(zygote, tmp_path_factory):
    """Return a function that chooses with every method and trains, once for each engine, and returns the folder."""

    @functools.cache
    def run(engine: str) -> Path:
        folder, base = tmp_path_factory.mktemp(engine), make_multimodal("Qwen2_5_VL")
        return launch_processes(zygote, "helpers.multimodal:run_process", engine, folder, base)

    return run


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_every_engine_chooses_and_trains_as_one_process_does(engine, launch):
    alone, shared = launch("single"), launch(engine)
    plans = check_same_choices(alone, shared, engine, CHOICES, make_multimodal("Qwen2_5_VL"))
    for choice, (one, other) in zip(CHOICES, plans):
        assert (one.rows_left_out == [4]) == (choice == "cka"), "the text, which every method draws"
        assert (other.calibration_rows, other.rows_left_out) == (one.calibration_rows, one.rows_left_out)


def make_settings(name: str, folder: Path) -> dict:
    """Write a model with its processor and rows that are tokenised batch by batch, and return their YAML keys."""
    save_multimodal(name, folder / "model", folder / "rows.jsonl")
    return {
        "base_model": str(folder / "model"),
        "processor_type": "AutoProcessor",
        "chat_template": "tokenizer_default",
        "skip_prepare_dataset": True,
        "remove_unused_columns": False,
        "sample_packing": False,
        "datasets": [{"path": str(folder / "rows.jsonl"), "ds_type": "json", "type": "chat_template"}],
        "plugins": ["helpers.cpu_engines.CpuEnginesPlugin", "axolotl_layersel.LayerSelectionPlugin"],
        "lora_target_modules": ["q_proj", "v_proj"],
        "save_steps": 6,
    }


@pytest.fixture(scope="module")
def llava_settings(tmp_path_factory) -> dict:
    return make_settings("Llava", tmp_path_factory.mktemp("axolotl"))


@pytest.mark.nightly
def test_axolotl_scores_rows_that_its_collator_tokenises_and_trains_both_stacks(train, llava_settings):
    block = {"selection": {"method": "fisher", "stacks": "both", "num_samples": 9, "num_layers": 3}, "l1ra": {}}
    run, sharded = (train(engine, **llava_settings, layersel=block) for engine in ("single", "zero3"))
    plan, other = (read_plan(plan_path(each.folder)) for each in (run, sharded))
    assert (plan.engine, other.engine) == ("single", "zero3")
    assert (other.modules, other.dataset_fingerprint) == (plan.modules, plan.dataset_fingerprint)
    scores = [[choice.score for choice in each.layers] for each in (plan, other)]
    assert scores[1] == pytest.approx(scores[0], rel=1e-4, abs=1e-12)
    assert sharded.adapter().keys() == run.adapter().keys()
    assert [choice.layer for choice in plan.layers] == NAMES and len(plan.selected) == 3
    assert all(choice.score > 0 for choice in plan.layers if choice.layer != "vision.3")
    adapter = load_file(run.folder / "adapter_model.safetensors")
    assert {find_layer(plan.stack, name.removeprefix("base_model.model.")) for name in adapter} == set(plan.selected)
    assert all(value.any() for name, value in adapter.items() if "lora_B" in name)
    assert "was read back, and its modules compute what the model's compute" in run.log


def test_axolotl_scores_and_trains_both_stacks_of_gemma_3_too(train, tmp_path):
    block = {"selection": {"method": "relative", "stacks": "both", "num_samples": 9, "num_layers": 3}}
    block["l1ra"] = {"update_ratio": 0.16, "move_ratio": 0.3}
    run = train(**make_settings("Gemma3", tmp_path), layersel=block)
    plan = read_plan(plan_path(run.folder))
    assert [choice.layer for choice in plan.layers] == NAMES and len(plan.selected) == 3
    assert all(choice.score > 0 for choice in plan.layers)
    names = [name.removeprefix("base_model.model.") for name in run.adapter()]
    assert {find_layer(plan.stack, name) for name in names} == set(plan.selected)
    assert len({tuple(ranks.values()) for ranks in run.ranks().values()}) > 1, "rank moved"


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"stacks": "both", "layers": [0, 1]}, "layersel.selection.layers: [0, 1] is not how the layers of"),
        ({"layers": ["vision.1"]}, "layersel.selection.layers: [vision.1] is not how the layers of"),
        (
            {"stacks": "both", "layers": ["vision.99", "language.1"]},
            "layersel.selection.layers: [vision.99] are out of range: the model's layers are vision.0 to vision.3 and "
            "language.0 to language.2.",
        ),
    ],
)
def test_layers_of_other_stacks_are_refused_before_the_model_loads(train, llava_settings, selection, message):
    run = train(**llava_settings, layersel={"selection": {"method": "explicit", **selection}}, expect=1)
    assert f"LayerselError: {message}" in run.log
    assert "Loading weights" not in run.log


def test_a_text_model_has_no_vision_tower_to_choose_in(train, base_model):
    run = train(layersel={"selection": {"method": "last", "stacks": "vision"}}, expect=1)
    message = "layersel.selection.stacks: 'vision' chooses among the layers of a vision tower"
    assert f"LayerselError: {message}, and {base_model} has no vision tower beside" in run.log
    assert "Loading weights" not in run.log
