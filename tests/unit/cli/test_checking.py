"""``axolotl-layersel check``: the whole check of a YAML file, without its model and data."""

import pytest
import yaml
from axolotl.integrations.base import PluginManager
from helpers.models import make_small_llama
from helpers.settings import l1ra, selection
from typer.testing import CliRunner

from axolotl_layersel.cli.checking import describe_settings
from axolotl_layersel.cli.main import app
from axolotl_layersel.cli.starting import find_launcher
from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.config.textual import PLUGIN
from axolotl_layersel.training.ending import COLLECTOR


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No plugin of another file, and no process that collects what is refused."""
    monkeypatch.setattr(PluginManager.get_instance(), "plugins", {})
    monkeypatch.setattr("axolotl_layersel.training.ending.collect", lambda: None)
    monkeypatch.delenv(COLLECTOR, raising=False)


@pytest.fixture
def write(tmp_path):
    """Write a YAML file, and return its path."""
    make_small_llama(2).save_pretrained(tmp_path / "base")

    def write(**values):
        settings = {
            "base_model": str(tmp_path / "base"),
            "plugins": [PLUGIN],
            "datasets": [{"path": "x.jsonl", "type": "alpaca", "ds_type": "json"}],
            "output_dir": str(tmp_path / "output"),
            "adapter": "lora",
            "lora_r": 4,
            "lora_alpha": 8,
            "lora_target_modules": ["q_proj"],
            "sequence_len": 64,
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "num_epochs": 1,
            "learning_rate": 1e-3,
            "optimizer": "adamw_torch",
            "bf16": False,
            **selection(ratio=0.5),
            **values,
        }
        path = tmp_path / "config.yml"
        path.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}))
        return path

    return write


def check(path, *options: str) -> tuple[int, list[str]]:
    result = CliRunner().invoke(app, ["check", str(path), *options])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, [line for line in result.output.splitlines() if line]


def test_a_file_without_a_fault_says_what_will_be_done(write, tmp_path):
    path = write()
    code, lines = check(path)
    assert (code, lines[-1]) == (
        0,
        f"{path}: no fault was found. The run will go as follows: selection by cka keeps LoRA in a share of 0.5 of the "
        "layers, with lora_r each.",
    )
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["base", "config.yml"], "it leaves no trace"


FAULTS = {
    "no plugin": ({"plugins": None}, ["plugins: the key is missing, so `layersel` would be ignored"]),
    "no block": ({"plugins": None, "layersel": None}, ["layersel: "]),
    "all at once": (
        {**selection(ratio=2), "logging_steps": "often"},
        ["logging_steps: 'often' is refused", "layersel.selection.ratio: 2.0 is outside (0, 1]"],
    ),
    "the rest of the file": ({"adapter": None}, ["adapter: None has no LoRA layers to choose from"]),
    "Axolotl's own": ({"logging_steps": "often"}, ["logging_steps: 'often' is refused"]),
    "a plan": (selection(plan="nowhere/plan.json"), ["layersel.selection.plan: nowhere/plan.json cannot be read"]),
    "a checkpoint": ({"resume_from_checkpoint": "nowhere"}, ["resume_from_checkpoint: nowhere cannot be resumed from"]),
    "a DeepSpeed file": ({"deepspeed": "nowhere.json"}, ["deepspeed: nowhere.json cannot be read"]),
    "a folder": ({"output_dir": "/dev/null/run"}, ["output_dir: /dev/null is a file"]),
    "a kernel": ({"lora_mlp_kernel": True}, ["lora_mlp_kernel: True needs a GPU, but this process sees none"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_a_sentence(write, fault):
    settings, messages = FAULTS[fault]
    code, lines = check(write(**settings))
    assert code == 1
    said = [line.removeprefix("axolotl-layersel: ") for line in lines if line.startswith("axolotl-layersel: ")]
    assert len(said) == len(messages)
    assert all(any(line.startswith(message) for line in said) for message in messages), said


def test_an_option_of_axolotl_replaces_a_key_of_the_file(write):
    path = write(logging_steps="often")
    assert check(path)[0] == 1
    assert check(path, "--logging-steps", "2")[0] == 0
    assert check(path, "--logging-steps=2", "--val-set-size", "0.1", "--no-sample-packing")[0] == 0
    result = CliRunner().invoke(app, ["check", "--logging-steps", "2", str(path)])
    assert result.exit_code == 0, result.output
    code, lines = check(path, "--logging-steps", "2", "--lora-r", "0", "--deepspeed", "nowhere.json")
    assert code == 1
    assert lines[-1].startswith("axolotl-layersel: deepspeed: nowhere.json cannot be read")
    code, lines = check(path, "--logging-steps", "2", "--lora-r", "0")
    assert (code, lines[-1]) == (1, "axolotl-layersel: lora_r: 0 is not a valid rank. Set 1 or more, such as 16.")


def test_plan_checks_the_file_as_the_options_of_axolotl_change_it(write):
    path = write(output_dir="/dev/null/run", deepspeed="nowhere.json")
    result = CliRunner().invoke(app, ["plan", str(path), "--output-dir", "/dev/null/other"])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), repr(result.exception)
    (line,) = result.output.splitlines()
    assert line.startswith("axolotl-layersel: output_dir: /dev/null is a file, where a folder is needed.")


@pytest.mark.parametrize("content", ["[1]", "a: [", "\0"])
def test_what_is_no_file_of_axolotl_is_said(tmp_path, content):
    (tmp_path / "config.yml").write_text(content)
    assert check(tmp_path / "config.yml") == (
        1,
        [
            f"axolotl-layersel: CONFIG: {tmp_path / 'config.yml'} is not a YAML file with a mapping. Give the path "
            "of an Axolotl YAML file."
        ],
    )


@pytest.mark.parametrize(
    ("block", "said"),
    [
        (
            selection("explicit", layers=[3, 1]),
            "selection by explicit keeps LoRA in the layers 1, 3, with lora_r each.",
        ),
        (
            selection("flexora"),
            "selection by flexora keeps LoRA in the layers whose gate is above 0, with lora_r each.",
        ),
        (
            selection("gradient"),
            "selection by gradient keeps LoRA in a share of 1.0 of the modules, with ranks by rank_allocation: ",
        ),
        (selection(num_layers=3), "selection by cka keeps LoRA in 3 layers, with lora_r each."),
        (selection(plan="p.json"), "selection applies the plan p.json."),
        (l1ra(), "l1ra moves rank while the model trains, by rule saliency."),
        ({"layersel": {**selection()["layersel"], **l1ra()["layersel"]}}, "with lora_r each, and l1ra moves rank"),
    ],
)
def test_what_is_asked_for_is_one_sentence(block, said):
    assert said in describe_settings(LayerselConfig.model_validate(block["layersel"]))


def test_a_launcher_is_for_several_processes_and_engines(tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(tmp_path / "none.yaml"))
    assert find_launcher({}, []) == "python"
    assert find_launcher({}, ["--num_processes=2"]) == "accelerate"
    assert find_launcher({"fsdp_version": 2, "fsdp_config": {"offload_params": False}}, []) == "accelerate"
    (tmp_path / "none.yaml").write_text("num_processes: 2")
    assert find_launcher({}, []) == "accelerate"
