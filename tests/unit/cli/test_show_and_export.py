"""``show`` and ``export``, and what they cannot do anything with: one sentence, never a traceback."""

import json
from pathlib import Path

import pytest
from helpers.corruptions import edit_csv, fuzz, is_one_line, kept
from helpers.models import make_lora, make_small_llama
from helpers.plans import list_modules, make_plan, make_search
from peft import PeftModel
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from axolotl_layersel.cli.main import app
from axolotl_layersel.common.paths import gates_path, plan_path, ranks_path
from axolotl_layersel.l1ra.records import RankHistory
from axolotl_layersel.selection.plan_file import write_plan

TOO_LONG = "n" * 5000


def call(*arguments: object) -> str:
    """Return the one sentence that a command refuses its arguments with."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), repr(result.exception)
    (line,) = result.output.splitlines()
    assert is_one_line(line) and line.startswith("axolotl-layersel: ")
    return line


@pytest.fixture
def loop(tmp_path) -> Path:
    """A link to itself."""
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path / "loop"


@pytest.fixture
def adapter(tmp_path) -> Path:
    make_lora(make_small_llama(2)).save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def test_an_adapter_whose_names_are_not_those_of_peft_is_refused_by_name(adapter, tmp_path):
    file = adapter / "adapter_model.safetensors"
    tensors = {name.removeprefix("base_model.model."): tensor + 1 for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    line = call("export", adapter, "--layout", "ragged", "--output", tmp_path / "out")
    assert "has a tensor model.layers.0.mlp.down_proj.lora_A.weight (" in line
    assert "(12 such tensors)" in line
    assert not (tmp_path / "out").exists()
    # What the sentence says: PEFT loads none of them.
    loaded = PeftModel.from_pretrained(make_small_llama(2), str(adapter)).state_dict()
    assert [bool(tensor.any()) for name, tensor in loaded.items() if "lora_B" in name] == [False] * 6


@pytest.mark.parametrize("output", [[], ["--output", "out"]])
def test_the_folder_of_an_export_may_be_no_folder_at_all(loop, tmp_path, output, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in (loop, loop / "adapter", "/", TOO_LONG, ""):
        assert "holds no adapter_model.safetensors. Give the folder of a LoRA adapter." in call(
            "export", place, "--layout", "uniform", *output
        )


def test_an_export_can_be_written_to_no_loop(adapter, loop):
    for place in (loop, loop / "out", adapter.parent / TOO_LONG):
        assert "cannot be written" in call("export", adapter, "--layout", "uniform", "--output", place)


def test_an_export_of_a_link_lies_beside_what_it_leads_to(adapter, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "other").symlink_to(adapter)
    result = CliRunner().invoke(app, ["export", str(tmp_path / "links" / "other"), "--layout", "uniform"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "uniform-adapter" / "adapter_model.safetensors").exists()


def test_names_that_no_file_has_are_refused(loop, tmp_path):
    write_plan(make_plan(), plan_path(tmp_path))
    for place in (loop, loop / "run", TOO_LONG):
        assert "cannot be read" in call("show", place)
        assert "does not exist. Give the path of an Axolotl YAML file." in call("plan", place)
    for command in ("plan", "check", "doctor", "compare"):
        assert call(command, tmp_path) == (
            f"axolotl-layersel: {tmp_path} is a folder. Give the path of an Axolotl YAML file."
        )
    for place in (loop / "a.png", tmp_path / TOO_LONG / "a.png"):
        assert "cannot be made" in call("show", tmp_path, "--picture", place)


def test_the_folder_of_a_run_without_the_plugin_is_named_as_such(adapter, tmp_path):
    for place in (adapter, tmp_path):
        assert call("show", place) == (
            f"axolotl-layersel: PATH: {place} holds no layersel/plan.json or ranks.csv, so it is not of a run with "
            "axolotl-layersel. Give the output_dir of a run whose YAML file lists the plugin, one of its checkpoints, "
            "or a plan.json."
        )


def run(*arguments: object):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return result


def test_the_plan_and_the_ranks_are_shown_as_json(searched, tmp_path):
    plan = json.loads(plan_path(searched).read_text())
    modules = list_modules(2)
    ranks = {"0": dict.fromkeys(modules, 4), "5": dict.fromkeys(modules, 3)}
    assert json.loads(run("show", searched, "--json").stdout) == {"plan": plan, "ranks": ranks}
    assert json.loads(run("show", plan_path(searched), "--json").stdout) == {"plan": plan, "ranks": None}
    plan_path(searched).unlink()
    picture = tmp_path / "run.svg"
    result = run("show", searched, "--json", "--picture", picture)
    assert json.loads(result.stdout) == {"plan": None, "ranks": ranks}
    assert result.stderr.splitlines() == [f"picture: {picture}", f"picture: {tmp_path / 'run-gates.svg'}"]


def test_an_export_overwrites_only_an_earlier_export_of_the_same_adapter(adapter, tmp_path):
    other = tmp_path / "other"
    make_lora(make_small_llama(2)).save_pretrained(str(other))
    output = tmp_path / "out"
    arguments = ("export", "--layout", "uniform", "--output", output)
    run(*arguments, adapter)
    first = (output / "adapter_model.safetensors").read_bytes()
    run(*arguments, adapter)
    assert (output / "adapter_model.safetensors").read_bytes() == first
    assert call(*arguments, other) == (
        f"axolotl-layersel: --output: {output} holds an adapter_model.safetensors that is not an earlier export of "
        f"{other}. Give another folder, or overwrite it with --force."
    )
    assert (output / "adapter_model.safetensors").read_bytes() == first
    run(*arguments, other, "--force")
    run(*arguments, other)
    assert "is not an earlier export of" in call(*arguments, adapter)


def test_a_forced_export_leaves_no_file_of_the_export_that_it_replaces(adapter, tmp_path):
    other, output = tmp_path / "other", tmp_path / "out"
    make_lora(make_small_llama(2)).save_pretrained(str(other))
    run("export", adapter, "--for", "mlx", "--output", output)
    assert (output / "adapters.safetensors").exists()
    for name in ("adapter.gguf", "Modelfile", "notes.txt"):
        (output / name).touch()
    run("export", other, "--layout", "uniform", "--output", output, "--force")
    written = {"adapter_model.safetensors", "adapter_config.json", "layersel_export.json"}
    assert {path.name for path in output.iterdir()} == {*written, "notes.txt"}
    # Without a record it may be the user's own file.
    (output / "layersel_export.json").unlink()
    (output / "adapter.gguf").touch()
    run("export", other, "--layout", "uniform", "--output", output, "--force")
    assert (output / "adapter.gguf").exists()


def test_an_export_overwrites_neither_its_source_nor_an_adapter_of_a_run(adapter, tmp_path):
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    for form in (("--layout", "ragged"), ("--layout", "uniform"), ("--for", "mlx", "--force")):
        assert call("export", adapter, *form, "--output", adapter) == (
            f"axolotl-layersel: --output: {adapter} is the folder of the adapter that is exported. Give another folder."
        )
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before
    (tmp_path / "uniform-adapter").mkdir()
    (tmp_path / "uniform-adapter" / "adapter_config.json").touch()
    assert "holds an adapter_config.json that is not an earlier" in call("export", adapter, "--layout", "uniform")


@pytest.mark.parametrize("content", ["", "[]", "{", '{"source": 3}', "[" * 100_000])
def test_a_damaged_record_of_an_export_protects_the_adapter(adapter, tmp_path, content):
    run("export", adapter, "--layout", "uniform")
    (tmp_path / "uniform-adapter" / "layersel_export.json").write_text(content)
    assert "is not an earlier export of" in call("export", adapter, "--layout", "uniform")


def test_an_export_is_known_after_both_folders_are_moved(adapter, tmp_path):
    run("export", adapter, "--layout", "uniform")
    (tmp_path / "moved").mkdir()
    for name in ("adapter", "uniform-adapter"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    run("export", tmp_path / "moved" / "adapter", "--layout", "uniform")


@pytest.fixture
def searched(tmp_path) -> Path:
    """The folder of a run with a search and with ranks."""
    write_plan(make_plan(), plan_path(tmp_path / "run"))
    make_search(["0", "2"], steps=3).write(tmp_path / "run")
    RankHistory({0: dict.fromkeys(list_modules(2), 4), 5: dict.fromkeys(list_modules(2), 3)}).write(tmp_path / "run")
    return tmp_path / "run"


def test_a_search_without_a_step_has_no_picture(searched, tmp_path):
    ranks_path(searched).unlink()
    gates_path(searched).write_text("step,train_loss,validation_loss,0,2\n")
    result = CliRunner().invoke(app, ["show", str(searched), "--picture", str(tmp_path / "search.png")])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), repr(result.exception)
    line = result.output.splitlines()[-1]
    assert line.startswith("axolotl-layersel: PATH: ") and "it has no step below its first line" in line
    assert not (tmp_path / "search.png").exists()


@pytest.mark.parametrize("path", [gates_path, ranks_path])
def test_a_damaged_history_is_drawn_or_refused_in_one_sentence(searched, tmp_path, path):
    picture = tmp_path / "run.svg"

    @fuzz(8)
    def check(data):
        with kept(path(searched)):
            path(searched).write_bytes(edit_csv(data, path(searched)))
            result = CliRunner().invoke(app, ["show", str(searched), "--picture", str(picture)])
        assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
        if result.exit_code:
            assert is_one_line(result.output.splitlines()[-1])
            assert result.output.splitlines()[-1].startswith("axolotl-layersel: ")
        else:
            assert picture.exists()

    check()


@pytest.mark.parametrize("losses", [(float("inf"), None), (float("nan"), 1e308), (-1e308, 0.0)])
@pytest.mark.parametrize("gates", [[0.0, 0.0], [1e29, -1e29], [5e-324, 0.0]])
def test_a_search_of_any_numbers_is_drawn(searched, tmp_path, losses, gates):
    history = make_search(["0", "2"], steps=1)
    history.add(*losses, gates)
    history.write(searched)
    result = CliRunner().invoke(app, ["show", str(searched), "--picture", str(tmp_path / "run.svg")])
    assert result.exit_code == 0, repr(result.exception)
    assert (tmp_path / "run-gates.svg").exists()


def test_a_gate_beyond_measure_is_damage(searched, tmp_path):
    history = make_search(["0", "2"], steps=1)
    history.add(1.0, None, [1e308, -1e308])
    history.write(searched)
    result = CliRunner().invoke(app, ["show", str(searched), "--picture", str(tmp_path / "run.svg")])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), repr(result.exception)
    assert "gates.csv is damaged (ValueError: line 3 has a gate of 1e+308" in result.output.splitlines()[-1]
