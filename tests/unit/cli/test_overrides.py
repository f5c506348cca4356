"""Axolotl's options on the commands of this package."""

import copy

import pytest
import typer
from axolotl.cli.config import _coerce_value
from axolotl.cli.config_options import AXOLOTL_CONFIG_CLI_OPTIONS
from typer.testing import CliRunner

from axolotl_layersel.cli.main import app
from axolotl_layersel.cli.overrides import OVERRIDES, WORDS, OverridableCommand, apply_overrides, coerce

small = typer.Typer()


@small.command(cls=OverridableCommand, context_settings={"allow_extra_args": True})
def command(context: typer.Context, config: str, repeat: int = 1) -> None:
    print(config, repeat, context.meta[OVERRIDES], context.args)


CALLS = {
    "run.yml": "run.yml 1 {} []",
    "run.yml --repeat 2 -- --lora-r 3": "run.yml 2 {} ['--lora-r', '3']",
    "run.yml --base-model some/model": "run.yml 1 {'base_model': 'some/model'} []",
    "--lora-r=3 --repeat=2 run.yml -- a": "run.yml 2 {'lora_r': '3'} ['a']",
    "--repeat 2 --lora-r 3 run.yml --no-sample-packing": "run.yml 2 {'lora_r': '3', 'sample_packing': False} []",
    "run.yml --trl.beta 0.5": "run.yml 1 {'trl__beta': 0.5} []",
}


@pytest.mark.parametrize("typed", CALLS)
def test_options_of_axolotl_are_told_from_those_of_the_command_and_the_launcher(typed):
    result = CliRunner().invoke(small, typed.split())
    assert result.output == f"{CALLS[typed]}\n"


@pytest.mark.parametrize("command", ["plan", "check"])
def test_an_option_that_neither_knows_is_a_mistake(command):
    result = CliRunner().invoke(app, [command, "run.yml", "--base-modell", "x"])
    assert result.exit_code == 2
    assert "No such option" in result.output and "--base-modell" in result.output


def test_an_option_without_its_value_is_a_mistake():
    result = CliRunner().invoke(app, ["check", "run.yml", "--base-model"])
    assert result.exit_code == 2
    assert "--base-model" in result.output


def test_no_option_of_axolotl_has_the_name_of_one_of_a_command():
    names = {part for names, *_ in AXOLOTL_CONFIG_CLI_OPTIONS for name in names for part in name.split("/")}
    assert {"--base-model", "--output-dir", "--sample-packing", "--no-sample-packing"} <= names
    assert not names & {"--launcher", "--repeat", "--help"}


def test_values_are_set_as_axolotl_sets_them():
    data = {"lora_r": 8, "learning_rate": 1e-3, "bf16": True, "trl": {"beta": 0.1}, "base_model": "a"}
    before = copy.deepcopy(data)
    given = {"lora_r": "16", "learning_rate": "5e-4", "bf16": False, "trl__beta": "0.2", "dpo__x": "3", "seed": "7"}
    given |= {"base_model": "b", "flash_attention": "true", "val_set_size": "none"}
    assert apply_overrides(data, given) == {
        "lora_r": 16,
        "learning_rate": 5e-4,
        "bf16": False,
        "trl": {"beta": 0.2},
        "dpo": {"x": 3},
        "seed": 7,
        "base_model": "b",
        "flash_attention": True,
        "val_set_size": None,
    }
    assert data == before


def test_a_value_gets_the_type_that_axolotl_gives_it():
    texts = [*WORDS, "True", "1", "0", "16", "-3", "5e-4", "1e400", "nan", "1_000", "0x10", " 7", "", "b", "1.5.2"]
    for value in (*texts, 3, 0.5, True, None, ["a"]):
        for existing in (None, True, False, 8, 1e-3, "a", [1], {"a": 1}):
            expected, found = _coerce_value(value, existing), coerce(value, existing)
            assert repr(found) == repr(expected), f"{value!r} in place of {existing!r}"


def test_a_strict_file_gets_no_new_keys():
    given = {"lora_r": "16", "seed": "7", "trl__beta": "0.2"}
    assert apply_overrides({"strict": True, "lora_r": 8}, given) == {"strict": True, "lora_r": 16}
