"""How a refused run ends: one sentence, last on the terminal, printed once, whatever starts the processes."""

import importlib.metadata
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from axolotl.cli import main as axolotl_main
from axolotl.utils import tee
from axolotl.utils.schemas.config import AxolotlInputConfig
from helpers.ending import PREFIX
from helpers.settings import selection
from pydantic import BaseModel, ValidationError
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.root import LayerselArgs, LayerselConfig
from axolotl_layersel.config.textual import DEFAULT_OUTPUT, LOG_FILE, PLUGIN, check_text
from axolotl_layersel.training import ending, startup
from axolotl_layersel.training.ending import COLLECTOR, Ending, describe_error, find_sentences
from axolotl_layersel.training.startup import find_command, find_file, takes_block

GOOD = {"plugins": [PLUGIN], **selection()}


# --- Launched ------------------------------------------------------------------------------------------------------


# --- In process ----------------------------------------------------------------------------------------------------


def test_torch_is_told_what_to_call():
    (entry,) = importlib.metadata.entry_points(group="torch.backends", name="axolotl_layersel")
    assert entry.load() is startup.watch
    assert 'group_name = "torch.backends"' in inspect.getsource(torch._import_device_backends)


def test_what_is_relied_on_of_axolotl_and_torch_is_there():
    assert tee.file_only_stream.writable is not None and tee.__name__ == ending.LOG_MODULE
    assert inspect.signature(tee.prepare_debug_log).parameters["filename"].default == LOG_FILE
    assert AxolotlInputConfig.model_fields["output_dir"].default == DEFAULT_OUTPUT
    assert ChildFailedError.__name__ == ending.LAUNCHER_FAILURE
    options = {option for parameter in axolotl_main.train.params for option in parameter.opts}
    assert set(startup.OTHER_FILES) <= options
    assert set(startup.CHECKED) <= set(axolotl_main.cli.commands)


@pytest.mark.parametrize(
    ("argv", "original", "found"),
    [
        (["/bin/axolotl", "train", "a.yml"], ["python", "/bin/axolotl", "train", "a.yml"], ("train", ["a.yml"])),
        (["-m", "a.yml"], ["python", "-m", "axolotl.cli.train", "a.yml"], ("train", ["a.yml"])),
        (["-m", "train"], ["python", "-m", "axolotl.cli.main", "train", "a.yml"], ("train", ["a.yml"])),
        (["accelerate"], ["p", "accelerate", "launch", "-m", "axolotl.cli.train", "a.yml"], ("train", ["a.yml"])),
        (["deepspeed"], ["p", "deepspeed", "--module", "axolotl.cli.evaluate", "a"], ("evaluate", ["a"])),
        (["/bin/axolotl", "--help"], ["python", "/bin/axolotl", "--help"], None),
        (["/bin/axolotl"], ["python", "/bin/axolotl"], None),
        (["train.py", "axolotl", "train"], ["python", "train.py", "axolotl", "train"], None),
        (["-c"], ["python", "-c"], None),
        ([""], ["python"], None),
    ],
)
def test_the_commands_of_axolotl_are_known_by_their_command_line(argv, original, found):
    assert find_command(argv, original) == found


@pytest.mark.parametrize(
    ("arguments", "takes"),
    [
        ("train a.yml --learning-rate 1e-4", True),
        ("evaluate a.yml", False),
        ("train a.yml --sweep sweep.yml", False),
        ("train a.yml --sweep=sweep.yml", False),
        ("train a.yml --layersel.l1ra={}", False),
    ],
)
def test_a_command_that_replaces_the_block_is_not_checked_by_its_file(arguments, takes):
    name, *others = arguments.split()
    assert takes_block(name, others) == takes


def test_the_file_is_found_among_the_arguments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.yml", "sweep.yml", "one/b.yaml", "two/c.yml", "two/d.yml"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("layersel: 1")
    assert find_file(["--sweep", "sweep.yml", "--launcher", "python", "a.yml"]) == Path("a.yml")
    assert find_file(["--deepspeed=a.json", "one"]) == Path("one/b.yaml")
    for arguments in (
        ["two"],
        ["none.yml"],
        ["x" * 5000, "x" * 5000 + ".yml"],
        ["https://example.org/a.yml"],
        ["--", "a.yml"],
        [],
    ):
        assert find_file(arguments) is None
    assert startup.mentions_layersel(Path("a.yml")) and not startup.mentions_layersel(Path("none.yml"))


UNPLUGGED = {
    "no key": ({"plugins": None, **selection()}, "plugins: the key is missing, so `layersel` would be ignored"),
    "an empty list": ({"plugins": [], **selection()}, "plugins: [] does not list axolotl-layersel"),
    "another plugin": ({"plugins": ["axolotl.integrations.liger.LigerPlugin"], **selection()}, "does not list axolotl"),
    "another package": ({"plugins": ["layersel.LayerSelectionPlugin"], **selection()}, "Write `axolotl_layersel."),
    "another class": ({"plugins": ["axolotl_layersel.LayerSelectPlugin"], **selection()}, "'axolotl_layersel.LayerSel"),
    "no class": ({"plugins": ["axolotl_layersel"], **selection()}, "plugins: 'axolotl_layersel' is not a plugin of"),
    "no list": ({"plugins": PLUGIN, **selection()}, f"plugins: '{PLUGIN}' is not a list"),
    "a slip without its block": ({"plugins": ["axolotl_layersel.Plugin"]}, "plugins: 'axolotl_layersel.Plugin' is no"),
    "a blank block": ({"layersel": None}, "plugins: the key is missing"),
    "a misspelt block": ({"layersell": {"selection": {"method": "cka"}}}, "so `layersell` would be ignored"),
    "no block": ({"plugins": [PLUGIN]}, "layersel: the plugin is listed but its block is missing or empty"),
    "a slip in the block": ({"plugins": [PLUGIN], **selection(rato=1)}, "layersel.selection.rato is not a setting"),
    "a folder that cannot be": ({**GOOD, "output_dir": "/dev/null/run"}, "output_dir: /dev/null is a file"),
}


@pytest.mark.parametrize("case", UNPLUGGED)
def test_what_a_file_says_by_itself_is_refused(case):
    data, message = UNPLUGGED[case]
    with pytest.raises(ValueError) as refused:
        check_text(data)
    assert message in describe_error(refused.value)
    assert len(describe_error(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    "data",
    [
        GOOD,
        {**GOOD, "plugins": ["axolotl.integrations.liger.LigerPlugin", "axolotl_layersel.plugin.LayerSelectionPlugin"]},
        {"base_model": "x"},
        {"plugins": ["axolotl.integrations.liger.LigerPlugin"], "lora_r": 4, "datasets": [1]},
    ],
)
def test_what_is_in_order_or_not_ours_passes(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_text(data)
    assert list(tmp_path.iterdir()) == []


RUN = {**GOOD, "adapter": "lora", "lora_r": 4, "output_dir": "output"}


@pytest.mark.parametrize(
    ("arguments", "refused"),
    [
        (["run.yml"], True),
        (["run.yml", "--launcher", "torchrun", "--", "--nproc_per_node=2", "--lora-alpha=2"], True),
        (["--output-dir", "other", "--launcher=python", "run.yml"], True),
        (["run.yml", "--lora-alpha", "16"], False),
        (["run.yml", "--no-sample-packing"], False),
    ],
)
def test_the_rest_of_the_file_is_checked_at_once_unless_options_may_change_it(
    arguments, refused, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for alpha in (0, 16):
        Path("run.yml").write_text(yaml.safe_dump({**RUN, "lora_alpha": alpha}))
        if refused and alpha == 0:
            with pytest.raises(LayerselError, match=r"^lora_alpha: 0 scales the output of LoRA to 0"):
                startup.check_command(Path("run.yml"), arguments, True)
        else:
            startup.check_command(Path("run.yml"), arguments, True)
    Path("run.yml").write_text(yaml.safe_dump({"base_model": "x", "output_dir": "runs/layersel", "lora_alpha": 0}))
    startup.check_command(Path("run.yml"), arguments, True)
    assert [path.name for path in tmp_path.iterdir()] == ["run.yml"]


class Merged(LayerselArgs):
    """As Axolotl merges our settings into its own."""

    logging_steps: int | None = None


def refuse(data: dict) -> ValidationError:
    with pytest.raises(ValidationError) as refused:
        Merged.model_validate(data)
    return refused.value


def test_a_validation_is_ours_if_one_of_its_errors_is():
    ours = refuse({**GOOD, "adapter": "lora", **selection(rato=1), "logging_steps": "often"})
    assert find_sentences(ours) == [
        "layersel.selection.rato is not a setting: did you mean 'ratio'?",
        "logging_steps: 'often' is refused. Input should be a valid integer, unable to parse string as an integer",
    ]
    assert find_sentences(refuse({**GOOD, "adapter": None})) == [
        "adapter: None has no LoRA layers to choose from (full fine-tuning is not supported). Set `adapter: lora` or "
        "`adapter: qlora`, or remove axolotl_layersel from `plugins`."
    ]
    assert find_sentences(refuse({"logging_steps": "often"})) == []

    class Another(BaseModel):
        x: int

    with pytest.raises(ValidationError) as refused:
        Another(x="a")
    assert find_sentences(refused.value) == find_sentences(ValueError("x")) == find_sentences(None) == []


def test_the_hook_keeps_to_errors_of_its_own(monkeypatch, capsys):
    monkeypatch.delenv(COLLECTOR, raising=False)
    seen = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: seen.append(error[1]))
    hook = Ending()
    for error in (KeyError("x"), KeyboardInterrupt(), subprocess.CalledProcessError(1, ["x"])):
        hook(type(error), error, None)
    assert [type(error) for error in seen] == [KeyError, KeyboardInterrupt, subprocess.CalledProcessError]
    hook(LayerselError, LayerselError("a: \x1b[2J\nb"), None)
    assert len(seen) == 3
    assert capsys.readouterr().err == f"{PREFIX}a: \\x1b[2J\\nb\n"


def test_a_collector_that_is_gone_or_elsewhere_collects_nothing(monkeypatch, tmp_path, capsys):
    child = subprocess.Popen(["true"])
    child.wait()
    for value in ("", "x", f"{child.pid}:{os.uname().nodename}:{tmp_path / 'x'}", f"{os.getpid()}:elsewhere:/tmp/x"):
        monkeypatch.setenv(COLLECTOR, value)
        assert ending.find_collection() is None
    monkeypatch.setenv(COLLECTOR, f"{os.getpid()}:{os.uname().nodename}:{tmp_path / 'x'}")
    assert ending.find_collection() == tmp_path / "x"
    ending.tell(["b: c", "a: b"])
    ending.tell(["b: c"])
    assert ending.read_collection() == ["b: c", "a: b"]
    monkeypatch.setenv(COLLECTOR, f"{os.getpid()}:{os.uname().nodename}:{tmp_path / 'nowhere' / 'x'}")
    ending.tell(["c: d"])
    assert capsys.readouterr().err == f"{PREFIX}c: d\n", "it is not lost where it cannot be collected"


def test_a_closing_block_is_printed_at_once_where_nothing_collects(monkeypatch, capsys):
    monkeypatch.delenv(COLLECTOR, raising=False)
    ending.close(lambda: ["layersel: a\x1b[2J", "  b"])
    assert capsys.readouterr().out == "layersel: a\\x1b[2J\n  b\n"


def test_a_closing_block_that_cannot_be_made_is_one_warning(monkeypatch, capsys, caplog):
    monkeypatch.delenv(COLLECTOR, raising=False)

    def fail():
        raise KeyError("x")

    with caplog.at_level("WARNING", logger="axolotl.layersel"):
        ending.close(fail)
    assert [record.message for record in caplog.records] == [
        "layersel: the closing summary cannot be made (KeyError: 'x'). The run is complete."
    ]
    assert "Traceback" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sentences", "error", "printed"),
    [([], None, "  a\n"), (["b: c"], None, ""), ([], ValueError("x"), "")],
    ids=["finished", "refused", "failed"],
)
def test_a_collected_closing_block_is_printed_last_and_only_if_the_command_succeeds(
    monkeypatch, tmp_path, capsys, sentences, error, printed
):
    monkeypatch.setenv(COLLECTOR, f"{os.getpid()}:{os.uname().nodename}:{tmp_path / 'x'}")
    monkeypatch.setattr(sys, "last_value", error, raising=False)
    ending.close(lambda: ["  a"])
    ending.tell(sentences)
    print("of another package")
    Ending().finish()
    told = capsys.readouterr()
    assert told.out == f"of another package\n{printed}"
    assert told.err == "".join(f"{PREFIX}{sentence}\n" for sentence in sentences)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("keys", "advice"),
    [
        (selection(rato=0.5), ""),
        ({**selection(rato=0.5), "adapter": None, "seed": -1}, " `axolotl-layersel doctor {}` lists all 3 faults."),
    ],
    ids=["one fault", "three"],
)
def test_the_last_sentence_names_the_command_that_lists_all_faults_if_there_are_more(
    monkeypatch, tmp_path, capsys, keys, advice
):
    monkeypatch.setenv(COLLECTOR, f"{os.getpid()}:{os.uname().nodename}:{tmp_path / 'x'}")
    monkeypatch.setattr(sys, "last_value", None, raising=False)
    path = tmp_path / "run.yml"
    path.write_text(yaml.safe_dump({**GOOD, "adapter": "lora", "output_dir": str(tmp_path / "output"), **keys}))
    last = Ending()
    monkeypatch.setattr(ending, "INSTALLED", [last])
    ending.point_to(path, True)
    ending.tell(["b: c"])
    last.finish()
    assert capsys.readouterr().err == f"{PREFIX}b: c{advice.format(path)}\n"


def test_the_block_itself_stays_a_plain_error_for_a_script():
    with pytest.raises(ValueError):
        LayerselConfig.model_validate({"selection": {"method": "ckaa"}})
