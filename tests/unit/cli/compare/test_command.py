"""The options of the command, and what it refuses before any run."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from helpers.compared import FILE, make_figures
from typer.testing import CliRunner

from axolotl_layersel.cli.compare import command
from axolotl_layersel.cli.compare.cells import Cell
from axolotl_layersel.cli.compare.command import Options
from axolotl_layersel.cli.compare.figures import Comparison
from axolotl_layersel.cli.compare.running import Board, Course
from axolotl_layersel.cli.main import app
from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.training.lock import FILE as LOCK
from axolotl_layersel.training.lock import Owner, find_start


def write_file(folder: Path, **values) -> Path:
    content = {**FILE, "output_dir": str(folder / "out"), **values}
    path = folder / "run.yml"
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return path


def invoke(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["compare", *arguments])
    assert result.exit_code == code, result.output
    return result.output if code else result.stdout


def test_a_dry_run_lists_the_runs_and_writes_nothing(tmp_path):
    text = invoke(str(write_file(tmp_path)), "--arms", "lora,cka", "--rates", "1e-4,2e-4,4e-4", "--dry-run")
    lines = text.splitlines()
    assert lines[0].startswith("Held-out rows: 10% of the training rows")
    assert 'cka: layersel: {"selection": {"method": "cka", "rank_allocation": "match"}}' in lines
    assert "  lora at 0.0002, seed 42, 50 steps" in lines
    assert lines[-1].startswith("27 runs, and more for an arm")
    assert [path.name for path in tmp_path.iterdir()] == ["run.yml"]


def test_a_dry_run_as_json_has_the_same_runs(tmp_path):
    arguments = [str(write_file(tmp_path)), "--arms", "lora", "--rates", "1e-4,2e-4", "--seeds", "1", "--steps", "7"]
    content = json.loads(invoke(*arguments, "--dry-run", "--json"))
    assert content["planned"] == 3  # with the rate between both
    assert content["cells"][0] == {"arm": "lora", "rate": 2e-4, "seed": 42, "steps": 7}
    assert content["settings"]["folder"] == str(tmp_path / "out" / "compare")


def test_options_of_axolotl_replace_keys_of_the_file(tmp_path):
    arguments = [str(write_file(tmp_path)), "--lora-r", "8", "--output-dir", str(tmp_path / "other"), "--dry-run"]
    content = json.loads(invoke(*arguments, "--json", "--arms", "lora,lora@4"))
    assert content["settings"]["lora_r"] == 8
    assert content["settings"]["folder"] == str(tmp_path / "other" / "compare")
    assert content["settings"]["arms"]["lora@4"]["keys"]["lora_alpha"] == 16


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ({"adapter": None}, [], "adapter: None has no LoRA to compare."),
        ({"learning_rate": None}, [], "learning_rate: None is no rate to start from."),
        ({"lora_r": None}, [], "lora_r: None is not a valid rank."),
        ({"streaming": True}, [], "streaming: True reads rows as they come"),
        ({}, ["--rates", "1e-4,x"], "--rates: '1e-4,x' is not a list of learning rates."),
        ({}, ["--time-limit", "2 hours"], "--time-limit: '2 hours' is not a duration."),
        ({}, ["--general", "nowhere.txt"], "--general: nowhere.txt does not exist."),
        ({}, ["--arms", "ckaa"], "--arms: 'ckaa' is not known: did you mean 'cka'?"),
        ({"layersel": {"selection": {"method": "cka", "ratio": 3}}}, [], "arm cka: layersel.selection.ratio: 3.0 is"),
    ],
)
def test_a_file_or_an_option_that_cannot_be_is_refused_in_one_sentence(values, options, message, tmp_path):
    path = write_file(tmp_path, **values)
    text = invoke(str(path), *options, code=1)
    assert message in text
    assert [each.name for each in tmp_path.iterdir()] == ["run.yml"]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ('{"content": "a"}', "is damaged"),
        ('{"text": "half of a pair: \\ud83d"}', "is damaged"),
        ("[", "is damaged"),
        (" \n", "has no text"),
    ],
)
def test_general_text_is_looked_at_before_anything_trains(content, fault, tmp_path):
    text = tmp_path / "general.jsonl"
    text.write_text(content)
    said = invoke(str(write_file(tmp_path)), "--general", str(text), code=1)
    assert f"--general: {text} {fault}" in said and "JSON lines with the key `text`" in said


def test_a_missing_file_is_refused(tmp_path):
    assert "nowhere.yml does not exist." in invoke(str(tmp_path / "nowhere.yml"), code=1)


@pytest.mark.parametrize(("text", "seconds"), [("90m", 5400), ("2h", 7200), ("1h30m", 5400), ("1.5h", 5400)])
def test_durations(text, seconds):
    assert command.parse_duration(text) == seconds


def make_course(folder: Path, options: Options, launch=()) -> Course:
    data = {**FILE, "output_dir": str(folder)}
    arms = command.make_arms(["lora"], data)
    settings = command.make_settings(folder / "run.yml", data, options, 2e-4, arms, list(launch))
    asked = options.describe(list(launch))
    return Course(data, settings, 2e-4, Board(), asked)


def save_first(folder: Path, options: Options, **values) -> Course:
    """Save a comparison of one cell, whose run has 30 steps, and return its course."""
    course, cell = make_course(folder, options, **values), Cell("lora", 2e-4, 42, 50)
    course.take(cell, make_figures(cell, 1.0, real_steps=30))
    cell = Cell("lora", 2e-4, 42, 15)
    course.take(cell, make_figures(cell, 1.0, real_steps=30))
    course.notes.append("A note.")
    course.save()
    return course


def test_a_second_start_has_the_final_settings_of_the_first(tmp_path):
    first = save_first(tmp_path, Options())
    again = make_course(tmp_path, Options())
    command.take_up(again, Options())
    assert again.settings == first.settings
    assert again.settings.steps == 30
    assert (again.notes, again.is_settled) == (["A note."], True)


def test_a_second_start_may_add_seeds_and_arms(tmp_path):
    save_first(tmp_path, Options())
    again = make_course(tmp_path, Options(seeds=5))
    command.take_up(again, Options(seeds=5))
    assert (len(again.settings.seeds), again.settings.steps, again.is_settled) == (5, 30, False)


def test_a_second_start_on_other_processes_is_refused(tmp_path):
    save_first(tmp_path, Options())
    again = make_course(tmp_path, Options(), launch=["--launcher", "torchrun"])
    with pytest.raises(LayerselError, match="arguments of the launcher: '', now '--launcher torchrun'"):
        command.take_up(again, Options())


def test_a_comparison_that_another_process_runs_is_not_read(tmp_path):
    """Its settings may change until it ends."""
    path = write_file(tmp_path, output_dir=str(tmp_path))
    save_first(tmp_path, Options())
    parent = os.getppid()
    owner = replace(Owner.current(), process=parent, process_start=find_start(parent))
    held = tmp_path / "compare" / LOCK
    held.write_text(json.dumps(asdict(owner)))
    assert LOCK in invoke(str(path), "--launcher", "torchrun", code=1)
    held.unlink()
    assert "arguments of the launcher" in invoke(str(path), "--launcher", "torchrun", code=1)
    assert not held.exists()


def test_the_comparison_is_read_back_as_it_was_written(tmp_path):
    course = save_first(tmp_path, Options())
    path = tmp_path / "compare" / command.COMPARISON
    assert command.read_record(Comparison, path) == course.make_comparison()
