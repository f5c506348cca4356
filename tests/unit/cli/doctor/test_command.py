"""``axolotl-layersel doctor``: its report on wrong files, on the examples, and on large models."""

import json

import pytest
import yaml
from helpers.examined import CONFIGS
from helpers.places import ROOT
from helpers.refused_files import CASES, FILE
from helpers.settings import l1ra, selection
from typer.testing import CliRunner

from axolotl_layersel.cli.doctor.command import examine
from axolotl_layersel.cli.doctor.sections import SECTIONS
from axolotl_layersel.cli.main import app
from axolotl_layersel.training.ending import COLLECTOR

EXAMPLES = sorted((ROOT / "example_configs").glob("*.yml"))
SIZES = {"8b": 41_943_040, "70b": 207_093_760, "405b": 623_443_968}


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No process that collects what is refused, and an output folder that can be written to."""
    monkeypatch.setattr("axolotl_layersel.training.ending.collect", lambda: None)
    monkeypatch.delenv(COLLECTOR, raising=False)
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_file_is_refused_with_all_its_faults(case, tmp_path):
    values, message = CASES[case]
    content = {**FILE, "output_dir": str(tmp_path), **values}
    report = examine({key: value for key, value in content.items() if value is not None})
    assert any(message in fault for fault in report.faults), report.faults
    assert json.loads(report.format_json())["refused"]
    assert all(any(fault in line for line in report.lines) for fault in report.faults)


def run(tmp_path, content: dict, *options: str):
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(content))
    return CliRunner().invoke(app, ["doctor", str(path), *options])


def test_the_exit_code_says_whether_the_run_would_be_refused(tmp_path):
    content = {**FILE, "output_dir": str(tmp_path / "output")}
    assert run(tmp_path, content).exit_code == 0
    assert run(tmp_path, content, "--lora-r", "0").exit_code == 1
    faulty = run(tmp_path, {**content, "adapter": None, **selection(rato=0.5)})
    assert faulty.exit_code == 1
    assert "The run would be refused, for these 2 reasons:" in faulty.output
    assert "  1. layersel.selection.rato is not a setting" in faulty.output


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_without_its_model_says_what_needs_it(path):
    report = examine({**yaml.safe_load(path.read_text()), "base_model": "nowhere/model"})
    assert report.faults == []
    assert report.missing and "is not on this machine" in report.missing
    assert set(report.sections) == {section.key for section in SECTIONS if not section.needs_model}


@pytest.mark.parametrize("path", [path for path in EXAMPLES if "llama" in path.stem], ids=lambda path: path.stem)
def test_an_example_with_the_configuration_of_its_model_is_told_all(path):
    size = "70b" if "70b" in path.stem else "8b"
    report = examine(yaml.safe_load(path.read_text()), CONFIGS / f"llama-3.1-{size}.json", processes=2)
    assert report.faults == [] and report.missing is None
    assert set(report.sections) >= {section.key for section in SECTIONS} - {"calibration"}
    assert report.sections["parameters"]["plain"] == SIZES[size]


@pytest.mark.parametrize("size", SIZES)
def test_large_models_are_told_from_their_configuration_alone(size):
    content = yaml.safe_load((ROOT / "example_configs" / "llama-3.1-70b-zero3-multinode.yml").read_text())
    report = examine(content, CONFIGS / f"llama-3.1-{size}.json", processes=16, lowest=0)
    layers = json.loads((CONFIGS / f"llama-3.1-{size}.json").read_text())["num_hidden_layers"]
    assert report.sections["parameters"] == {
        "plain": SIZES[size],
        "chosen": {"least": SIZES[size] // 2, "most": SIZES[size] // 2},
    }
    assert report.sections["layers"]["candidates"] == {"unit": "layer", "count": layers, "kept": layers // 2}
    assert report.sections["layers"]["modules"] == 7 * layers
    assert json.loads(report.format_json())["engine"] == {"name": "zero3", "splits_weights": True}


def test_what_the_model_shows_is_among_the_faults(tmp_path):
    content = {**FILE, **selection("explicit", layers=[1, 99]), "output_dir": str(tmp_path), "seed": -1}
    report = examine(content, CONFIGS / "llama-3.1-8b.json")
    assert [fault.partition(":")[0] for fault in report.faults] == ["seed", "layersel.selection.layers"]
    assert "[99] are out of range: the model's layers are 0 to 31." in report.faults[1]
    assert "memory" not in report.sections


@pytest.mark.parametrize(("time", "lowest"), [(0.8, 14), (0.1, None)])
def test_the_layers_within_a_limit_on_the_time_of_a_step_are_told(tmp_path, time, lowest):
    content = {**FILE, **selection("gradient", time=time), "output_dir": str(tmp_path)}
    report = examine(content, CONFIGS / "llama-3.1-8b.json")
    assert report.faults == []
    assert report.sections["time"]["limit"] == {"time": time, "lowest": lowest}
    if lowest is None:
        assert any("No layer reaches `time: 0.1`: the shortest step takes 0." in line for line in report.lines)
        return
    assert any(f"`time: 0.8` asks for layer {lowest} or a higher one as the lowest" in line for line in report.lines)
    shares = [examine(content, CONFIGS / "llama-3.1-8b.json", lowest=layer).sections["time"] for layer in (13, 14)]
    assert shares[0]["lowest_13"] > time >= shares[1]["lowest_14"]


def test_a_limit_on_the_time_of_a_step_that_trained_weights_exceed_is_a_fault(tmp_path):
    content = {**FILE, **selection("gradient", time=0.8), "output_dir": str(tmp_path), "lora_modules_to_save": ["norm"]}
    (fault,) = examine(content, CONFIGS / "llama-3.1-8b.json").faults
    assert "time: 0.8 cannot be reached while weights outside of the layers train (model.norm" in fault


def test_a_layer_that_cannot_be_the_lowest_is_refused(tmp_path):
    content = {**FILE, "output_dir": str(tmp_path)}
    report = examine(content, CONFIGS / "llama-3.1-8b.json", lowest=32)
    assert report.faults == ["--lowest-layer: 32 has no LoRA. Give one of layers 0 to 31."]


def test_a_configuration_of_no_model_is_refused(tmp_path):
    for content in ("{}", '{"model_type": "lama"}'):
        (tmp_path / "config.json").write_text(content)
        (fault,) = examine({**FILE, "output_dir": str(tmp_path)}, tmp_path / "config.json").faults
        assert "model_type" in fault


@pytest.mark.parametrize(("block", "message"), [(None, "its block is missing"), (3, "3 is not a mapping")])
def test_a_file_without_a_block_is_told_what_plain_lora_needs(tmp_path, block, message):
    content = {**FILE, "layersel": block, "output_dir": str(tmp_path)}
    report = examine(content, CONFIGS / "llama-3.1-8b.json")
    assert len(report.faults) == 1 and message in report.faults[0]
    assert report.sections["effect"] == {"effect": {}}
    assert report.sections["parameters"] == {"plain": report.sections["memory"]["lora"] // 4}
    (tmp_path / "config.json").write_text("{}")
    assert any("model_type" in fault for fault in examine(content, tmp_path / "config.json").faults)


def test_options_of_axolotl_are_read_as_axolotl_reads_them(tmp_path):
    def weigh(**values) -> int:
        options = [word for key, value in values.items() for word in (f"--{key}", value)]
        content = {**FILE, "bf16": True, "output_dir": str(tmp_path / "output")}
        result = run(tmp_path, content, "--json", "--model-config", str(CONFIGS / "llama-3.1-8b.json"), *options)
        return json.loads(result.output)["memory"]["weights"]

    assert weigh(bf16="false") == 2 * weigh(bf16="true") == 2 * weigh()


def test_keys_that_nothing_reads_are_named(tmp_path):
    report = examine({**FILE, **selection("last", token="mean"), "output_dir": str(tmp_path)})
    assert report.faults == []
    assert report.sections["effect"]["unread"] == ["layersel.selection.token: 'mean'"]
    report = examine({**FILE, **l1ra(), "max_steps": 20, "output_dir": str(tmp_path)})
    assert report.faults == [] and "unread" not in report.sections["effect"]
