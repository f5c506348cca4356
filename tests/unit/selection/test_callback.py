"""What a run needs while it trains, with a plain Trainer."""

import hashlib
import os
import signal
from pathlib import Path

import pytest
import torch
from helpers.models import make_lora, make_small_llama, make_trainer
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy
from typer.testing import CliRunner

from axolotl_layersel.cli.main import app
from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.l1ra import L1RAConfig
from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.config.selection import SelectionConfig
from axolotl_layersel.engines.signals import WATCH
from axolotl_layersel.training.prepare import prepare_trainer

BLOCKS = {
    "selection": LayerselConfig(selection=SelectionConfig(method="first", num_layers=3)),
    "l1ra": LayerselConfig(l1ra=L1RAConfig(update_ratio=0.2)),
}


def train(block: LayerselConfig, folder: Path, resume_from: str | None = None, **arguments):
    """Train for 10 steps, an epoch being 6, at a learning rate that does not end at 0, and save at the end."""
    values = {"max_steps": 10, "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 5}
    trainer = make_trainer(make_lora(make_small_llama()), folder, **{**values, **arguments})
    prepare_trainer(trainer, block, resume_from)
    trainer.train(resume_from_checkpoint=resume_from)
    trainer.save_model(str(folder))
    return trainer


def read_files(folder: Path) -> dict[str, str]:
    """Return a digest of every file below ``folder``."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.trains
@pytest.mark.parametrize("block", BLOCKS)
def test_a_run_that_has_ended_leaves_its_files_as_they_are_when_it_is_started_again(tmp_path, block):
    train(BLOCKS[block], tmp_path)
    ended = read_files(tmp_path)
    again = train(BLOCKS[block], tmp_path, str(tmp_path / "checkpoint-10"))
    assert again.state.global_step == 10
    assert read_files(tmp_path) == ended
    assert len(ended) > 20


@pytest.mark.trains
def test_a_run_that_has_ended_goes_on_where_it_is_given_more_steps(tmp_path):
    train(BLOCKS["selection"], tmp_path)
    again = train(BLOCKS["selection"], tmp_path, str(tmp_path / "checkpoint-10"), max_steps=12)
    assert again.state.global_step == 12
    assert (tmp_path / "checkpoint-12").exists()


def show(folder: Path) -> str:
    result = CliRunner().invoke(app, ["show", str(folder)])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.trains
def test_a_run_shows_nothing_of_an_earlier_one_in_its_folder(tmp_path):
    train(BLOCKS["l1ra"], tmp_path)
    assert "ranks after l1ra" in show(tmp_path)
    train(BLOCKS["selection"], tmp_path)
    assert "ranks after l1ra" not in show(tmp_path) and "method first" in show(tmp_path)
    given = SelectionConfig(method="first", plan=str(tmp_path / "layersel" / "plan.json"))
    train(LayerselConfig(selection=given), tmp_path)
    assert "method first" in show(tmp_path), "the plan that it was given lies where its own does"
    (tmp_path / "layersel" / "gates.csv").write_text("of a search")
    train(BLOCKS["l1ra"], tmp_path)
    ranks = ["ranks.csv", "ranks.png", "ranks.svg"]
    assert sorted(path.name for path in (tmp_path / "layersel").iterdir()) == ranks
    assert "method first" not in show(tmp_path)


@pytest.mark.trains
def test_a_run_that_does_not_come_to_train_leaves_an_earlier_ones_files(tmp_path):
    train(BLOCKS["l1ra"], tmp_path)
    before = read_files(tmp_path)
    with pytest.raises(LayerselError, match="out of range"):
        train(LayerselConfig(selection=SelectionConfig(method="explicit", layers=[99])), tmp_path)
    assert read_files(tmp_path) == before


class Terminating(TrainerCallback):
    """Sends this process SIGTERM at the end of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def signals_given_back():
    yield
    WATCH.restore()


# An epoch is 6 steps. Of the last step of an epoch, and of the run, what is due at the epoch's end is a part.
@pytest.mark.trains
@pytest.mark.parametrize(
    ("strategy", "step"), [("steps", 3), ("steps", 4), ("epoch", 4), ("epoch", 6), ("epoch", 12), ("steps", 12)]
)
def test_a_terminated_run_that_is_started_again_logs_and_trains_what_it_would_have(
    tmp_path, signals_given_back, strategy, step
):
    def run(folder: Path, callbacks: list, resume_from: str | None = None):
        model = make_lora(make_small_llama(), lora_dropout=0.1)
        values = {"max_steps": 12, "logging_steps": 1, "eval_steps": 4, "save_steps": 4, "save_strategy": strategy}
        best = {"metric_for_best_model": "eval_loss", "greater_is_better": False}
        trainer = make_trainer(model, folder, **values, **best)
        trainer.args.eval_strategy, trainer.args.load_best_model_at_end = IntervalStrategy(strategy), True
        trainer.eval_dataset = trainer.train_dataset.select(range(8))
        for callback in callbacks:
            trainer.add_callback(callback)
        prepare_trainer(trainer, BLOCKS["selection"], resume_from)
        trainer.train(resume_from_checkpoint=resume_from)
        history = trainer.state.log_history
        times = ("time", "sec", "flos", "train_loss")
        logs = [{k: v for k, v in entry.items() if not any(word in k for word in times)} for entry in history]
        return trainer, [entry for entry in logs if len(entry) > 2], model

    whole, logs, model = run(tmp_path / "whole", [])
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "ended", [Terminating(step)])
    assert stopped.value.code == 143
    checkpoints = [path.name for path in (tmp_path / "ended").glob("checkpoint-*")]
    assert max(int(name.split("-")[1]) for name in checkpoints) == step
    resumed, logs_again, model_again = run(tmp_path / "ended", [], str(tmp_path / "ended" / f"checkpoint-{step}"))
    assert logs_again == logs
    assert resumed.state.best_global_step == whole.state.best_global_step
    assert Path(resumed.state.best_model_checkpoint).name == Path(whole.state.best_model_checkpoint).name
    pairs = zip(model.named_parameters(), model_again.named_parameters(), strict=True)
    assert all(torch.equal(one, two) for (_, one), (_, two) in pairs)


@pytest.mark.trains
def test_a_run_resumes_without_being_prepared_for_it_only_by_the_trainer_that_wrote_the_checkpoint(tmp_path):
    whole = train(BLOCKS["selection"], tmp_path)
    checkpoint = str(tmp_path / "checkpoint-5")
    losses = whole.state.log_history
    other = make_trainer(make_lora(make_small_llama()), tmp_path / "other", max_steps=10)
    prepare_trainer(other, LayerselConfig(selection=SelectionConfig(method="last", num_layers=3)))
    with pytest.raises(LayerselError, match="resume_from_checkpoint: the trainer resumes, but was prepared without"):
        other.train(resume_from_checkpoint=checkpoint)
    whole.train(resume_from_checkpoint=checkpoint)
    assert [entry.get("loss") for entry in whole.state.log_history] == [entry.get("loss") for entry in losses]


class TerminatingEvaluation(TrainerCallback):
    """Sends this process SIGTERM at the first batch of an evaluation."""

    def on_prediction_step(self, args, state, control, **kwargs) -> None:
        if not WATCH.received:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.trains
def test_a_run_that_is_terminated_before_its_first_step_does_not_promise_to_go_on(tmp_path, signals_given_back, caplog):
    trainer = make_trainer(make_lora(make_small_llama()), tmp_path, eval_on_start=True, per_device_eval_batch_size=1)
    trainer.eval_dataset = trainer.train_dataset
    trainer.add_callback(TerminatingEvaluation())
    prepare_trainer(trainer, BLOCKS["selection"])
    with pytest.raises(SystemExit) as stopped:
        trainer.train()
    assert stopped.value.code == 143
    assert not list(tmp_path.glob("checkpoint-*"))
    message = "layersel: SIGTERM: ended before the first step; nothing was trained, and the same command begins anew"
    assert caplog.messages[-1] == message


class FailingCallback(TrainerCallback):
    """Fails in the first step, as a step without enough memory does."""

    def on_step_begin(self, args, state, control, **_):
        raise MemoryError("no memory is left")


@pytest.mark.trains
def test_signals_work_as_before_once_training_has_failed(tmp_path):
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    trainer = make_trainer(make_lora(make_small_llama()), tmp_path)
    prepare_trainer(trainer, BLOCKS["selection"])
    trainer.add_callback(FailingCallback())
    with pytest.raises(MemoryError):
        trainer.train()
    after = {signum: signal.getsignal(signum) for signum in before}
    WATCH.restore()
    assert after == before, "the process of a notebook goes on, and must end by them"
