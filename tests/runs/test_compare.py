"""A comparison through real ``axolotl train``: two arms at two rates and two seeds, and three arms that fail."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets
from datasets import Dataset
from helpers.axolotl_files import without_plugins
from helpers.compared import make_settings
from helpers.places import ENVIRONMENT, ROOT, at_night

from axolotl_layersel.cli.compare.cells import CONFIG, Cell, find_folder, write_config
from axolotl_layersel.cli.compare.cells import make_config as make_cell_config
from axolotl_layersel.cli.compare.figures import COMPARISON, FIGURES, ArmSettings, Comparison, Figures, read_record
from axolotl_layersel.cli.compare.measuring import divide, hash_rows
from axolotl_layersel.config.textual import MEASURING, PLUGIN, read_yaml
from benchmarks.held_out import training
from benchmarks.held_out.arms import ARMS as BENCHMARK_ARMS
from benchmarks.held_out.training import DECODER_TARGETS, Data, Settings

RATES, STEPS = (0.002, 0.004), 4
TOP = {"layersel": {"selection": {"method": "last", "num_layers": 2, "rank_allocation": "match"}}}
ARMS = {
    "top": TOP,
    "none": {"layersel": {"selection": {"method": "explicit", "layers": [99]}}},  # which the model does not have
    "huge": {"lora_r": 10**12, "lora_alpha": 10**12},  # no machine has as much memory
    "shot": TOP,  # its runs are killed
}
FAILING = ("none", "huge", "shot")
# Figures of time and memory, which differ between two runs of a cell.
MEASURED = ("seconds_choosing", "seconds_per_step", "seconds_training", "peak_memory_bytes")


@dataclass
class Compared:
    """A comparison that was killed, and started again.

    Attributes:
        path: the user's file.
        folder: of the comparison.
        before: the bytes of the figures that existed when it was killed.
        killed: the folder of the cell that was training then.
        text: what the second start printed.
    """

    path: Path
    folder: Path
    before: dict[Path, bytes]
    killed: Path
    text: str

    def read(self) -> Comparison:
        return read_record(Comparison, self.folder / COMPARISON)


def start(path: Path, *options: str) -> subprocess.Popen:
    """Start the command."""
    command = ["compare", str(path), "--arms-file", str(path.with_name("arms.yml")), "--seeds", "2", "--widen", "0"]
    command += ["--no-refine"]
    command += ["--rates", ",".join(map(str, RATES)), "--steps", str(STEPS), "--launcher", "python", *options]
    return subprocess.Popen(
        [sys.executable, "-m", "axolotl_layersel", *command],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, "COLUMNS": "120"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen, expect: int = 0) -> str:
    """Return the standard output of a command that has ended well."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == expect, f"{process.returncode}\n{out}\n{err[-4000:]}"
    return out


def wait_for(find, seconds: float = 300):
    """Return what ``find()`` returns once that is true."""
    end = time.monotonic() + seconds
    while not (found := find()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)
    return found


def find_processes(word: str) -> list[int]:
    """Return the numbers of the processes that have a word in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word in path.read_bytes().decode("utf-8", "replace"):
                found.append(int(path.parent.name))
        except OSError:  # it has ended
            continue
    return found


def kill_runs(folder: Path, ended: threading.Event) -> None:
    """Kill every run below a folder, as the system does when memory is short, until the event."""
    while not ended.wait(0.05):
        for process in find_processes(f"{folder}{os.sep}"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


@pytest.fixture(scope="module")
def compared(make_config) -> Compared:
    plugins = ["helpers.cpu_engines.CpuEnginesPlugin"]
    settings = {"layersel": None, "val_set_size": 0.125, "lora_dropout": 0.1, "save_steps": None, "warmup_steps": 2}
    path, _, output = make_config(plugins=plugins, **settings)
    general = path.with_name("general.txt")
    general.write_text("The standard library has many modules.\nimport os\n")
    path.with_name("arms.yml").write_text(yaml.safe_dump(ARMS, sort_keys=False))
    folder = output / "compare"
    first = start(path, "--general", str(general))
    # Plain LoRA's first cell has ended, and another one trains.
    wait_for(lambda: first.poll() is not None or list(folder.glob(f"*/*/*/{FIGURES}")))
    killed = wait_for(lambda: [each for each in find_open(folder) if "Starting trainer" in read_log(each)])[0]
    first.send_signal(signal.SIGKILL)
    first.communicate()
    wait_for(lambda: not find_processes(str(folder)), 60)
    before = {each: each.read_bytes() for each in folder.glob(f"*/*/*/{FIGURES}")}
    ended = threading.Event()
    killer = threading.Thread(target=kill_runs, args=(folder / "shot", ended))
    killer.start()
    try:
        text = finish(start(path, "--general", str(general)))
    finally:
        ended.set()
        killer.join()
    return Compared(path, folder, before, killed, text)


def find_open(folder: Path) -> list[Path]:
    """Return the folders of cells that have neither figures nor a failure."""
    cells = [path.parent for path in folder.glob(f"*/*/*/{CONFIG}")]
    return [each for each in cells if not any((each / name).exists() for name in (FIGURES, "failure.json"))]


def read_log(folder: Path) -> str:
    log = folder / "log.txt"
    return log.read_text("utf-8", "replace") if log.exists() else ""


def list_equal_figures(figures: Figures) -> dict:
    """Return the figures that do not depend on the machine's speed."""
    content = figures.model_dump(exclude=set(MEASURED))
    content["curve"] = [(point.step, point.validation_loss) for point in figures.curve]
    return content


@pytest.mark.nightly
def test_both_arms_are_trained_at_both_rates_and_the_best_one_with_both_seeds(compared):
    comparison = compared.read()
    for arm in ("lora", "top"):
        cells = [cell for cell in comparison.figures if cell.arm == arm]
        assert {cell.rate for cell in cells if cell.seed == 7} == set(RATES)
        assert set(comparison.list_final(arm)) == {7, 8}
        assert len(cells) == 3
    assert comparison.planned == len(comparison.cells) == 6 + 2 * len(FAILING)
    assert comparison.real_steps == 6, "max_steps of the file"


@pytest.mark.nightly
def test_an_arm_that_fails_is_a_row_with_its_sentence(compared):
    failures = compared.read().failures
    assert sorted(failure.arm for failure in failures) == sorted(2 * FAILING)
    for failure in failures:
        assert failure.sentence in " ".join(compared.text.split())
        assert "Traceback" not in failure.sentence
    sentences = {failure.arm: failure.sentence for failure in failures}
    assert sentences["none"].startswith("layersel.selection.layers: [99]")
    assert "can't allocate memory: you tried to allocate" in sentences["huge"]
    assert sentences["shot"] == "The run was killed (SIGKILL), as the system does when memory is short."


@pytest.mark.nightly
def test_all_cells_have_the_same_rows_in_the_same_parts(compared):
    figures = compared.read().figures
    assert len({cell.rows_digest for cell in figures}) == 1
    assert {(cell.train_rows, cell.validation_rows, cell.test_rows) for cell in figures} == {(56, 4, 4)}
    assert len({(cell.base_test_loss, cell.general_before) for cell in figures}) == 1, "LoRA starts at 0"
    assert len({cell.test_loss for cell in figures}) == len(figures)
    assert len({cell.trainable_parameters for cell in figures}) == 1, "rank_allocation: match"


@pytest.mark.nightly
def test_the_figures_of_a_cell_are_whole(compared):
    for cell in compared.read().figures:
        assert [point.step for point in cell.curve] == [0, 2, 4]
        assert cell.curve[0].seconds == 0 < cell.curve[1].seconds < cell.curve[-1].seconds == cell.seconds_training
        assert cell.curve[-1].validation_loss == cell.validation_loss < cell.curve[0].validation_loss
        assert cell.general_after is not None and cell.general_after != cell.general_before
        assert (cell.engine, cell.processes, cell.memory_of) == ("single", 1, "process")
        assert cell.adapter_bytes > 4 * cell.trainable_parameters
        assert cell.selected == ((2, 8) if cell.arm == "top" else None)
        assert set(cell.ranks.values()) == ({16} if cell.arm == "top" else {4})


@pytest.mark.nightly
def test_what_had_ended_before_the_kill_is_kept_and_the_rest_follows(compared):
    assert compared.before
    assert {path: path.read_bytes() for path in compared.before} == compared.before
    assert (compared.killed / FIGURES).exists()
    assert not find_open(compared.folder)


@pytest.mark.nightly
def test_a_start_after_the_end_runs_nothing_and_gives_the_same_report(compared):
    files = [compared.folder / name for name in (COMPARISON, "report.html", "best.yml")]
    before = [path.read_bytes() for path in files]
    began = time.time()
    text = finish(start(compared.path, "--general", str(compared.path.with_name("general.txt"))))
    assert [path.read_bytes() for path in files] == before
    assert not [path for path in compared.folder.glob("*/*/*/log.txt") if path.stat().st_mtime > began]
    assert compared.text.endswith(text), "the second start also has a line for each cell"


@pytest.mark.nightly
def test_a_cell_started_by_hand_has_the_same_figures(compared, zygote, tmp_path):
    # The cell that was killed has been started again from its beginning.
    path = compared.killed / FIGURES
    before = read_record(Figures, path)
    args = {"config": str(compared.killed / CONFIG)}
    assert zygote.run("axolotl.cli.train:do_cli", args, 1, tmp_path / "log", {}) == [0]
    assert list_equal_figures(read_record(Figures, path)) == list_equal_figures(before)


@pytest.mark.nightly
def test_the_best_file_is_ready_to_train(compared, zygote, tmp_path):
    best, comparison = read_yaml(compared.folder / "best.yml"), compared.read()
    user = read_yaml(compared.path)
    assert {key: value for key, value in best.items() if key not in ("learning_rate", "layersel", "plugins")} == {
        key: value for key, value in user.items() if key not in ("learning_rate", "plugins")
    }
    arm = "top" if "layersel" in best else "lora"
    assert best["learning_rate"] == comparison.best_rates[arm]
    assert (PLUGIN in best["plugins"]) == (arm == "top")
    other = tmp_path / "best.yml"
    other.write_text(yaml.safe_dump({**best, "max_steps": 1, "output_dir": str(tmp_path / "out")}))
    assert zygote.run("axolotl.cli.train:do_cli", {"config": str(other)}, 1, tmp_path / "log", {}) == [0]


@pytest.mark.nightly
def test_another_file_in_the_same_folder_is_refused(compared, tmp_path):
    changed = {**yaml.safe_load(compared.path.read_text()), "sequence_len": 64}
    path = compared.path.with_name("changed.yml")
    path.write_text(yaml.safe_dump(changed))
    process = start(path, "--general", str(compared.path.with_name("general.txt")))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "was made with other settings (sequence_len: 128, now 64)" in err


@pytest.mark.nightly
def test_json_has_the_answer_and_all_figures(compared):
    general = ("--general", str(compared.path.with_name("general.txt")))
    content = json.loads(finish(start(compared.path, *general, "--json")))
    assert Comparison.model_validate(content["comparison"]) == compared.read()
    assert content["answer"]["arm"] in ("lora", "top")


@pytest.mark.nightly
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2-sharded"])
def test_a_cell_is_measured_on_every_engine(engine, train, compared):
    lora = next(cell for cell in compared.read().figures if cell.arm == "lora" and cell.seed == 7)
    plugins = ["helpers.cpu_engines.CpuEnginesPlugin", "axolotl_layersel.LayerSelectionPlugin", MEASURING]
    run = train(
        engine,
        plugins=plugins,
        layersel_measure={"arm": "top", "data_seed": 7, "max_steps": 6},
        max_steps=STEPS,
        learning_rate=lora.rate,
        val_set_size=0.125,
        save_steps=None,
        save_strategy="no",
        eval_strategy="no",
        warmup_steps=2,
        **ARMS["top"],
    )
    figures = read_record(Figures, run.folder.parent / FIGURES)
    assert (figures.processes, figures.engine) == (2, engine.split("-")[0])
    assert figures.rows_digest == lora.rows_digest
    assert figures.trainable_parameters == lora.trainable_parameters
    assert figures.base_test_loss == pytest.approx(lora.base_test_loss, rel=1e-5)
    assert [point.step for point in figures.curve] == [0, 2, 4]
    assert figures.validation_loss < figures.curve[0].validation_loss


@pytest.mark.parametrize(
    ("arm", "block"),
    [("lora", None), *at_night(("gradient", {"selection": {"method": "gradient", "rank_allocation": "score"}}))],
)
def test_a_cell_has_the_losses_that_the_benchmark_of_quality_measures(
    arm, block, make_config, zygote, tmp_path, monkeypatch
):
    """``benchmarks/quality.py`` trains the same rows in the same order with a plain Trainer.

    Its own arm ``lora`` goes through this package, which draws LoRA's first values for each module, and is not plain.
    """
    monkeypatch.setitem(BENCHMARK_ARMS, arm, block)
    as_there = {"lora_target_modules": DECODER_TARGETS, "warmup_steps": 1, "max_steps": STEPS}
    plugins = ["helpers.cpu_engines.CpuEnginesPlugin"]
    path, _, output = make_config(layersel=None, plugins=plugins, val_set_size=0.125, save_steps=None, **as_there)
    data, cell = read_yaml(path), Cell(arm, RATES[0], 8, STEPS)
    settings = make_settings(["lora"], data, folder=str(output / "compare"), steps=STEPS, lora_r=4)
    settings.arms[arm] = ArmSettings(keys={"layersel": block}, choosing=block is not None)
    folder = find_folder(cell, settings)
    write_config(make_cell_config(data, cell, settings), cell, folder / CONFIG)
    assert zygote.run("axolotl.cli.train:do_cli", {"config": str(folder / CONFIG)}, 1, tmp_path / "log", {}) == [0]
    figures = read_record(Figures, folder / FIGURES)

    rows = load_rows(folder / CONFIG, data["seed"])
    assert hash_rows(*rows.values()) == figures.rows_digest
    parts = Data(**{name: list(each) for name, each in rows.items()}, general={})
    benchmark = Settings(Path(data["base_model"]), is_encoder=False, steps=STEPS, batch_size=2, evaluations=1)
    line = training.run_arm(benchmark, arm, 4, cell.seed, cell.rate, parts, {})
    assert line["parameters"] == figures.trainable_parameters
    assert (line["validation"], line["test"]) == pytest.approx((figures.validation_loss, figures.test_loss), abs=2e-5)
    assert figures.base_test_loss - figures.test_loss > 0.005, "it has learned"


def load_rows(config: Path, seed: int) -> dict[str, Dataset]:
    """Return the rows of a cell, as Axolotl orders and splits them by a seed."""
    with without_plugins():
        cfg = load_cfg(str(config))
        cfg.seed = seed
        loaded = load_datasets(cfg=cfg, cli_args=TrainerCliArgs())
    validation, test = divide(loaded.eval_dataset)
    rows = {"train": loaded.train_dataset, "validation": validation, "test": test}
    return {name: each.select_columns(["input_ids", "attention_mask", "labels"]) for name, each in rows.items()}
