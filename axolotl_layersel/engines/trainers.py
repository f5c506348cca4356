"""All that relies on undocumented behaviour of the Trainers of transformers, Axolotl and TRL.

Each fact holds in the given version (``tests/unit/engines/test_trainers.py`` fails when one of them changes):

* transformers 5.16.1, ``Trainer.save_model``: is called for every checkpoint, before any push to a hub. It calls
  ``_save`` if ``should_save`` is true; 5.24.0 calls it on every rank, and axolotl 0.19.0's writes on every rank.
* transformers 5.16.1, ``PreTrainedModel.enable_input_require_grads``: registers forward hooks named
  ``make_inputs_require_grads`` on the embeddings, more than once under gradient checkpointing.
* transformers 5.16.1 and 5.24.0, ``Trainer._load_from_checkpoint`` and ``_load_best_model``: on one process and DDP
  restore LoRA weights only through the model's own ``load_adapter``.
* transformers 5.16.1, ``Trainer._load_best_model``: reads the best checkpoint from each rank's own disk. It is called
  if ``best_model_checkpoint`` is set, which depends on whether the rank sees that checkpoint's folder.
* transformers 5.16.1, ``Trainer._save``: writes the adapter by the model's own ``save_pretrained``. After training,
  axolotl 0.19.0 does so too on one process, DDP and ZeRO-1/2; ZeRO-3 calls ``save_model``, and FSDP2 the function
  ``save_fsdp2_lora_adapter``, which also writes checkpoints over a quantised base. Both look it up in its module.
* transformers 5.16.1 and axolotl 0.19.0: ``OPTIONAL_STATE_FILES`` are read if they exist; ``trainer_state.json`` is
  written last.
* transformers 5.16.1, ``Trainer._inner_training_loop``: checks ``should_training_stop`` only after each ``_run_epoch``,
  which makes at least one step; before it only ``eval_on_start`` saves or evaluates.
* transformers 5.16.1, ``Trainer._save_checkpoint``: stores ``state()`` of every ``ExportableState`` callback in
  ``stateful_callbacks``, for several of a class in a list that grows with every checkpoint. ``_load_callback_state``
  restores them only on request, as new callbacks at the end of the list.
* transformers 5.16.1, ``Trainer._save_checkpoint``: writes ``trainer_state.json`` after ``save_model`` has returned. It
  and ``_load_callback_state`` keep entries of ``stateful_callbacks`` that belong to no callback.
* transformers 5.16.1: a Trainer writes the fields of ``TrainerState`` with the types in ``STATE_TYPES``.
* transformers 5.16.1, ``Trainer.training_step``: ends with the backward pass of a micro-batch, before gradients are
  clipped. ``sync_gradients`` is true in the last one of an optimizer step.
* transformers 5.16.1, ``Trainer.set_initial_training_values``: its last value is the number of optimizer steps.
* accelerate 1.13.0, ``Accelerator.prepare``: returns a loader whose ``base_dataloader`` iterates over batches, and
  reads ``worker_init_fn`` when an iteration begins.
* transformers 5.16.1, ``Trainer._save_checkpoint``: writes a whole checkpoint of the last step. ``trainer_state.json``
  has the state of ``TrainerControl``, in which ``should_evaluate`` is true until the step was evaluated. ``_evaluate``,
  ``_determine_best_metric`` and ``_load_rng_state`` make up for the evaluation.
* transformers 5.16.1, ``Trainer.train``: can be called again after the trainer's attributes were restored. accelerate
  1.13.0 keeps mixed precision in the model's ``forward`` and ``_original_forward``, and 1.15.0 does not prepare a model
  with ``_is_accelerate_prepared`` again. axolotl 0.19.0 and trl 1.9.0 collect metrics in ``_stored_metrics`` and
  ``_metrics``. axolotl's arguments ``STEP_COUNTS`` count optimizer steps of its schedule.
* transformers 5.16.1, ``Trainer._prepare_inputs``: moves a micro-batch to the device. axolotl 0.19.0,
  ``activation_offload_context``: if it exists, the forward passes of training run inside.
* transformers 5.16.1, ``PreTrainedModel.gradient_checkpointing_enable``: modules that checkpoint have
  ``gradient_checkpointing`` and ``_gradient_checkpointing_func``, a partial call of ``checkpoint``, which axolotl
  0.19.0 may replace by its own functions.
* transformers 5.16.1: ``num_kv_shared_layers`` of the language model's configuration counts layers that share keys and
  values. They exchange them in a dictionary, whose tensors PyTorch's reentrant checkpointing detaches.
* trl 1.9.0, ``disable_gradient_checkpointing``: switches checkpointing off and, by the model's own
  ``gradient_checkpointing_enable``, on again, around generation and around the reference model.
* trl 1.9.0: trainers that generate their training data have ``_generate_and_score_completions``; their argument
  ``use_vllm`` says whether vLLM generates.
* axolotl 0.19.0, ``ModelLoader._load_adapters``: trainers in ``CONFIG_ONLY_TRAINERS`` create the adapter themselves.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.engines.collectives import gather_from_all, get_rank, is_distributed

LOG = logging.getLogger("axolotl.layersel")

FORWARD_ATTRIBUTES = {"forward", "_original_forward", "_is_accelerate_prepared"}
METRIC_ATTRIBUTES = {"_stored_metrics", "_metrics"}
STEP_COUNTS = ("jagged_restart_steps", "jagged_restart_warmup_steps", "jagged_restart_anneal_steps")
# Only written by fp16 runs (loss scaler) and by Axolotl's token counter.
OPTIONAL_STATE_FILES = ("scaler.pt", "tokens_state.json")
CONFIG_ONLY_TRAINERS = ("dpo", "ipo", "kto")
# This package's entry in TrainerState.stateful_callbacks.
NOTE = "axolotl_layersel"
COUNTS = ("global_step", "max_steps", "train_batch_size")  # required by every Trainer
NUMBER, NOTHING = (int, float), type(None)
# The types of TrainerState's fields in a file; some are None until they are set.
STATE_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(COUNTS, (int,)),
    **dict.fromkeys(("epoch", "num_train_epochs", "num_input_tokens_seen", "total_flos"), NUMBER),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), (*NUMBER, NOTHING)),
    **dict.fromkeys(("is_local_process_zero", "is_world_process_zero", "is_hyper_param_search"), (bool,)),
    "best_metric": (*NUMBER, NOTHING),
    "best_global_step": (int, NOTHING),
    **dict.fromkeys(("best_model_checkpoint", "trial_name"), (str, NOTHING)),
    "trial_params": (dict, NOTHING),
    "log_history": (list, NOTHING),
    "stateful_callbacks": (dict, NOTHING),
}


def unwrap_model(trainer: Trainer) -> nn.Module:
    """Return the trainer's model without the wrappers of an engine or a compiler."""
    return trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)


def get_model(trainer: Trainer) -> nn.Module:
    """Return the trainer's model without an engine around it."""
    assert trainer.model is not None, "every trainer has a model once it is created"
    return trainer.model


def compute_loss(trainer: Trainer, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
    """Return the loss of a prepared micro-batch, with its graph; the engine does not reduce its gradients."""
    loss = trainer.compute_loss(get_model(trainer), inputs, num_items_in_batch=num_items_in_batch)
    assert isinstance(loss, torch.Tensor), "outputs are returned only on request"
    return loss


def count_optimizer_steps(trainer: Trainer) -> int:
    """Return the planned number of optimizer steps of a run that has not begun."""
    if trainer.args.max_steps > 0:  # always set by Axolotl
        return trainer.args.max_steps
    with torch.random.fork_rng():
        return trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]


def replacing(trainer: Trainer, name: str) -> Callable[[Callable], Callable]:
    """Return a decorator that replaces a method of one trainer by a function, which gets the method first."""

    def replace(function: Callable) -> Callable:
        upstream = getattr(trainer, name)

        @functools.wraps(upstream)
        def method(*args: Any, **kwargs: Any) -> Any:
            return function(upstream, *args, **kwargs)

        setattr(trainer, name, method)
        return function

    return replace


def respect_stop_before_first_step(trainer: Trainer) -> None:
    """Make no step if a callback stops training at ``on_train_begin``."""

    @replacing(trainer, "_run_epoch")
    def run_epoch(upstream: Callable, *args: Any, **kwargs: Any) -> None:
        if not trainer.control.should_training_stop:
            upstream(*args, **kwargs)


def call_before_training(trainer: Trainer, function: Callable[[], None]) -> None:
    """Call ``function`` at the start of every ``trainer.train``, before the engine is built."""

    @replacing(trainer, "train")
    def train(upstream: Callable, *args: Any, **kwargs: Any) -> Any:
        function()
        return upstream(*args, **kwargs)


def call_if_training_fails(trainer: Trainer, function: Callable[[], None]) -> None:
    """Call ``function`` before an exception leaves ``trainer.train``, but not if a signal ends training."""

    @replacing(trainer, "train")
    def train(upstream: Callable, *args: Any, **kwargs: Any) -> Any:
        try:
            return upstream(*args, **kwargs)
        except Exception:
            function()
            raise


def call_after_backward(trainer: Trainer, function: Callable[[], None]) -> None:
    """Call ``function`` once per optimizer step, when gradients are averaged but not clipped; not for DeepSpeed."""

    @replacing(trainer, "training_step")
    def training_step(upstream: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = upstream(*args, **kwargs)
        if trainer.accelerator.sync_gradients:
            function()
        return loss


def restore_callbacks(callbacks: list[TrainerCallback], state: TrainerState) -> None:
    """Restore the counts of callbacks from the ``state`` of a checkpoint, in place.

    Unlike the Trainer's own way it keeps the objects, their order, and their settings.
    """
    stored: Any = state.stateful_callbacks
    for kind in {type(callback) for callback in callbacks if isinstance(callback, ExportableState)}:
        same = [callback for callback in callbacks if type(callback) is kind]
        # A callback that is new in this run needs an entry, or the next checkpoint could not be written.
        saved = stored.setdefault(kind.__name__, [callback.state() for callback in same])
        saved = saved if isinstance(saved, list) else [saved]
        for callback, values in zip(same, saved[-len(same) :]):
            for name, value in values["attributes"].items():
                setattr(callback, name, value)


def note_in_state(trainer: Trainer, note: str) -> None:
    """Store ``note`` in the trainer's state, which the next checkpoint contains."""
    stored: Any = trainer.state.stateful_callbacks
    stored[NOTE] = {"args": {}, "attributes": {"note": note}}


def find_note(state: Mapping[str, Any]) -> str | None:
    """Return the note in the content of a valid ``trainer_state.json``, None if there is none."""
    entry = (state.get("stateful_callbacks") or {}).get(NOTE)
    return entry["attributes"].get("note") if isinstance(entry, dict) else None


def find_state_fault(state: Any) -> str | None:
    """Return why no Trainer can have written the content of a ``trainer_state.json``, or None."""
    if not isinstance(state, dict):
        return f"it is {state!r:.40}"
    for name, kinds in STATE_TYPES.items():
        value = state.get(name)
        # bool is a subclass of int.
        wrong = not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)
        if wrong and (name in state or name in COUNTS):
            return f"its {name} is {value!r:.40}"
    low = next((name for name in COUNTS if state[name] < 1), None)
    if low:
        return f"its {low} is {state[low]}"
    if not all(isinstance(entry, dict) for entry in state.get("log_history") or []):
        return "its log_history contains something other than mappings"
    return find_callback_fault(state.get("stateful_callbacks") or {})


def find_callback_fault(stored: dict[str, Any]) -> str | None:
    """Return why these cannot be the states of callbacks, or None."""
    for name, entry in stored.items():
        for state in entry if isinstance(entry, list) else [entry]:
            if not isinstance(state, dict) or not all(isinstance(state.get(k), dict) for k in ("args", "attributes")):
                return f"its {name} in stateful_callbacks is not a callback's state"
            count = state["attributes"].get("early_stopping_patience_counter", 0)
            if type(count) is not int:
                return f"its early_stopping_patience_counter is {count!r:.40}"
    control = stored.get("TrainerControl", {"args": {}})
    if isinstance(control, list) or not all(isinstance(value, bool) for value in control["args"].values()):
        return "its TrainerControl in stateful_callbacks contains something other than true and false"
    return None


def initialize_loaders(trainer: Trainer, initialize: Callable[[int], None]) -> None:
    """Run ``initialize`` first in every data loading process of ``trainer``, with that process's number."""

    def get_dataloader(upstream: Callable, *args: Any, **kwargs: Any) -> Any:
        prepared = upstream(*args, **kwargs)
        loader = getattr(prepared, "base_dataloader", prepared)
        own = getattr(loader, "worker_init_fn", None)
        # A loader with persistent workers is returned repeatedly.
        if getattr(own, "func", None) is not initialize_both:
            loader.worker_init_fn = functools.partial(initialize_both, initialize, own)
        return prepared

    for name in ("get_train_dataloader", "get_eval_dataloader"):
        replacing(trainer, name)(get_dataloader)


def initialize_both(first: Callable[[int], None], then: Callable[[int], None] | None, worker: int) -> None:
    first(worker)
    if then is not None:
        then(worker)


def offload_activations(trainer: Trainer) -> contextlib.AbstractContextManager:
    """Return the context in which the trainer's forward passes offload activations, if it has one."""
    return getattr(trainer, "activation_offload_context", contextlib.nullcontext())


def prepare_inputs(trainer: Trainer, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return a micro-batch as the trainer's own steps prepare it, on its device."""
    return trainer._prepare_inputs(inputs)


def remove_embedding_hooks(model: nn.Module) -> None:
    """Remove transformers' hooks that make the embeddings' output require a gradient."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", "") in ("make_inputs_require_grads", "make_inputs_require_grad"):
                del module._forward_hooks[key]


def needs_differentiable_inputs(model: nn.Module) -> bool:
    """Return whether a module's checkpointing computes gradients only if its inputs require them.

    PyTorch's checkpointing with ``use_reentrant=False`` does not need that.
    """

    def finds_weights(function: Any) -> bool:
        original, options = getattr(function, "func", None), getattr(function, "keywords", {})
        return original is torch.utils.checkpoint.checkpoint and options.get("use_reentrant") is False

    modules = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    return not all(finds_weights(getattr(module, "_gradient_checkpointing_func", None)) for module in modules)


def report_lost_gradients(trainer: Trainer, base: PreTrainedModel) -> None:
    """Log a warning if reentrant checkpointing loses the gradients of keys and values that layers share."""
    options: Any = trainer.args.gradient_checkpointing_kwargs or {}  # a dictionary, also if the user gave text
    reentrant = trainer.args.gradient_checkpointing and options.get("use_reentrant")
    sharing = getattr(base.config.get_text_config(), "num_kv_shared_layers", None)
    if reentrant and sharing and get_rank() == 0:
        LOG.warning(
            "layersel: gradient_checkpointing_kwargs: use_reentrant: true loses gradients in %s, whose %d highest "
            "layers read keys and values of lower ones: LoRA in these trains as if nothing read them, with or without "
            "layersel. Set `use_reentrant: false`.",
            type(base).__name__,
            sharing,
        )


def save_checkpoint(trainer: Trainer) -> None:
    """Write a whole checkpoint of the last step; every rank must call this."""
    trainer._save_checkpoint(get_model(trainer), None)


def let_one_process_write(trainer: Trainer) -> None:
    """Restrict ``_save`` to ranks on which ``should_save`` is true."""

    @replacing(trainer, "_save")
    def save(upstream: Callable, *args: Any, **kwargs: Any) -> None:
        if trainer.args.should_save:
            upstream(*args, **kwargs)


def restore_best_model_by(
    trainer: Trainer,
    is_complete: Callable[[Path], bool],
    restore: Callable[[str], None],
    check: Callable[[str], None],
) -> None:
    """Load the best checkpoint by ``restore`` if some ranks do not have it on their disks.

    Upstream would leave these ranks with their last weights, and under DeepSpeed and FSDP2 the others would hang.

    Args:
        trainer: a trainer that may load the best model at the end.
        is_complete: whether this rank sees all files of a checkpoint that upstream reads.
        restore: loads a checkpoint that only rank 0 needs to have; every rank calls it.
        check: raises an error on every rank if a checkpoint must not be loaded; every rank calls it.
    """

    @replacing(trainer, "_load_best_model")
    def load_best_model(upstream: Callable) -> None:
        best = trainer.state.best_model_checkpoint
        assert best is not None, "upstream calls this only if there is one"
        check(best)
        if not is_distributed() or all(gather_from_all(is_complete(Path(best)))):
            upstream()
        else:
            restore(best)


def is_evaluation_due(trainer: Trainer) -> bool:
    """Return whether the run resumes from a checkpoint whose step was not evaluated."""
    stored: Any = trainer.state.stateful_callbacks
    return bool(stored.get("TrainerControl", {}).get("args", {}).get("should_evaluate"))


def evaluate(trainer: Trainer, checkpoint: str) -> None:
    """Make up for the evaluation of ``checkpoint``, from which training resumes; every rank must call this."""
    trainer.control.should_evaluate = True
    trainer._determine_best_metric(trainer._evaluate(None, None), None)
    # Upstream restores random streams at the first batch; a checkpoint that is written before needs them too.
    trainer._load_rng_state(checkpoint)


def check_no_optimizer(trainer: Trainer) -> None:
    """Raise LayerselError if the trainer already has an optimizer, whose weights would be replaced."""
    if trainer.optimizer is not None:
        raise LayerselError("optimizer: it was made before the trainer was prepared, so it holds other LoRA weights.")


def scales_loss(trainer: Trainer) -> bool:
    return bool(trainer.args.fp16 or trainer.accelerator.mixed_precision == "fp16")


def generates(trainer: Trainer) -> bool:
    return hasattr(trainer, "_generate_and_score_completions")


def uses_vllm(trainer: Trainer) -> bool:
    """Return whether vLLM generates the trainer's training data."""
    return bool(getattr(trainer.args, "use_vllm", False))
