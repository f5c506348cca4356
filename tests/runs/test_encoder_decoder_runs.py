"""Models with an encoder and a decoder: every method and l1ra, in both stacks, through the public function."""

import functools
import json
from pathlib import Path

import pytest
from helpers.encoder_decoders import CHOICES, NAMES, make_encoder_decoder, make_pairs, make_tokenizer
from helpers.places import at_night
from helpers.processes import check_same_choices, launch_processes
from safetensors.torch import load_file

from axolotl_layersel.common.paths import plan_path
from axolotl_layersel.config.layer_names import find_layer
from axolotl_layersel.selection.plan_file import read_plan


@pytest.fixture(scope="module")
def launch(zygote, tmp_path_factory):
    """Return a function that chooses with every method and trains, once for each engine, and returns the folder."""

    @functools.cache
    def run(name: str, engine: str) -> Path:
        folder, base = tmp_path_factory.mktemp(f"{name}-{engine}"), make_encoder_decoder(name)
        return launch_processes(zygote, "helpers.encoder_decoders:run_process", engine, folder, base, name=name)

    return run


@pytest.mark.parametrize(
    ("name", "engine"), [("T5", "ddp"), ("T5", "zero3"), ("T5", "fsdp2"), *at_night(("Bart", "fsdp2"))]
)
def test_every_engine_chooses_and_trains_as_one_process_does(name, engine, launch):
    alone, shared = launch(name, "single"), launch(name, engine)
    check_same_choices(alone, shared, engine, CHOICES, make_encoder_decoder(name))


@pytest.fixture(scope="module")
def t5_settings(tmp_path_factory) -> dict:
    """The YAML keys of a T5 and of rows that are already tokenised."""
    folder = tmp_path_factory.mktemp("axolotl")
    make_encoder_decoder("T5").save_pretrained(folder / "t5")
    make_tokenizer().save_pretrained(folder / "t5")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_pairs(24)))
    return {
        "base_model": str(folder / "t5"),
        "model_type": "T5ForConditionalGeneration",
        "tokenizer_type": "PreTrainedTokenizerFast",
        "datasets": [{"path": str(folder / "rows.jsonl"), "ds_type": "json", "type": None}],
        "lora_target_modules": ["q", "v"],
        "plugins": ["helpers.cpu_engines.CpuEnginesPlugin", "axolotl_layersel.LayerSelectionPlugin"],
    }


def test_axolotl_trains_on_rows_that_are_tokenised_already(train, t5_settings):
    block = {"selection": {"method": "fisher", "num_samples": 9, "num_layers": 2}}
    run = train(**t5_settings, layersel=block)
    plan = read_plan(plan_path(run.folder))
    assert [choice.layer for choice in plan.layers] == NAMES["T5"] and len(plan.selected) == 2
    adapter = load_file(run.folder / "adapter_model.safetensors")
    assert {find_layer(plan.stack, name.removeprefix("base_model.model.")) for name in adapter} == set(plan.selected)
    assert "was read back, and its modules compute what the model's compute" in run.log


def test_layers_by_number_are_refused_before_the_model_loads(train, t5_settings):
    run = train(**t5_settings, layersel={"selection": {"method": "explicit", "layers": [0, 1]}}, expect=1)
    message = (
        f"LayerselError: layersel.selection.layers: [0, 1] is not how the layers of {t5_settings['base_model']} are"
    )
    assert message in run.log
    assert "Loading weights" not in run.log


def test_layers_that_a_side_has_not_are_refused_before_the_model_loads(train, t5_settings):
    run = train(**t5_settings, layersel={"selection": {"method": "explicit", "layers": ["decoder.99"]}}, expect=1)
    message = "layersel.selection.layers: [decoder.99] are out of range: the model's layers are encoder.0 to encoder.2"
    assert f"LayerselError: {message}" in run.log
    assert "Loading weights" not in run.log
