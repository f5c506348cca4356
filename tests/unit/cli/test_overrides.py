"""Axolotl's options on the commands of this package."""

import pytest
import typer
from axolotl.cli.config_options import AXOLOTL_CONFIG_CLI_OPTIONS
from axolotl.utils.dict import DictDefault
from typer.testing import CliRunner

from axolotl_layersel.cli.main import app
from axolotl_layersel.cli.overrides import OVERRIDES, OverridableCommand, apply_overrides

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
    cfg = DictDefault({"lora_r": 8, "learning_rate": 1e-3, "bf16": True, "trl": {"beta": 0.1}, "base_model": "a"})
    given = {"lora_r": "16", "learning_rate": "5e-4", "bf16": False, "trl__beta": "0.2", "dpo__x": "3", "seed": "7"}
    apply_overrides(cfg, {**given, "base_model": "b", "flash_attention": "true", "val_set_size": "none"})
    assert cfg.to_dict() == {
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


def test_a_strict_file_gets_no_new_keys():
    cfg = DictDefault({"strict": True, "lora_r": 8})
    apply_overrides(cfg, {"lora_r": "16", "seed": "7", "trl__beta": "0.2"})
    assert cfg.to_dict() == {"strict": True, "lora_r": 16}
