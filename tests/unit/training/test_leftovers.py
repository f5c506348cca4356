"""What killed runs leave behind, and what the next run removes of it: real kills, and files of just their names."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from helpers.models import make_lora, make_small_llama, make_trainer

from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.training.leftovers import find_leftovers, find_surplus
from axolotl_layersel.training.prepare import prepare_trainer

pytestmark = pytest.mark.trains

BLOCK = LayerselConfig.model_validate(
    {
        "selection": {"method": "first", "num_layers": 2},
        "l1ra": {"rule": "pressure", "budget_unit": "rank", "update_ratio": 0.25},
    }
)


def prepare(folder: Path, resume_from: str | None = None, **arguments):
    values = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, **arguments}
    trainer = make_trainer(make_lora(make_small_llama(3)), folder, **values)
    prepare_trainer(trainer, BLOCK, resume_from)
    return trainer


def list_names(folder: Path) -> list[str]:
    """Return all files and folders below a folder, but for the Trainer's own state."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    prepare(folder, save_total_limit=9).train()
    return folder


def kill_while_writing(folder: Path, name: str, step: int) -> None:
    """Train in a process of its own, which SIGKILL ends while it writes the file ``name`` of a checkpoint."""
    child = os.fork()
    if child == 0:
        replace = os.replace

        def die(source, target):
            if Path(target).name == name and Path(target).is_relative_to(folder / f"checkpoint-{step}"):
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = die
        prepare(folder).train()
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("adapter_model.safetensors", "checkpoint-6/.layersel-"),
        ("ranks.csv", "checkpoint-6/layersel/.ranks.csv."),
        ("state.safetensors", "checkpoint-6/layersel/.state.safetensors."),
        ("plan.json", "checkpoint-6/layersel/.plan.json."),
        ("checkpoint.json", "checkpoint-6/layersel/.checkpoint.json."),
    ],
)
def test_what_a_kill_leaves_is_gone_after_the_next_run(whole, tmp_path, name, left):
    kill_while_writing(tmp_path, name, 6)
    assert [path for path in list_names(tmp_path) if path.startswith(left)], "nothing was left behind"
    assert find_leftovers(tmp_path)
    checkpoint = str(tmp_path / "checkpoint-4")
    prepare(tmp_path, checkpoint).train(resume_from_checkpoint=checkpoint)
    assert [path for path in list_names(tmp_path) if "/." in path or path.startswith(".")] == []
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
    for file in ("adapter_model.safetensors", "layersel/state.safetensors"):
        again, before = (folder / "checkpoint-8" / file for folder in (tmp_path, whole))
        assert again.read_bytes() == before.read_bytes()


OURS = [
    ".layersel-a1b2c3_4",
    "layersel/.layersel-a1b2c3_4",
    "layersel/.ranks.csv.a1b2c3_4",
    "layersel/.plan.json.a1b2c3_4",
    "layersel/.gates.csv.a1b2c3_4",
    ".adapter_config.json.a1b2c3_4",
    "checkpoint-6/.adapter_model.safetensors.a1b2c3_4",
    "checkpoint-6/layersel/.state.safetensors.a1b2c3_4",
    "checkpoint-6/layersel/.checkpoint.json.a1b2c3_4",
    "checkpoint-6/.layersel-a1b2c3_4/adapter_model.safetensors",
    "checkpoint-6/.layersel-zzzzzzzz/adapter_config.json",
]
THEIRS = [
    ".layersel-a1b2c3",
    ".layersel-A1B2C3D4",
    ".ranks.csv.a1b2c3_4",
    ".layersel-mine1234/notes.txt",
    ".layersel-both1234/adapter_config.json",
    ".layersel-both1234/notes.txt",
    "layersel/.ranks.csv.swp",
    "layersel/.ranks.csv.a1b2c3_45",
    "layersel/.notes.csv.a1b2c3_4",
    "layersel/ranks.csv.a1b2c3_4",
    "layersel/.state.safetensors.a1b2c3_4/file",
    "layersel/below/.ranks.csv.a1b2c3_4",
    "other/layersel/.ranks.csv.a1b2c3_4",
    "checkpoint-best/layersel/.ranks.csv.a1b2c3_4",
]


def plant(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def test_only_names_that_this_package_makes_are_leftovers(tmp_path):
    plant(tmp_path, [*OURS, *THEIRS])
    found = {str(path.relative_to(tmp_path)) for path in find_leftovers(tmp_path)}
    assert found == {
        name.rpartition("/adapter_")[0] if ".layersel-" in name and "/adapter_" in name else name for name in OURS
    }


def test_links_are_not_followed(tmp_path):
    elsewhere, output = tmp_path / "elsewhere", tmp_path / "output"
    plant(elsewhere, ["layersel/.ranks.csv.a1b2c3_4", ".layersel-a1b2c3_4", "kept", "adapter/adapter_config.json"])
    output.mkdir()
    (output / "layersel").symlink_to(elsewhere / "layersel")
    (output / "checkpoint-2").symlink_to(elsewhere)
    (output / ".layersel-bbbbbbbb").symlink_to(elsewhere / "kept")
    (output / ".layersel-cccccccc").symlink_to(elsewhere / "adapter")
    assert find_leftovers(output) == []


def test_a_users_files_and_the_age_of_checkpoints_stay_when_a_run_tidies_up(whole, tmp_path):
    for step in (4, 6):
        shutil.copytree(whole / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    plant(tmp_path, [*OURS, *THEIRS])
    os.utime(tmp_path / "checkpoint-6", (1e9, 1e9))
    checkpoint = str(tmp_path / "checkpoint-6")
    trainer = prepare(tmp_path, checkpoint, save_strategy="no")
    trainer.train(resume_from_checkpoint=checkpoint)
    assert find_leftovers(tmp_path) == []
    assert all((tmp_path / name).is_file() for name in THEIRS)
    assert (tmp_path / "checkpoint-6").stat().st_mtime == 1e9


# --- save_total_limit -----------------------------------------------------------------------------------------------


def list_steps(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("there", "cut", "resumed", "limit", "left"),
    [
        ((4, 6, 8), [], 8, 2, [6, 8]),
        ((2, 4, 6, 8), [], 8, 1, [8]),
        # What was half deleted goes before what is whole, and before it is taken for the newest.
        ((2, 4, 8), [4], 8, 2, [2, 8]),
        # Here the run goes on and writes it again.
        ((4, 6, 8), [8], 6, 2, [6, 8]),
        ((4, 6, 8), [], 8, None, [4, 6, 8]),
        ((4, 6, 8), [], 8, 3, [4, 6, 8]),
    ],
)
def test_a_resumed_run_keeps_to_its_limit(whole, tmp_path, there, cut, resumed, limit, left):
    for step in there:
        shutil.copytree(whole / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    for step in cut:
        (tmp_path / f"checkpoint-{step}" / "optimizer.pt").unlink()
    checkpoint = str(tmp_path / f"checkpoint-{resumed}")
    trainer = prepare(tmp_path, checkpoint, save_total_limit=limit)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert list_steps(tmp_path) == left


def test_the_best_checkpoint_a_link_and_what_is_resumed_from_stay(tmp_path):
    for step in (2, 4, 6, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-1").symlink_to(tmp_path / "checkpoint-2")
    kept = {"checkpoint-2", "checkpoint-6"}

    def find(limit: int) -> list[str]:
        return [path.name for path in find_surplus(tmp_path, limit, kept, lambda path: path.name != "checkpoint-8")]

    assert find(4) == ["checkpoint-8"]
    assert find(3) == find(2) == find(1) == ["checkpoint-8", "checkpoint-4"]
    assert find(5) == find(0) == []


def test_a_run_in_a_folder_without_leftovers_costs_nothing(tmp_path):
    for step in range(200):
        (tmp_path / f"checkpoint-{step}" / "layersel").mkdir(parents=True)
    began = time.perf_counter()
    assert find_leftovers(tmp_path) == []
    assert time.perf_counter() - began < 1
