"""Train for some steps with the run's own settings, and restore everything afterwards."""

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import (
    DefaultFlowCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from axolotl_layersel.common.randomness import keep_random_state
from axolotl_layersel.engines import trainers
from axolotl_layersel.engines.signals import Interrupted, SharedSignal
from axolotl_layersel.lora.run import Run


def run_trial(run: Run, steps: int, train_dataset: Any, callback: TrainerCallback, seed: int) -> None:
    """Train the parameters that require a gradient for ``steps`` optimizer steps, then undo it, on every process.

    The run's own engine, optimizer, batch size, packing and precision are used, and its schedule of learning rates,
    compressed to ``steps``. Nothing is saved, evaluated or logged, and ``callback`` is the only callback. Afterwards
    weights, random state and trainer are as before; ZeRO-3 and FSDP2 keep the weights in shards.

    Args:
        run: its trainer has not trained.
        steps: optimizer steps.
        train_dataset: the training rows.
        callback: can stop the trial.
        seed: draws dropout and the order of rows.

    Raises:
        Interrupted: on every process, after the step in which one of them received a signal.
    """
    trainer, engine, model = run.trainer, run.engine, run.model
    weights = engine.copy_trained(model)
    planned = trainers.count_optimizer_steps(trainer)
    with keep_random_state(), engine.keep_config(), keep_trainer(trainer, model):
        set_seed(seed)
        trainer.args = compress_arguments(trainer.args, steps, planned)
        trainer.train_dataset = train_dataset
        trainer.control = TrainerControl()
        callbacks = [DefaultFlowCallback(), callback, StopCallback(run.device)]
        trainer.callback_handler = CallbackHandler(callbacks, trainer.model, trainer.processing_class, None, None)
        trainer.train()
        engine.restore_trained(model, weights)
        engine.release(model)


def compress_arguments(arguments: TrainingArguments, steps: int, planned: int) -> TrainingArguments:
    """Return a copy for a trial of ``steps`` of the run's ``planned`` optimizer steps.

    Warmup, and all step counts of the schedule, keep their share of the run.
    """
    scale = functools.partial(compress_steps, steps=steps, planned=planned)
    arguments = copy.copy(arguments)
    warmup = arguments.get_warmup_steps(planned)
    # From 1 it is a number of steps, below it a share.
    arguments.warmup_steps = scale(warmup) if warmup else 0
    schedule: Any = arguments.lr_scheduler_kwargs or {}  # text was parsed
    arguments.lr_scheduler_kwargs = {
        key: scale(value) if key.endswith("_steps") and isinstance(value, int) else value
        for key, value in schedule.items()
    }
    for name in trainers.STEP_COUNTS:
        if getattr(arguments, name, None):
            setattr(arguments, name, scale(getattr(arguments, name)))
    arguments.max_steps = steps
    arguments.eval_strategy = arguments.logging_strategy = IntervalStrategy.NO
    arguments.save_strategy = SaveStrategy.NO
    arguments.eval_on_start = arguments.load_best_model_at_end = arguments.push_to_hub = False
    return arguments


def compress_steps(count: int, steps: int, planned: int) -> int:
    """Return ``count`` of ``planned`` steps as a number of ``steps``, rounded, at least 1."""
    return max(1, round(count * steps / planned))


@contextlib.contextmanager
def keep_trainer(trainer: Trainer, model: nn.Module) -> Iterator[None]:
    """Restore the trainer's attributes and the model's ``forward`` at the end of the block."""
    attributes = dict(vars(trainer))
    forward = {name: value for name, value in vars(model).items() if name in trainers.FORWARD_ATTRIBUTES}
    for name in trainers.METRIC_ATTRIBUTES & attributes.keys():
        setattr(trainer, name, copy.deepcopy(attributes[name]))  # filled in place
    try:
        yield
    finally:
        vars(trainer).clear()
        vars(trainer).update(attributes)
        for name in trainers.FORWARD_ATTRIBUTES & vars(model).keys():
            delattr(model, name)
        vars(model).update(forward)


class StopCallback(TrainerCallback):
    """Raises Interrupted once any process has received a signal."""

    def __init__(self, device: torch.device) -> None:
        self.shared = SharedSignal(device)

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.raise_for(self.shared.look())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.raise_for(self.shared.settle())

    def raise_for(self, signum: int) -> None:
        """Raise Interrupted for a signal, and nothing for 0."""
        if signum:
            raise Interrupted(signum)
