"""Invalid files: real Axolotl ends with an error code and one sentence that says what to do."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest
from helpers.plans import make_plan
from helpers.settings import l1ra, selection
from safetensors.torch import load_file, save_file

from axolotl_layersel.config.selection import SelectionConfig
from axolotl_layersel.selection.plan_file import write_plan
from axolotl_layersel.training.lock import FILE, RunLock

MODEL_LOADS = "Loading weights"


def flexora(**values) -> dict:
    """Return a ``layersel`` block that searches."""
    return selection("flexora", flexora=values)


# A case for each phase of a command: plugins register, the file is validated, and data sets load.
BEFORE_THE_MODEL = {
    "l1ra: blank": (
        {"layersel": {**selection()["layersel"], "l1ra": None}},
        "layersel.l1ra: the block is blank",
    ),
    "unknown key": (selection(rato=0.5), "layersel.selection.rato is not a setting: did you mean 'ratio'?"),
    "layers out of range": (
        selection(method="explicit", layers=[1, 8]),
        "layersel.selection.layers: [8] are out of range: the model's layers are 0 to 7.",
    ),
}
AFTER_THE_MODEL = {
    "flexora: no training rows left": (
        flexora(val_samples=63),
        "layersel.selection.flexora.val_samples: 63 of the 64 training rows leaves 1 to train on, and the search needs "
        "2 or more. Set it to 21, which leaves most of them to train on, or use `val_source: eval`.",
    ),
    "l1ra: a run too short": (
        {**l1ra(update_ratio=0.33), "max_steps": None},
        "layersel.l1ra.update_ratio: 0.33 (warmup_ratio: 0.0) leaves 1 rank updates in a run of 32 optimizer steps",
    ),
    "few samples": (selection(num_samples=128), "layersel.selection.num_samples: 128 is more than the 64 rows"),
    "fewer layers with LoRA": (
        {"lora_target_modules": r".*\.[0-3]\.self_attn\.q_proj", **selection("last", num_layers=5)},
        "layersel.selection.num_layers: 5 is more than the 4 layers that can be chosen. Set it to at most 4.",
    ),
}


@pytest.fixture(scope="module")
def refused(request, train):
    """The runs of the collected cases, two at a time, because each uses one process."""
    cases = {**BEFORE_THE_MODEL, **AFTER_THE_MODEL}
    here = [item for item in request.session.items if item.path == request.path]
    asked = [item.callspec.params["case"] for item in here if "refused" in item.fixturenames]
    with ThreadPoolExecutor(2) as pool:
        yield {case: pool.submit(train, expect=1, **cases[case][0]) for case in asked}


@pytest.mark.parametrize("case", BEFORE_THE_MODEL)
def test_a_file_that_cannot_be_honoured_ends_before_the_model_loads(refused, case):
    run, (_, message) = refused[case].result(), BEFORE_THE_MODEL[case]
    assert message in run.log
    assert MODEL_LOADS not in run.log


@pytest.mark.parametrize("case", AFTER_THE_MODEL)
def test_what_only_the_model_shows_ends_before_training(refused, case):
    run, (_, message) = refused[case].result(), AFTER_THE_MODEL[case]
    assert message in run.log
    assert "Starting trainer" not in run.log
    assert not (run.folder / "layersel").exists()
    assert not (run.folder / FILE).exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"schema_version": 3, "lay', "is not valid JSON, truncated or damaged"),
        (json.dumps({"schema_version": 2}), "has schema_version 2, and this version of axolotl-layersel reads 3"),
    ],
)
def test_a_damaged_plan_ends_before_the_model_loads(train, tmp_path, content, message):
    (tmp_path / "plan.json").write_text(content)
    run = train(expect=1, **selection(plan=str(tmp_path / "plan.json")))
    assert message in run.log
    assert MODEL_LOADS not in run.log


def test_a_plan_of_another_model_ends_before_the_model_loads(train, tmp_path):
    settings = asdict(SelectionConfig(method="cka", num_samples=15).resolve(run_seed=1))
    other = {"base_model": "meta-llama/Llama-3.1-8B", "base_shape": {"model_type": "llama", "num_hidden_layers": 3}}
    write_plan(make_plan(settings=settings, **other), tmp_path / "plan.json")
    run = train(expect=1, **selection(plan=str(tmp_path / "plan.json"), num_samples=16))
    told = (
        "plan.json does not fit this run: (1) base_model: ",
        " is not meta-llama/Llama-3.1-8B, which it was made for; (2) base_model: ",
        " has num_hidden_layers: 8, and meta-llama/Llama-3.1-8B, which it was made for, has 3; (3) ",
        "layersel.selection.num_samples: 16 is not the 15 that it was made with. Restore what",
    )
    places = [run.log.find(part) for part in told]
    assert -1 not in places and places == sorted(places)
    assert MODEL_LOADS not in run.log


def test_a_file_in_place_of_a_folder_ends_before_the_model_loads(train, tmp_path):
    (tmp_path / "layersel").write_text("")
    run = train("ddp", expect=1, output=tmp_path)
    assert run.log.count(f"output_dir: {tmp_path / 'layersel'} is a file, where a folder is needed.") >= 2
    assert MODEL_LOADS not in run.log


def test_an_error_of_one_process_ends_all_of_them(train):
    run = train("ddp", expect=1, **selection(num_samples=128))
    assert run.log.count("layersel.selection.num_samples: 128 is more than the 64 rows of the training set") >= 2
    run = train("ddp", expect=1, **selection(plan="nowhere/plan.json"))
    assert run.log.count("LayerselError: layersel.selection.plan: nowhere/plan.json cannot be read") == 2
    assert MODEL_LOADS not in run.log


def test_a_nan_names_its_layer_and_row(train, base_model, tmp_path):
    broken = tmp_path / "base"
    broken.mkdir()
    for file in base_model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    run = train("ddp", expect=1, base_model=str(broken))
    assert "layersel.selection.method: NaN or infinity in layer 2 for training row" in run.log


def test_a_run_into_a_folder_that_another_run_writes_ends_all_processes_before_the_model_loads(
    train, zygote, make_config, tmp_path
):
    held = RunLock.take(tmp_path / "run")
    path, _, _ = make_config(output=tmp_path / "run")
    codes = zygote.run("axolotl_layersel.cli.worker:main", {"config": str(path)}, 1, path.with_suffix(".log"), {})
    assert codes == [1] and "is being written by another run" in (path.parent / "config.log.0").read_text()
    run = train("ddp", expect=1, output=tmp_path / "run")
    assert run.log.count("LayerselError: output_dir: ") == 2
    assert run.log.count(f"is being written by another run (process {os.getpid()} on ") >= 2
    assert MODEL_LOADS not in run.log
    held.confirm()
    held.release()
