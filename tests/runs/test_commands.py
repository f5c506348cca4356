"""The commands, as a user types them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers.launched import load_merged, load_with_stock_peft
from helpers.places import ENVIRONMENT, HANGS, ROOT

from axolotl_layersel import __version__
from axolotl_layersel.reports.closing import describe_plan, describe_run
from axolotl_layersel.selection.plan_file import read_plan
from axolotl_layersel.training.lock import RunLock


def call(*command: str, expect: int = 0, merged: bool = False) -> str:
    """Run a command and return its output: standard error follows standard output, or both are ``merged`` in order."""
    done = subprocess.run(
        list(command),
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, "COLUMNS": "120"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if merged else subprocess.PIPE,
        text=True,
        timeout=HANGS,
    )
    told = done.stdout + (done.stderr or "")
    assert done.returncode == expect, f"{done.returncode}\n{told[-6000:]}"
    return told


@pytest.fixture(scope="module")
def trained(make_config):
    """A run of ``axolotl train`` itself, by torchrun on ZeRO-2, and its YAML file."""
    path, _, output = make_config("zero2", max_steps=2, save_steps=2)
    command = ("axolotl", "train", str(path), "--launcher", "torchrun", "--", "--nproc_per_node=2", "--nnodes=1")
    text = call(*command, merged=True)
    assert "layersel: method cka keeps 4 of 8 layers" in text
    closing = describe_run(output, path)
    assert text.splitlines()[-len(closing) :] == closing, "it comes after all that Axolotl and the launcher print"
    assert text.count("\n".join(closing)) == 1
    assert json.loads((output / "engine.json").read_text())["engine"] == "zero2"
    return path, output


@pytest.mark.nightly
def test_plan_selects_without_training_and_writes_what_training_would(trained, make_config):
    _, trained_output = trained
    path, _, elsewhere = make_config("zero2")
    output = elsewhere.with_name("by-option")
    command = ("axolotl-layersel", "plan", "--output-dir", str(output), str(path), "--repeat", "2")
    command += ("--launcher", "torchrun")
    text = call(*command, "--", "--nproc_per_node=2")
    assert "2 seeds agree with a mean overlap (Jaccard) of" in text
    assert f"plan: {output / 'layersel' / 'plan.json'}" in text
    closing = "\n".join(describe_plan(read_plan(output / "layersel" / "plan.json"), output / "layersel" / "plan.json"))
    assert text.count(closing) == 1
    assert "layersel: method cka keeps 4 of 8 layers" in text
    plans = [json.loads((folder / "layersel" / "plan.json").read_text()) for folder in (output, trained_output)]
    for plan in plans:
        plan.pop("seconds")
    assert set(plans[0].pop("stability")["selected"]) == {"7", "8"}
    assert plans[1].pop("stability") is None
    assert plans[0] == plans[1]
    assert not (output / "adapter_model.safetensors").exists()
    assert not elsewhere.exists()


def test_plan_prints_the_sentence_alone_for_a_file_that_cannot_be_honoured(make_config):
    path, _, _ = make_config(layersel={"selection": {"method": "cka", "ratio": 2}}, logging_steps="often")
    sentence = (
        "axolotl-layersel: layersel.selection.ratio: 2.0 is outside (0, 1]. Set a value in this range, such as 0.5."
    )
    assert call("axolotl-layersel", "plan", str(path), expect=1).splitlines() == [sentence]
    text = call("axolotl", "layersel", "check", str(path), expect=1)
    assert sentence in text.splitlines()[-2:]
    assert "logging_steps: 'often' is refused. Input should be a valid integer, unable to parse string" in text
    assert "Traceback" not in text
    text = call("axolotl-layersel", "plan", "nowhere.yml", expect=1)
    assert text == "axolotl-layersel: nowhere.yml does not exist. Give the path of an Axolotl YAML file.\n"


def test_show_prints_the_table_of_a_file_or_a_folder(trained):
    _, output = trained
    text = call("axolotl-layersel", "show", str(output / "layersel" / "plan.json"))
    assert text == call("axolotl-layersel", "show", str(output))
    assert text == call("axolotl-layersel", "show", str(output / "checkpoint-2"))
    plan = json.loads((output / "layersel" / "plan.json").read_text())
    lines = text.splitlines()
    rows = lines[lines.index(next(line for line in lines if line.split()[:2] == ["layer", "score"])) + 1 :][:8]
    for row, choice in zip(rows, plan["layers"], strict=True):
        layer, score, bar, *kept = row.split()
        assert (int(layer), score, set(bar)) == (choice["layer"], f"{choice['score']:.4g}", {"█"})
        assert kept == ["yes"] * choice["selected"]
    highest = max(plan["layers"], key=lambda choice: choice["score"])["layer"]
    assert "█" * 24 in rows[highest]


def test_show_says_what_is_wrong_with_a_file(tmp_path):
    (tmp_path / "plan.json").write_text("{")
    text = call("axolotl-layersel", "show", str(tmp_path / "plan.json"), expect=1)
    assert "is not valid JSON, truncated or damaged" in text
    assert "Traceback" not in text


def test_show_imports_neither_axolotl_nor_torch():
    code = (
        "import sys; import axolotl_layersel.cli.main; from axolotl_layersel.reports import plan_table;"
        "print([name for name in ('axolotl', 'torch', 'transformers') if name in sys.modules])"
    )
    assert call(sys.executable, "-c", code) == "[]\n"


@pytest.mark.parametrize("command", [["axolotl-layersel"], [sys.executable, "-m", "axolotl_layersel"]])
def test_both_names_of_the_command_know_the_same(command, tmp_path):
    assert call(*command, "--version") == f"axolotl-layersel {__version__}\n"
    text = call(*command, "--help")
    assert "Choose the layers that get a LoRA adapter" in text
    names = ["plan", "compare", "check", "doctor", "show", "export", "examples", "schema"]
    assert [line.split()[1] for line in text.splitlines() if line.startswith("│ ") and line[2].isalpha()] == names
    assert ("--install-completion" in text) == (command == ["axolotl-layersel"])
    nowhere = tmp_path / "plan.json"
    assert call(*command, "show", str(nowhere), expect=1).startswith(
        f"axolotl-layersel: PATH: {nowhere} cannot be read"
    )


@pytest.fixture(scope="module")
def completion(tmp_path_factory) -> Path:
    """The completion script for bash; the command finds the shell among its parent processes."""
    script = tmp_path_factory.mktemp("completion") / "completion.bash"
    script.write_text(call("bash", "-c", "axolotl-layersel --show-completion; exit $?"))
    return script


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("axolotl-layersel ", {"plan", "compare", "check", "doctor", "show", "export", "examples", "schema"}),
        ("axolotl-layersel s", {"show", "schema"}),
        ("axolotl-layersel plan run.yml --l", {"--launcher"}),
        ("axolotl-layersel plan run.yml --launcher t", {"torchrun"}),
        ("axolotl-layersel export run --layout ", {"ragged", "const", "uniform", "full"}),
        ("axolotl-layersel export run --for t", {"tensorrt-llm", "tgi"}),
    ],
)
def test_bash_completes_what_is_typed(typed, offered, completion):
    # As bash does when tab is pressed: it calls the function that the script has registered.
    code = (
        'source "$1"; read -ra COMP_WORDS <<< "$2"; [[ $2 == *" " ]] && COMP_WORDS+=(""); '
        "COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); function=$(complete -p axolotl-layersel); "
        'function=${function#*-F }; ${function%% *} axolotl-layersel; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    assert set(call("bash", "-c", code, "bash", str(completion), typed).splitlines()) == offered


def test_importing_the_plugin_costs_no_second_beyond_axolotl():
    code = (
        "import time; import axolotl.cli.train, axolotl.integrations.base, axolotl.train; start = time.perf_counter();"
        "import axolotl_layersel; axolotl_layersel.LayerSelectionPlugin; print('seconds', time.perf_counter() - start)"
    )
    (line,) = (line for line in call(sys.executable, "-c", code).splitlines() if line.startswith("seconds"))
    assert float(line.split()[1]) < 1.0


def without_deepspeed(path: Path, **values) -> Path:
    """Write a copy of a YAML file for commands in one process, in which Axolotl cannot start DeepSpeed."""
    settings = {**yaml.safe_load(path.read_text()), "deepspeed": None, **values}
    settings["plugins"] = [name for name in settings["plugins"] if "probe" not in name]
    other = path.with_name("one-process.yml")
    other.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}))
    return other


def in_process(zygote, target: str, path: Path, **args) -> str:
    """Run one of Axolotl's other commands on a YAML file, and return its log."""
    log = path.with_name(f"{target.split(':')[0].rpartition('.')[2]}.log")
    codes = zygote.run(target, {"config": str(path), **args}, 1, log, {})
    text = Path(f"{log}.0").read_text()
    assert codes == [0], text[-4000:]
    return text


@pytest.mark.nightly
def test_merge_lora_merges_the_selected_layers(trained, zygote, base_model, tmp_path):
    path, output = trained
    training = RunLock.take(output)  # commands that do not train work during a run
    in_process(zygote, "axolotl.cli.merge_lora:do_cli", without_deepspeed(path))
    training.release()
    merged = load_merged(output, tmp_path)
    stock = load_with_stock_peft(base_model, [output], tmp_path)[str(output)]
    assert float((merged - stock).abs().max()) <= 1e-4, "merging adds B·A to the weight, which rounds once more"


@pytest.mark.parametrize("command", ["preprocess", "evaluate", "inference"])
def test_the_same_file_goes_through_axolotls_other_commands(trained, zygote, command):
    path, output = trained
    other = without_deepspeed(path, val_set_size=0.1)
    plan = (output / "layersel" / "plan.json").read_bytes()
    arguments = {} if command == "preprocess" else {"lora_model_dir": str(output)}
    training = RunLock.take(output)
    text = in_process(zygote, f"axolotl.cli.{command}:do_cli", other, **arguments)
    training.release()
    assert "layersel: method" not in text, "a command that does not train selected layers"
    assert (output / "layersel" / "plan.json").read_bytes() == plan
    if command == "evaluate":
        assert "eval_loss" in text


@pytest.mark.nightly
def test_a_sweep_over_the_block_trains_each_choice(make_config, tmp_path):
    path, _, output = make_config(max_steps=1)
    choices = [{"selection": {"method": "last", "num_layers": n}} for n in (1, 3)]
    (tmp_path / "sweep.yml").write_text(yaml.safe_dump({"layersel": choices}))
    text = call("axolotl", "train", str(path), "--launcher", "python", "--sweep", str(tmp_path / "sweep.yml"))
    # When it is chosen, and at the end.
    assert [text.count(f"layersel: method last keeps {n} of 8 layers") for n in (1, 3)] == [2, 2]
    plans = [json.loads(plan.read_text()) for plan in output.glob("sweep*/layersel/plan.json")]
    chosen = sorted([choice["layer"] for choice in plan["layers"] if choice["selected"]] for plan in plans)
    assert chosen == [[5, 6, 7], [7]]
