"""A short version of ``make demo``, from the wheel: nothing of the checkout but the demo's own files is there."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from helpers.places import ROOT
from helpers.published import call, install_beside
from peft import PeftConfig
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from axolotl_layersel.reports.closing import describe_run

pytestmark = pytest.mark.nightly  # three runs as a user starts them take three minutes
STEPS = 4
PREPARE = ("-m", "demo.prepare", "--max-steps", "5")
# What only the checkout and its development tools have.
DEVELOPMENT = ("helpers", "tests", "benchmarks", "docs")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the files that the demo consists of."""
    folder = tmp_path_factory.mktemp("demo")
    shutil.copytree(ROOT / "demo", folder / "demo", ignore=shutil.ignore_patterns("work", "__pycache__"))
    (folder / "example_configs").mkdir()
    shutil.copy(ROOT / "example_configs" / "demo.yml", folder / "example_configs")
    return folder


@pytest.fixture(scope="module")
def python(built, tmp_path_factory) -> Path:
    """The interpreter of an environment with the wheel."""
    return install_beside(built.wheel, tmp_path_factory.mktemp("wheel") / "venv") / "python"


@pytest.fixture(scope="module")
def printed(python, place) -> str:
    """The output of the demo."""
    short = ("--steps", str(STEPS), "--pretrain-steps", "5")
    return call(python, "-m", "demo", *short, cwd=place)


@pytest.fixture(scope="module")
def work(printed, place) -> Path:
    """The folder that the demo has written to."""
    return place / "demo" / "work"


def test_the_package_is_the_wheels_and_the_checkout_is_not_there(python, place):
    code = "import sys, axolotl_layersel, importlib.util as u; print(axolotl_layersel.__file__, *sys.path, sep='\\n')"
    file, *path = call(python, "-c", code, cwd=place).splitlines()
    assert Path(file).is_relative_to(python.parents[1]) and str(ROOT) not in path
    code = f"import importlib.util as u; print([name for name in {DEVELOPMENT} if u.find_spec(name)])"
    assert call(python, "-c", code, cwd=place).strip() == "[]"


def test_the_base_model_is_kept_for_the_next_time(python, place, work):
    before = (work / "base" / "model.safetensors").stat()
    assert "exists already" in call(python, *PREPARE, cwd=place)
    assert (work / "base" / "model.safetensors").stat().st_mtime_ns == before.st_mtime_ns


def test_every_run_is_an_axolotl_train_and_differs_from_the_example_in_one_thing(work, printed):
    commands = re.findall(r"^\$ (.*)$", printed, flags=re.MULTILINE)
    names = ("lora", "choice", "random")
    assert commands[1:4] == [f"axolotl train demo/work/{name}.yml --launcher python" for name in names]
    example = yaml.safe_load((ROOT / "example_configs" / "demo.yml").read_text())
    configs = {name: yaml.safe_load((work / f"{name}.yml").read_text()) for name in names}
    shortened = {"max_steps": STEPS, "eval_steps": STEPS, "logging_steps": 1}
    assert configs["choice"] == {**example, **shortened}
    for name in ("lora", "random"):
        assert configs[name].pop("output_dir") == f"demo/work/{name}"
        rest = {key: value for key, value in configs["choice"].items() if key != "output_dir"}
        assert {"plugins", "layersel", *configs[name]} == rest.keys()
        assert all(rest[key] == value for key, value in configs[name].items() if key != "layersel")
    assert not {"plugins", "layersel"} & configs["lora"].keys()
    assert configs["random"]["layersel"]["selection"] == {
        "method": "random",
        "ratio": example["layersel"]["selection"]["ratio"],
        "rank_allocation": "match",
    }


def test_training_prints_the_layer_table(printed):
    _, _, choice, _ = printed.split("\n$ axolotl train ")
    assert "cka keeps 4 of 8 layers" in choice
    rows = re.findall(r"^ +(\d) +([\d.e-]+) +█+ *(yes)?(?: +\d+)?$", choice, re.MULTILINE)
    assert [int(layer) for layer, _, _ in rows] == list(range(8))
    assert sum(bool(chosen) for _, _, chosen in rows) == 4


def test_training_ends_with_what_it_has_come_to(place, printed, monkeypatch):
    monkeypatch.chdir(place)
    _, _, choice, _ = printed.split("\n$ axolotl train ")
    closing = describe_run(Path("demo/work/choice"), Path("demo/work/choice.yml"))
    assert choice.rstrip().splitlines()[-len(closing) :] == closing
    assert choice.count("\n".join(closing)) == 1


def read_layers(output: Path) -> set[int]:
    tensors = load_file(output / "adapter_model.safetensors")
    return {int(re.search(r"\.layers\.(\d+)\.", name)[1]) for name in tensors}


def test_the_adapters_hold_the_chosen_layers_at_twice_the_rank(work):
    assert read_layers(work / "lora") == set(range(8))
    assert PeftConfig.from_pretrained(str(work / "lora")).r == 8
    for name in ("choice", "random"):
        plan = json.loads((work / name / "layersel" / "plan.json").read_text())
        chosen = {choice["layer"] for choice in plan["layers"] if choice["selected"]}
        assert read_layers(work / name) == chosen and len(chosen) == 4
        assert set(plan["ranks"].values()) == {16}
        assert len(plan["calibration_rows"]) == (64 if name == "choice" else 0)


def test_the_report_compares_the_runs(work, printed):
    rows = re.findall(r"^(.*layers)  +([\d.]+) +([\d.]+) +([\d,]+) +([\d.]+)$", printed, flags=re.MULTILINE)
    assert [row[0].strip() for row in rows] == [
        "plain LoRA, all layers",
        "cka, 4 of 8 layers",
        "random, 4 of 8 layers",
    ]
    assert len({row[3] for row in rows}) == 1, "as many trainable parameters in each"
    for (_, before, after, parameters, _), name in zip(rows, ("lora", "choice", "random")):
        (events,) = (work / name).rglob("events.out.tfevents.*")
        logged = EventAccumulator(str(events)).Reload().Scalars("eval/loss")
        assert [f"{entry.value:.3f}" for entry in logged] == [before, after]
        assert [entry.step for entry in logged] == [0, STEPS] and float(after) < float(before)
        tensors = load_file(work / name / "adapter_model.safetensors").values()
        assert f"{sum(tensor.numel() for tensor in tensors):,}" == parameters


def test_the_report_says_whether_the_choice_wins_and_how_to_go_on(work, printed, python):
    end = printed[printed.index("loss before") :]
    lora, choice, drawn = (float(x) for x in re.findall(r"layers  +[\d.]+ +([\d.]+)", end))
    if len({lora, choice, drawn}) == 3:  # as they are printed
        sentences = " ".join(end.split())
        assert ("It wins" in sentences) == (choice < lora and choice < drawn)
        assert ("It does not win" in sentences) == (choice > lora or choice > drawn)
        assert sentences.count("below") == (choice < lora) + (choice < drawn)
    assert "adapter: demo/work/choice\n" in end
    pictures = {str(path.relative_to(work.parents[1])) for path in work.rglob("layersel/*.png")}
    assert set(re.findall(r"^picture: (.*)$", end, flags=re.MULTILINE)) == pictures
    assert f"  source {python.parent}/activate\n  axolotl-layersel check run.yml\n  axolotl train run.yml\n" in end
    assert (python.parent / "activate").exists() and (python.parent / "axolotl-layersel").exists()
