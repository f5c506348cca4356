"""Trials of training with a plain Trainer: what they do, and that they leave no trace."""

import copy
import random

import numpy
import pytest
import torch
from datasets import Dataset
from helpers.models import make_lora, make_rows, make_small_llama, make_trainer
from transformers import TrainerCallback

from axolotl_layersel.lora.run import Run
from axolotl_layersel.selection.methods.flexora.trial_training import compress_steps, run_trial

pytestmark = pytest.mark.trains


class Watcher(TrainerCallback):
    def __init__(self):
        self.learning_rates, self.events = [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.learning_rates.append(kwargs["optimizer"].param_groups[0]["lr"])

    def on_log(self, args, state, control, **kwargs):
        self.events.append("log")

    def on_save(self, args, state, control, **kwargs):
        self.events.append("save")

    def on_evaluate(self, args, state, control, **kwargs):
        self.events.append("evaluate")


class Stranger(TrainerCallback):
    """One of the user's own callbacks."""

    def __init__(self):
        self.called = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.called += 1

    on_train_begin = on_step_end


def make(folder, **arguments):
    model = make_lora(make_small_llama(), lora_dropout=0.1)
    rows = Dataset.from_list(make_rows(40))
    trainer = make_trainer(model, folder, **{"save_steps": 1, "eval_steps": 1, **arguments})
    trainer.args.eval_strategy = arguments.get("eval_strategy", "steps")
    trainer.train_dataset = rows
    trainer.eval_dataset = rows.select(range(4))
    return trainer, model


def test_a_trial_trains_and_leaves_no_trace(tmp_path):
    trainer, model = make(tmp_path)
    stranger = Stranger()
    trainer.add_callback(stranger)
    attributes = dict(vars(trainer))
    arguments = copy.deepcopy(trainer.args.to_dict())
    parameters = {name: (p, p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    streams = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()
    weights_during = []

    class Spy(Watcher):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            weights_during.append(
                model.get_base_model().model.layers[0].self_attn.q_proj.lora_B["default"].weight.norm()
            )

    spy = Spy()
    run_trial(Run.of(trainer), 5, trainer.train_dataset.select(range(30)), spy, seed=1)

    assert len(spy.learning_rates) == 5 and spy.events == ["log"], "the summary that the Trainer ends with"
    assert weights_during[-1] > 0
    assert stranger.called == 0
    assert vars(trainer) == attributes and trainer.args.to_dict() == arguments
    for name, parameter in model.named_parameters():
        same, value, required = parameters[name]
        assert parameter is same and torch.equal(parameter, value) and parameter.requires_grad == required
        assert parameter.grad is None
    now = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()
    assert now[:2] == streams[:2] and torch.equal(now[2], streams[2])
    assert list(tmp_path.iterdir()) == []
    assert not trainer.state.log_history


def test_the_run_after_a_trial_is_the_run_without_it(tmp_path):
    losses = []
    for trial in (True, False):
        torch.manual_seed(0)
        trainer, _ = make(tmp_path / str(trial), save_strategy="no", eval_strategy="no", logging_steps=1)
        torch.manual_seed(5)
        if trial:
            run_trial(Run.of(trainer), 3, trainer.train_dataset, Watcher(), seed=9)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_the_run_after_a_trial_computes_in_its_precision(tmp_path):
    trainer, model = make(tmp_path, save_strategy="no", eval_strategy="no", bf16=True)
    types = set()
    module = model.get_base_model().model.layers[0].self_attn.q_proj.lora_A["default"]
    module.register_forward_hook(lambda module, args, output: types.add(output.dtype))
    run_trial(Run.of(trainer), 2, trainer.train_dataset, Watcher(), seed=9)
    types.clear()
    trainer.train()
    assert types == {torch.bfloat16}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # 8 of 40 steps warm up: 2 of 10.
        ({"warmup_steps": 8, "lr_scheduler_type": "linear"}, [0.5, 1, 7 / 8, 6 / 8]),
        ({"warmup_steps": 0.2, "lr_scheduler_type": "linear"}, [0.5, 1, 7 / 8, 6 / 8]),
        ({"lr_scheduler_type": "constant"}, [1, 1, 1, 1]),
        (
            {
                "lr_scheduler_type": "warmup_stable_decay",
                "warmup_steps": 8,
                "lr_scheduler_kwargs": {"num_decay_steps": 28, "num_stable_steps": 4, "decay_type": "linear"},
            },
            [0.5, 1, 1, 6 / 7],
        ),
    ],
)
def test_the_schedule_of_learning_rates_is_compressed(tmp_path, schedule, expected):
    trainer, _ = make(tmp_path, max_steps=40, learning_rate=0.01, **schedule)
    watcher = Watcher()
    run_trial(Run.of(trainer), 10, trainer.train_dataset, watcher, seed=1)
    assert len(watcher.learning_rates) == 10
    # Seen after the scheduler moved on: the rate of the second to the fifth step.
    assert [rate / 0.01 for rate in watcher.learning_rates[:4]] == pytest.approx(expected, abs=1e-6)


def test_steps_keep_their_share_and_never_vanish():
    assert compress_steps(100, 20, 1000) == 2
    assert compress_steps(1, 20, 1000) == 1
    assert compress_steps(20, 400, 200) == 40


def test_a_callback_can_end_a_trial(tmp_path):
    class Impatient(Watcher):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            control.should_training_stop = state.global_step == 2

    trainer, _ = make(tmp_path)
    impatient = Impatient()
    run_trial(Run.of(trainer), 5, trainer.train_dataset, impatient, seed=1)
    assert len(impatient.learning_rates) == 2
    assert not trainer.control.should_training_stop


def test_a_trial_that_fails_gives_the_trainer_back(tmp_path):
    class Broken(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("broken")

    trainer, _ = make(tmp_path)
    attributes, state = dict(vars(trainer)), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="broken"):
        run_trial(Run.of(trainer), 5, trainer.train_dataset, Broken(), seed=1)
    assert vars(trainer) == attributes
    assert torch.equal(torch.get_rng_state(), state)
