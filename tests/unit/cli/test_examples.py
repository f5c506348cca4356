"""``axolotl-layersel examples``, ``schema`` and the helps of the commands."""

import json

import jsonschema
import pytest
import yaml
from helpers.places import ROOT
from typer.testing import CliRunner

from axolotl_layersel.cli.main import app, command

SOURCE = ROOT / "example_configs"
NAMES = sorted(str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.*") if path.suffix != ".pyc")


def call(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result.output


def list_files(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_examples_are_written_with_the_name_of_their_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = call("examples")
    written = list_files(tmp_path / "layersel-examples")
    assert written == [name for name in NAMES if name != "demo.yml"]
    assert text.startswith(f"layersel-examples: {len(written)} files of examples.")
    for name in written:
        content = (tmp_path / "layersel-examples" / name).read_text()
        assert content.replace("layersel-examples", "example_configs") == (SOURCE / name).read_text()
    zero2 = yaml.safe_load((tmp_path / "layersel-examples" / "llama-3.1-8b-qlora-zero2.yml").read_text())
    assert (tmp_path / zero2["deepspeed"]).is_file()


def test_examples_that_differ_are_not_overwritten(tmp_path):
    call("examples", tmp_path / "mine")
    call("examples", tmp_path / "mine")
    edited = tmp_path / "mine" / "llama-3.1-8b-lora.yml"
    edited.write_text("edited")
    (tmp_path / "mine" / "slurm.sh").unlink()
    (line,) = call("examples", tmp_path / "mine", code=1).splitlines()
    assert line == (
        f"axolotl-layersel: DIR: {edited} is there and differs from the example (1 such files). Move it, or give "
        "another folder."
    )
    assert edited.read_text() == "edited"
    assert not (tmp_path / "mine" / "slurm.sh").exists()


@pytest.mark.parametrize("name", ["two words", "a#b", "a: b", "a\nb", "$HOME", "'"])
def test_a_folder_that_the_examples_would_have_to_quote_is_refused(tmp_path, name):
    (line,) = call("examples", tmp_path / name, code=1).splitlines()
    assert "which paths in the examples would have to quote" in line
    assert list(tmp_path.iterdir()) == []


def test_examples_cannot_be_written_below_a_file(tmp_path):
    (tmp_path / "file").touch()
    assert "is a file, where a folder is needed" in call("examples", tmp_path / "file", code=1)


@pytest.fixture(scope="module")
def schema() -> dict:
    content = json.loads(call("schema"))
    jsonschema.Draft202012Validator.check_schema(content)
    return content


def describe(schema: dict) -> list[str]:
    """Return the settings without a description."""
    blocks = [schema, *(block for block in schema["$defs"].values() if "properties" in block)]
    return [key for block in blocks for key, value in block["properties"].items() if not value.get("description")]


def test_the_schema_describes_every_setting(schema):
    assert schema["title"] == "Axolotl YAML file with axolotl-layersel"
    assert set(schema["properties"]) == {"layersel"}
    assert describe(schema) == []


@pytest.mark.parametrize("path", sorted(SOURCE.glob("*.yml")), ids=lambda path: path.stem)
def test_the_schema_accepts_an_example_and_refuses_a_slip_in_its_block(schema, path):
    content = yaml.safe_load(path.read_text())
    jsonschema.validate(content, schema)
    block = next(iter(content["layersel"].values()))
    block["raito"] = 0.5
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, schema)


def test_every_help_has_an_example_and_says_what_its_arguments_are():
    text = " ".join(call("--help").split())
    assert "Exit codes: 0, the command did what it says; 1, it was refused or failed" in text
    assert "2, the command line has a mistake." in text
    for name, each in command.commands.items():
        text = " ".join(call(name, "--help").split())
        assert f"Example: axolotl-layersel {name}" in text
        assert all(param.help in text.replace(" │ │ ", " ") for param in each.params), text
