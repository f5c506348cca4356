"""The private facts of transformers' Trainer, and of Axolotl's and TRL's.

Each is relied on beyond documented interfaces, in the version that it was seen in
(``tests/unit/engines/test_trainers.py`` fails when one of them changes):

* transformers 5.16.1, ``Trainer.save_model``: is called for every checkpoint, before any push to a hub. It calls
  ``_save`` where ``should_save`` is true; 5.24.0 calls it on every rank, and that of axolotl 0.19.0 writes wherever it
  is called.
* transformers 5.16.1, ``PreTrainedModel.enable_input_require_grads``: registers forward hooks named
  ``make_inputs_require_grads`` on the embeddings, more than once under gradient checkpointing.
* transformers 5.16.1, ``Trainer._load_from_checkpoint`` and ``_load_best_model``: on one process and DDP both restore
  LoRA weights through the model's own ``load_adapter``, and by nothing else. So does 5.24.0.
* transformers 5.16.1, ``Trainer._load_best_model``: every rank reads the best checkpoint from its own disk, and is
  called where ``best_model_checkpoint`` names one, which it does on ranks that see that checkpoint's folder.
* transformers 5.16.1, ``Trainer._save``: the adapter's files come from the model's own ``save_pretrained``. axolotl
  0.19.0: so do those after training on one process, DDP and ZeRO-1/2; ZeRO-3 has ``save_model`` write them, FSDP2 the
  function ``save_fsdp2_lora_adapter``, which also writes checkpoints where the base is quantised. Both callers look
  it up in its module when they save.
* transformers 5.16.1 and axolotl 0.19.0: ``OPTIONAL_STATE_FILES`` are read where they are there;
  ``trainer_state.json`` is written last.
* transformers 5.16.1, ``Trainer._inner_training_loop``: looks at ``should_training_stop`` after every ``_run_epoch``
  only, which makes a step at least; nothing saves or evaluates before the first one but ``eval_on_start``.
* transformers 5.16.1, ``Trainer._save_checkpoint``: leaves ``state()`` of every ``ExportableState`` callback in
  ``stateful_callbacks``, of several of a class in a list that grows with every checkpoint; ``_load_callback_state``
  restores them only on request, by making the callbacks anew at the end of the list.
* transformers 5.16.1, ``Trainer._save_checkpoint``: writes ``trainer_state.json`` after ``save_model`` has returned,
  and leaves entries of ``stateful_callbacks`` that are of no callback as they are, as ``_load_callback_state`` does.
* transformers 5.16.1: the types of ``TrainerState``'s fields, see ``STATE_TYPES``, when it was written by a Trainer.
* transformers 5.16.1, ``Trainer.training_step``: ends with the backward pass of a micro-batch; gradients are clipped
  after it. ``sync_gradients`` is true in the last one of an optimizer step.
* transformers 5.16.1, ``Trainer.set_initial_training_values``: ends in the planned number of optimizer steps.
* accelerate 1.13.0, ``Accelerator.prepare``: what iterates over batches is the ``base_dataloader`` of what it
  returns, whose ``worker_init_fn`` is read when an iteration begins.
* transformers 5.16.1, ``Trainer._save_checkpoint``: writes a whole checkpoint of the last step; what the step had
  still to do lies in ``trainer_state.json`` as the state of ``TrainerControl``, in which ``should_evaluate`` is true
  until the evaluation is over. ``_evaluate``, ``_determine_best_metric`` and ``_load_rng_state`` make up for one.
* transformers 5.16.1, ``Trainer.train`` can be called again on a trainer whose attributes were put back; accelerate
  1.13.0 keeps a model in mixed precision in its ``forward`` and ``_original_forward``, and 1.15.0 prepares no model
  again that has ``_is_accelerate_prepared``; axolotl 0.19.0 and trl 1.9.0 collect what they will log in
  ``_stored_metrics`` and ``_metrics``. Of axolotl's arguments those in ``STEP_COUNTS`` count optimizer steps of its
  schedule.
* transformers 5.16.1, ``Trainer._prepare_inputs``: puts a micro-batch on the device. axolotl 0.19.0,
  ``activation_offload_context``: where it exists, forward passes that train run inside.
* transformers 5.16.1, ``PreTrainedModel.gradient_checkpointing_enable``: modules that checkpoint have
  ``gradient_checkpointing`` and ``_gradient_checkpointing_func``, a partial call of ``checkpoint``, in whose place
  axolotl 0.19.0 may put functions of its own.
* transformers 5.16.1: layers that share keys and values are counted by ``num_kv_shared_layers`` of the language
  model's configuration, and exchange them in a dictionary, whose tensors PyTorch's reentrant checkpointing detaches.
* trl 1.9.0, ``disable_gradient_checkpointing``: around generating, and around what the reference model computes, it
  switches checkpointing off and then on again by the model's own ``gradient_checkpointing_enable``.
* trl 1.9.0: trainers that generate the answers that they train on have ``_generate_and_score_completions``, and
  ``use_vllm`` among their arguments says whether another program does it.
* axolotl 0.19.0, ``ModelLoader._load_adapters``: ``CONFIG_ONLY_TRAINERS`` make the adapter themselves.
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
# Of fp16's loss scaler, and Axolotl's count of tokens.
OPTIONAL_STATE_FILES = ("scaler.pt", "tokens_state.json")
CONFIG_ONLY_TRAINERS = ("dpo", "ipo", "kto")
# The entry of this package in the Trainer's own state.
NOTE = "axolotl_layersel"
COUNTS = ("global_step", "max_steps", "train_batch_size")  # that a Trainer cannot do without
NUMBER, NOTHING = (int, float), type(None)
# The fields of TrainerState, and what each can be in a file: some are None until there is something to say.
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
    """Return the trainer's model without what an engine or a compiler has put around it."""
    return trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)


def get_model(trainer: Trainer) -> nn.Module:
    """Return the trainer's model, past the engine that may have been built around it."""
    assert trainer.model is not None, "every trainer is made with a model, or has made it"
    return trainer.model


def compute_loss(trainer: Trainer, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
    """Return the loss of a prepared micro-batch, with a graph; the engine does not reduce its gradients."""
    loss = trainer.compute_loss(get_model(trainer), inputs, num_items_in_batch=num_items_in_batch)
    assert isinstance(loss, torch.Tensor), "outputs were not asked for"
    return loss


def count_optimizer_steps(trainer: Trainer) -> int:
    """Return the planned number of optimizer steps of a run that has not begun."""
    if trainer.args.max_steps > 0:  # Axolotl always says it
        return trainer.args.max_steps
    with torch.random.fork_rng():
        return trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]


def respect_stop_before_first_step(trainer: Trainer) -> None:
    """Respect a callback that asks at ``on_train_begin`` for training to stop, before any step is made."""
    upstream = trainer._run_epoch

    @functools.wraps(upstream)
    def run_epoch(*args: Any, **kwargs: Any) -> None:
        if not trainer.control.should_training_stop:
            upstream(*args, **kwargs)

    trainer._run_epoch = run_epoch  # type: ignore[method-assign]  # of this trainer alone


def call_before_training(trainer: Trainer, function: Callable[[], None]) -> None:
    """Call ``function`` whenever training is asked for, before the engine is built."""
    upstream = trainer.train

    @functools.wraps(upstream)
    def train(*args: Any, **kwargs: Any) -> Any:
        function()
        return upstream(*args, **kwargs)

    trainer.train = train  # type: ignore[method-assign]  # of this trainer alone


def call_after_backward(trainer: Trainer, function: Callable[[], None]) -> None:
    """Call ``function`` once an optimizer step, when all its gradients are there and averaged, but not yet clipped.

    DeepSpeed steps within the backward pass, so it is too late there.
    """
    upstream = trainer.training_step

    @functools.wraps(upstream)
    def training_step(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = upstream(*args, **kwargs)
        if trainer.accelerator.sync_gradients:
            function()
        return loss

    trainer.training_step = training_step  # type: ignore[method-assign]  # of this trainer alone


def restore_callbacks(callbacks: list[TrainerCallback], state: TrainerState) -> None:
    """Give callbacks back what they had counted when the checkpoint that ``state`` is from was written.

    They stay the objects that they are, in their order and with the settings of this run.
    """
    stored: Any = state.stateful_callbacks  # a mapping, once a trainer has it
    for kind in {type(callback) for callback in callbacks if isinstance(callback, ExportableState)}:
        same = [callback for callback in callbacks if type(callback) is kind]
        # The next checkpoint could not be written without an entry for one that this run is the first to have.
        saved = stored.setdefault(kind.__name__, [callback.state() for callback in same])
        saved = saved if isinstance(saved, list) else [saved]
        for callback, values in zip(same, saved[-len(same) :]):
            for name, value in values["attributes"].items():
                setattr(callback, name, value)


def note_in_state(trainer: Trainer, note: str) -> None:
    """Let the trainer's state say ``note`` in the next checkpoint."""
    stored: Any = trainer.state.stateful_callbacks
    stored[NOTE] = {"args": {}, "attributes": {"note": note}}


def find_note(state: Mapping[str, Any]) -> str | None:
    """Return the note in the content of a ``trainer_state.json`` without faults; None where there is none."""
    entry = (state.get("stateful_callbacks") or {}).get(NOTE)
    return entry["attributes"].get("note") if isinstance(entry, dict) else None


def find_state_fault(state: Any) -> str | None:
    """Return what no Trainer writes in the content of a ``trainer_state.json``, or None.

    What a Trainer reads of it as it resumes would fail far from here.
    """
    if not isinstance(state, dict):
        return f"it is {state!r:.40}"
    for name, kinds in STATE_TYPES.items():
        value = state.get(name)
        # In Python true is a number.
        wrong = not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)
        if wrong and (name in state or name in COUNTS):
            return f"its {name} is {value!r:.40}"
    low = next((name for name in COUNTS if state[name] < 1), None)
    if low:
        return f"its {low} is {state[low]}"
    if not all(isinstance(entry, dict) for entry in state.get("log_history") or []):
        return "its log_history holds other than entries by name"
    return find_callback_fault(state.get("stateful_callbacks") or {})


def find_callback_fault(stored: dict[str, Any]) -> str | None:
    """Return what no callback leaves in the states of callbacks, or None."""
    for name, entry in stored.items():
        for state in entry if isinstance(entry, list) else [entry]:
            if not isinstance(state, dict) or not all(isinstance(state.get(k), dict) for k in ("args", "attributes")):
                return f"its {name} in stateful_callbacks is no state of a callback"
            count = state["attributes"].get("early_stopping_patience_counter", 0)
            if type(count) is not int:
                return f"its early_stopping_patience_counter is {count!r:.40}"
    control = stored.get("TrainerControl", {"args": {}})
    if isinstance(control, list) or not all(isinstance(value, bool) for value in control["args"].values()):
        return "its TrainerControl in stateful_callbacks holds other than true and false"
    return None


def initialize_loaders(trainer: Trainer, initialize: Callable[[int], None]) -> None:
    """Let ``initialize`` run first in every process that loads data for ``trainer``, with that process's number."""

    def initializing(upstream: Callable) -> Callable:
        @functools.wraps(upstream)
        def get_dataloader(*args: Any, **kwargs: Any) -> Any:
            prepared = upstream(*args, **kwargs)
            loader = getattr(prepared, "base_dataloader", prepared)
            own = getattr(loader, "worker_init_fn", None)
            # A loader whose processes stay is returned again.
            if getattr(own, "func", None) is not initialize_both:
                loader.worker_init_fn = functools.partial(initialize_both, initialize, own)
            return prepared

        return get_dataloader

    for name in ("get_train_dataloader", "get_eval_dataloader"):
        setattr(trainer, name, initializing(getattr(trainer, name)))


def initialize_both(first: Callable[[int], None], then: Callable[[int], None] | None, worker: int) -> None:
    """Initialise a process that loads data in two ways."""
    first(worker)
    if then is not None:
        then(worker)


def offload_activations(trainer: Trainer) -> contextlib.AbstractContextManager:
    """Return the context in which the trainer's own forward passes keep their activations elsewhere, if it has one."""
    return getattr(trainer, "activation_offload_context", contextlib.nullcontext())


def prepare_inputs(trainer: Trainer, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return a micro-batch on the trainer's device, as its own steps prepare it."""
    return trainer._prepare_inputs(inputs)


def remove_embedding_hooks(model: nn.Module) -> None:
    """Remove every hook by which transformers makes the embeddings' output require a gradient."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", "") in ("make_inputs_require_grads", "make_inputs_require_grad"):
                del module._forward_hooks[key]


def needs_differentiable_inputs(model: nn.Module) -> bool:
    """Return whether something of ``model`` is checkpointed in a way by which gradients arise from its inputs alone.

    PyTorch's own checkpointing without ``use_reentrant`` finds weights that train by itself.
    """

    def finds_weights(function: Any) -> bool:
        original, options = getattr(function, "func", None), getattr(function, "keywords", {})
        return original is torch.utils.checkpoint.checkpoint and options.get("use_reentrant") is False

    modules = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    return not all(finds_weights(getattr(module, "_gradient_checkpointing_func", None)) for module in modules)


def report_lost_gradients(trainer: Trainer, base: PreTrainedModel) -> None:
    """Log a warning where reentrant checkpointing keeps gradients from keys and values that layers share."""
    options: Any = trainer.args.gradient_checkpointing_kwargs or {}  # a text was parsed when they were made
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
    """Write a whole checkpoint of the step that has ended, weights being in shards; every rank must call this."""
    trainer._save_checkpoint(get_model(trainer), None)


def let_one_process_write(trainer: Trainer) -> None:
    """Let what ``save_model`` writes itself be written where ``should_save`` is true, and by no other rank."""
    upstream = trainer._save

    @functools.wraps(upstream)
    def save(*args: Any, **kwargs: Any) -> None:
        if trainer.args.should_save:
            upstream(*args, **kwargs)

    trainer._save = save  # type: ignore[method-assign]  # of this trainer alone


def restore_best_model_by(
    trainer: Trainer,
    is_complete: Callable[[Path], bool],
    restore: Callable[[str], None],
    check: Callable[[str], None],
) -> None:
    """Let ``restore`` write the weights of the best checkpoint into the model where not every rank has it on its disk.

    Upstream leaves a rank without the file its last weights, and under DeepSpeed and FSDP2 the others waiting for it.

    Args:
        trainer: it may load the best model at the end.
        is_complete: whether this rank sees all of a checkpoint that upstream reads.
        restore: needs the checkpoint on rank 0's disk only; every rank calls it.
        check: raises an error, on every rank, for a checkpoint that must not be loaded; every rank calls it.
    """
    upstream = trainer._load_best_model

    @functools.wraps(upstream)
    def load_best_model() -> None:
        best = trainer.state.best_model_checkpoint
        assert best is not None, "upstream calls this where there is one"
        check(best)
        if not is_distributed() or all(gather_from_all(is_complete(Path(best)))):
            upstream()
        else:
            restore(best)

    trainer._load_best_model = load_best_model  # type: ignore[method-assign]  # of this trainer alone


def is_evaluation_due(trainer: Trainer) -> bool:
    """Return whether the checkpoint that the run was resumed from was written before its step's evaluation."""
    stored: Any = trainer.state.stateful_callbacks
    return bool(stored.get("TrainerControl", {}).get("args", {}).get("should_evaluate"))


def evaluate(trainer: Trainer, checkpoint: str) -> None:
    """Make up for the evaluation that ``checkpoint`` lacks, as training begins again from it; every rank calls this."""
    trainer.control.should_evaluate = True
    trainer._determine_best_metric(trainer._evaluate(None, None), None)
    # Random streams are loaded when the first batch is; the next checkpoint gets those that this one had.
    trainer._load_rng_state(checkpoint)


def check_no_optimizer(trainer: Trainer) -> None:
    """Raise LayerselError where the trainer has an optimizer already, of weights that are yet to change."""
    if trainer.optimizer is not None:
        raise LayerselError("optimizer: it was made before the trainer was prepared, so it holds other LoRA weights.")


def scales_loss(trainer: Trainer) -> bool:
    """Return whether the trainer scales the loss, as training in fp16 does."""
    return bool(trainer.args.fp16 or trainer.accelerator.mixed_precision == "fp16")


def generates(trainer: Trainer) -> bool:
    """Return whether the trainer generates the answers that it trains on."""
    return hasattr(trainer, "_generate_and_score_completions")


def uses_vllm(trainer: Trainer) -> bool:
    """Return whether another program generates the answers that the trainer trains on."""
    return bool(getattr(trainer.args, "use_vllm", False))
