"""Which checkpoint a run resumes from, by real checkpoints of a plain Trainer; those of the engines: test_runs.py."""

import logging
import shutil
from pathlib import Path

import pytest
from helpers.checkpoints import find_fault
from helpers.models import make_lora, make_small_llama, make_trainer
from transformers import TrainerState

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.l1ra import L1RAConfig
from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.config.selection import SelectionConfig
from axolotl_layersel.training.checkpoints import (
    View,
    describe_copies,
    find_resumed_checkpoint,
    list_checkpoints,
)
from axolotl_layersel.training.prepare import prepare_trainer

pytestmark = pytest.mark.trains

BLOCK = LayerselConfig(
    selection=SelectionConfig(method="first", num_layers=3),
    l1ra=L1RAConfig(rule="pressure", budget_unit="rank", update_ratio=0.2),
)
READ = [
    "trainer_state.json",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "adapter_model.safetensors",
    "layersel/plan.json",
    "layersel/state.safetensors",
    "layersel/ranks.csv",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    trainer = make_trainer(
        make_lora(make_small_llama()), folder, max_steps=10, save_strategy="steps", save_steps=2, save_total_limit=9
    )
    prepare_trainer(trainer, BLOCK)
    trainer.train()
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of a run with checkpoints 8 and 10."""
    for step in (8, 10):
        shutil.copytree(trained / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    return tmp_path


def find(run, block=BLOCK, explicit=None, automatic=True):
    return find_resumed_checkpoint(block, run, explicit, automatic)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_checkpoints_are_listed_from_the_newest_by_their_number(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x", "other-11", "checkpoint-"):
        (tmp_path / name).mkdir()
    assert list_checkpoints(tmp_path) == ["checkpoint-10", "checkpoint-9"]
    assert list_checkpoints(tmp_path / "nowhere") == []


def test_nothing_is_resumed_unless_it_is_asked_for(run):
    assert find(run, automatic=False) is None
    assert find(run / "empty") is None
    assert find(run) == str(run / "checkpoint-10")
    explicit = str(run / "checkpoint-8")
    assert find(run, explicit=explicit) == find(run, explicit=explicit, automatic=False) == explicit


@pytest.mark.parametrize(
    ("name", "damage"),
    # Half of a table is a table: what ranks.csv says is checked where it is read.
    [
        (name, damage)
        for name in READ
        for damage in ("removed", "emptied", "cut")
        if (name, damage) != (READ[-1], "cut")
    ],
)
def test_a_checkpoint_with_any_file_damaged_gives_way_to_the_one_before(run, caplog, name, damage):
    path = run / "checkpoint-10" / name
    {"removed": path.unlink, "emptied": lambda: path.write_bytes(b""), "cut": lambda: cut(path)}[damage]()
    with caplog.at_level(logging.WARNING, "axolotl.layersel"):
        assert find(run) == str(run / "checkpoint-8")
    (message,) = [record.getMessage() for record in caplog.records]
    assert f"{run / 'checkpoint-10'} is incomplete and is not resumed from: {name}" in message
    with pytest.raises(LayerselError, match=r"resume_from_checkpoint: .*checkpoint-10 cannot be resumed from: "):
        find(run, explicit=str(run / "checkpoint-10"))


@pytest.mark.parametrize(
    "content", ["[]", '{"epoch": 1}', '{"global_step": true}', '{"global_step": "4"}', "{", "\xff"]
)
def test_a_trainer_state_without_a_step_is_damaged(run, content):
    (run / "checkpoint-10" / "trainer_state.json").write_text(content)
    assert find_fault(run / "checkpoint-10", BLOCK, 0, 1).startswith("trainer_state.json is ")


def test_losses_that_are_no_numbers_are_no_damage(run):
    path = run / "checkpoint-10" / "trainer_state.json"
    state = TrainerState.load_from_json(str(path))
    state.log_history.append({"grad_norm": float("nan"), "step": 10})
    state.save_to_json(str(path))
    assert find_fault(run / "checkpoint-10", BLOCK, 0, 1) is None


@pytest.mark.parametrize("name", ["scaler.pt", "tokens_state.json"])
def test_what_not_every_run_has_must_be_whole_where_it_is_there(run, name):
    (run / "checkpoint-10" / name).write_bytes(b"{")
    assert find_fault(run / "checkpoint-10", BLOCK, 0, 1).startswith(f"{name} is truncated or damaged")


def test_a_block_needs_its_own_files_alone(run):
    for name in ("plan.json", "state.safetensors", "ranks.csv"):
        (run / "checkpoint-10" / "layersel" / name).unlink()
    alone = {"selection": LayerselConfig(selection=BLOCK.selection), "l1ra": LayerselConfig(l1ra=BLOCK.l1ra)}
    faults = {part: find_fault(run / "checkpoint-10", block, 0, 1) for part, block in alone.items()}
    assert faults == {
        "selection": "layersel/plan.json is missing, so it is not of a run with this `layersel` block",
        "l1ra": "layersel/state.safetensors is missing, so it is not of a run with this `layersel` block",
    }
    assert find_fault(run / "checkpoint-10", alone["selection"], 1, 1) is None, "the first process alone reads the plan"
    assert find_fault(run / "checkpoint-10", alone["l1ra"], 1, 1) == faults["l1ra"], "each one loads its weights"


def test_a_run_starts_anew_where_no_checkpoint_was_written_to_its_end(run):
    for step in (8, 10):
        cut(run / f"checkpoint-{step}" / "trainer_state.json")
    assert find(run) is None


def test_a_run_does_not_start_anew_over_checkpoints_that_were_written_to_their_end(run):
    for step in (8, 10):
        (run / f"checkpoint-{step}" / "optimizer.pt").unlink()
    with pytest.raises(LayerselError, match=r"auto_resume_from_checkpoints: .* and checkpoint-10 would be lost: optim"):
        find(run)


def test_the_message_says_why_a_file_is_not_there(run):
    checkpoint = run / "checkpoint-10"
    assert find_fault(checkpoint, BLOCK, 1, 2) == "rng_state_1.pth is missing"
    (checkpoint / "optimizer.pt").rename(checkpoint / "optimizer.bin")
    assert find_fault(checkpoint, BLOCK, 0, 1) == (
        "optimizer.pt is missing; the checkpoint was written by FSDP2 with FULL_STATE_DICT"
    )
    for name in ("optimizer.bin", "scheduler.pt", "rng_state.pth"):
        (checkpoint / name).unlink()
    assert find_fault(checkpoint, BLOCK, 0, 1) == (
        "optimizer.pt is missing, as is all state of the optimizer, which `save_only_model: true` leaves out"
    )
    assert find_fault(run / "checkpoint-99", BLOCK, 0, 1) == "there is no such folder"


@pytest.mark.parametrize(
    ("variables", "title"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "DeepSpeed"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}, "FSDP2"),
    ],
)
def test_a_checkpoint_of_several_processes_is_refused_on_one_where_the_engine_cannot_resume(
    run, monkeypatch, variables, title
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for checkpoint in run.iterdir():
        for rank in (0, 3):
            shutil.copy(checkpoint / "rng_state.pth", checkpoint / f"rng_state_{rank}.pth")
    with pytest.raises(LayerselError) as error:
        find(run)
    said = f"checkpoint-10 was written by 4 processes, and this run has 1. Under {title} a run resumes with as many"
    assert said in str(error.value)


def test_a_checkpoint_of_several_processes_is_resumed_from_on_one_with_a_warning(run, caplog):
    (run / "checkpoint-10" / "rng_state.pth").rename(run / "checkpoint-10" / "rng_state_0.pth")
    with caplog.at_level(logging.WARNING, "axolotl.layersel"):
        assert find(run) == str(run / "checkpoint-10")
    (message,) = [record.getMessage() for record in caplog.records]
    assert "was written by 2 processes, and this run has 1" in message


@pytest.mark.parametrize(
    ("hosts", "lacking", "held", "said"),
    [
        (
            "aabb",
            ["", "", "xy", "x"],
            ["xy", "xy", "", ""],
            "processes 2 and 3 on b cannot read x and y, which process 0",
        ),
        (
            "abc",
            ["", "", "xy"],
            ["x", "y", ""],
            "process 2 on c cannot read x, which process 0 on a has; process 2 on c ",
        ),
        # Two containers of one name.
        ("aa", ["y", "x"], ["x", "y"], "process 0 on a cannot read y, which process 1 on a has; process 1 on a cannot"),
    ],
)
def test_the_message_for_nodes_that_lack_files_names_each_node_and_who_has_them(hosts, lacking, held, said):
    views = [View(host, dict.fromkeys(names, ""), None) for host, names in zip(hosts, lacking)]
    message = describe_copies(Path("run"), views, [list(names) for names in held])
    assert message.startswith(f"resume_from_checkpoint: of run {said}")
