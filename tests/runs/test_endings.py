"""The end of a refused run: one sentence, printed once and last, with every launcher."""

import os
import subprocess
import sys

import pytest
from helpers.ending import CLOSING, PREFIX
from helpers.places import ENVIRONMENT, HANGS, ROOT, at_night
from helpers.settings import selection

from axolotl_layersel.config.textual import LOG_FILE, PLUGIN
from axolotl_layersel.training.ending import COLLECTOR


def end(*command: str, **env: str) -> tuple[int, list[str]]:
    """Run a command and return its exit code and the lines of both streams in their order."""
    inherited = {key: value for key, value in os.environ.items() if key != COLLECTOR}
    done = subprocess.run(
        list(command),
        cwd=ROOT,
        env={**inherited, **ENVIRONMENT, "COLUMNS": "80", **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=HANGS,
    )
    return done.returncode, done.stdout.splitlines()


def test_a_block_without_its_plugin_is_refused_before_axolotl_begins(make_config):
    path, _, output = make_config(plugins=None)
    code, lines = end("axolotl", "train", str(path))
    assert code == 1
    assert lines == [
        f"{PREFIX}plugins: the key is missing, so `layersel` would be ignored and the run would train plain LoRA. "
        f"Write `- {PLUGIN}` on a line below `plugins:`, or remove `layersel`."
    ]
    assert not output.exists()


@pytest.mark.parametrize(
    ("engine", "command"),
    [
        ("single", ("axolotl", "train", "CONFIG")),
        *at_night(("ddp", ("axolotl", "train", "CONFIG", "--launcher", "torchrun", "--", "--nproc_per_node=2"))),
    ],
)
def test_what_a_run_is_refused_is_the_last_line_and_said_once(make_config, engine, command):
    path, _, output = make_config(engine, **selection(plan="nowhere/plan.json"))
    code, lines = end(*(str(path) if word == "CONFIG" else word for word in command))
    assert code == 1
    sentence = f"{PREFIX}layersel.selection.plan: nowhere/plan.json cannot be read (No such file or directory). "
    assert lines[-1].startswith(sentence), lines[-5:]
    text = "\n".join(lines)
    assert text.count(PREFIX) == 1 and CLOSING not in text
    assert "Traceback" not in text and "CalledProcessError" not in text
    assert any("] layersel: plugin " in line and "is loaded" in line for line in lines)
    assert "Traceback" in (output / LOG_FILE).read_text(), "where it came from is in the log of the run"


@pytest.mark.nightly
def test_plan_on_one_process_starts_none_and_ends_in_the_sentence(make_config):
    path, _, _ = make_config(**selection(plan="nowhere/plan.json"))
    code, lines = end("axolotl-layersel", "plan", str(path))
    assert code == 1
    assert lines[-1].startswith(f"{PREFIX}layersel.selection.plan: nowhere/plan.json cannot be read")
    assert "Traceback" not in "\n".join(lines)


def test_other_errors_and_signals_end_as_ever(tmp_path):
    code = (
        "import os, signal, sys; from axolotl_layersel.training.ending import collect; collect();"
        # Processes ignore the signal if a shell starts the tests in the background.
        "signal.signal(signal.SIGINT, signal.default_int_handler);"
        "sys.argv[1] == 'term' and os.kill(os.getpid(), signal.SIGTERM); sys.argv[1] == 'int' and "
        "signal.raise_signal(signal.SIGINT); raise ValueError('of another package')"
    )
    status, lines = end(sys.executable, "-c", code, "none")
    assert status == 1 and lines[0].startswith("Traceback") and lines[-1] == "ValueError: of another package"
    status, lines = end(sys.executable, "-c", code, "int")
    assert status == -2 and lines[-1] == "KeyboardInterrupt"
    assert end(sys.executable, "-c", code, "term") == (-15, [])


def test_the_process_that_waits_prints_what_its_processes_refuse(tmp_path):
    child = (
        "from axolotl_layersel.training.ending import *; end_in_sentences(); raise LayerselError('a: ä ' + '☃' * 99)"
    )
    code = (
        "import subprocess, sys; from axolotl_layersel.training.ending import collect; collect();"
        f"[subprocess.run([sys.executable, '-c', {child!r}]) for _ in range(2)];"
        "raise subprocess.CalledProcessError(1, ['python'])"
    )
    assert end(sys.executable, "-c", code, TMPDIR=str(tmp_path)) == (1, [f"{PREFIX}a: ä {'☃' * 99}"])
    assert list(tmp_path.iterdir()) == []


def test_a_hook_that_a_tracker_puts_over_ours_hides_no_sentence():
    code = (
        "import sys; from axolotl_layersel.training.ending import *; collect();"
        "sys.excepthook = lambda *error: print('a tracker says'); raise LayerselError('a: b')"
    )
    assert end(sys.executable, "-c", code) == (1, ["a tracker says", f"{PREFIX}a: b"])
