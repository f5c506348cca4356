"""Run the model over the calibration sample before any engine exists, and leave everything as it was.

Samples are spread over the ranks and their measurements gathered in sample order, so the result does not
depend on the number of processes; rank 0 has them, the others None. Under ZeRO-3 and FSDP2 one layer at a
time is whole on the device.
"""

import contextlib
import inspect
import math
import random
from collections.abc import Callable, Iterator

import numpy
import torch
from peft import PeftModel
from rich.progress import Progress
from torch import nn
from transformers import Trainer

from axolotl_layersel import engines
from axolotl_layersel.errors import LayerselError
from axolotl_layersel.evaluation import evaluating
from axolotl_layersel.interrupt import stop_if_signalled
from axolotl_layersel.layers import LayerStack, find_lora_modules
from axolotl_layersel.selection import cosine, fisher
from axolotl_layersel.selection.calibration import Sample, collate, cut_sample
from axolotl_layersel.selection.likelihood import count_tokens_at_a_time, differentiate
from axolotl_layersel.targets import IGNORED_LABEL, ROW, align, find_kind, row_log_likelihood

# Tokens of a forward pass that gathers or copies each layer's weights: at 70B the activations of one layer
# take some 5 GB, and the copy is hidden behind enough work.
STREAMED_TOKENS = 16384
# Tokens of the forward pass that shows how a model's head works.
PROBED_TOKENS = 16


def measure_token_states(
    trainer: Trainer, model: PeftModel, stack: LayerStack, samples: list[Sample], positions: list[int] | None
) -> torch.Tensor | None:
    """Return the hidden states of one token of each sample: (samples, layers + 1, width), fp32 on the CPU.

    They are those of Hugging Face's ``hidden_states``: the embeddings, then each layer's output, the last
    after the final norm. ``positions`` is None for the mean over a sample's tokens. Only the rows asked for
    are kept of each layer's output.
    """
    rows: list[torch.Tensor] = []

    def measure(indices: list[int]) -> list[torch.Tensor]:
        inputs = collate([samples[i] for i in indices], get_pad_token_id(trainer), trainer.args.device)
        rows.clear()

        def keep(hidden: torch.Tensor) -> None:
            if positions is None:
                mask = inputs["attention_mask"].to(hidden.device)[..., None]
                kept = (hidden.float() * mask).sum(dim=1) / mask.sum(dim=1)
            else:
                kept = hidden[torch.arange(len(indices)), [positions[i] for i in indices]]
            rows.append(kept.float().cpu())

        with hook_layers(stack, lambda layer, args, kwargs: keep(get_hidden(args, kwargs)), None):
            handle = stack.owner.register_forward_hook(lambda module, args, output: keep(get_output(output)))
            with handle_removed(handle):
                call(model, inputs)
        if len(rows) != len(stack.layers) + 1:
            raise LayerselError(
                f"layersel.selection.method: {type(stack.owner).__name__} ran {len(rows) - 1} of its "
                f"{len(stack.layers)} layers in one forward pass; models that skip layers are not supported."
            )
        # Rows of their own: a view is sent to rank 0 with the storage of the whole batch.
        return [state.clone() for state in torch.stack(rows, dim=1)]

    with scoring(trainer, model, stack):
        return over_samples(trainer, samples, measure, batch_size(trainer, samples))


def measure_turns(trainer: Trainer, model: PeftModel, stack: LayerStack, samples: list[Sample]) -> torch.Tensor | None:
    """Return each sample's sum over tokens of 1 − cos(layer input, layer output): (samples, layers), float64."""

    def measure(indices: list[int]) -> list[torch.Tensor]:
        inputs = collate([samples[i] for i in indices], get_pad_token_id(trainer), trainer.args.device)
        given: dict[int, torch.Tensor] = {}
        turns = torch.zeros(len(indices), len(stack.layers), dtype=torch.float64)

        def before(layer: int, args: tuple, kwargs: dict) -> None:
            given[layer] = get_hidden(args, kwargs)

        def after(layer: int, output: object) -> None:
            hidden = given.pop(layer)
            mask = inputs["attention_mask"].to(hidden.device)
            turns[:, layer] = cosine.sum_turns(hidden, get_output(output).to(hidden.device), mask).cpu()

        with hook_layers(stack, before, after):
            call(model, inputs)
        return [turn.clone() for turn in turns]

    with scoring(trainer, model, stack):
        return over_samples(trainer, samples, measure, batch_size(trainer, samples))


def measure_squared_gradients(
    trainer: Trainer, model: PeftModel, stack: LayerStack, samples: list[Sample]
) -> torch.Tensor | None:
    """Return the squared norm of each sample's gradient of the response log-likelihood: (samples, layers), float64.

    The gradient is that of the layer's own weights under LoRA. It is never formed for a whole layer, and each
    layer is computed again in the backward pass, so no more than one layer's activations are held; logits are
    computed for a few tokens at a time.

    Raises:
        LayerselError: if the rows have no labels of the kind that the model's logits answer.
    """
    kind = find_kind(model)
    check_labels(samples, kind)
    base = model.get_base_model()
    lora = find_lora_modules(base)
    squares = torch.zeros(len(stack.layers), dtype=torch.float64)

    def watch(layer: int, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(linear: nn.Module, args: tuple, output: torch.Tensor) -> None:
            if not output.requires_grad:
                return
            given = args[0].detach()

            def add(gradient: torch.Tensor) -> None:
                norm = fisher.ghost_norm(given.flatten(0, -2), gradient.flatten(0, -2))
                squares[layer] += norm.to(squares.device)

            output.register_hook(add)

        return module.get_base_layer().register_forward_hook(hook)

    def compute_logits(sample: Sample) -> torch.Tensor:
        inputs = collate([sample], get_pad_token_id(trainer), trainer.args.device)
        return call(model, inputs, logits_to_keep=0).logits[0]

    def measure(indices: list[int]) -> list[torch.Tensor]:
        (sample,) = (samples[i] for i in indices)
        squares.zero_()
        targets = align(torch.tensor(sample.labels), kind)
        if bool((targets != IGNORED_LABEL).any()) or engines.runs_in_lockstep(trainer):
            with torch.enable_grad():
                if kind == ROW:
                    logits = compute_logits(sample)
                    row_log_likelihood(logits, targets.to(logits.device), base.config.problem_type).backward()
                else:
                    differentiate(base, lambda: compute_logits(sample), targets, at_a_time)
        return [squares.clone()]

    with scoring(trainer, model, stack, backward=True), contextlib.ExitStack() as hooks:
        for layer, names in stack.lora_modules.items():
            for name in names:
                hooks.enter_context(handle_removed(watch(layer, lora[name])))
        at_a_time = None
        if kind != ROW and engines.get_rank() in engines.ranks_with_weights(trainer):
            short = cut_sample(max(samples, key=lambda sample: len(sample.input_ids)), PROBED_TOKENS)
            at_a_time = count_tokens_at_a_time(base, lambda: compute_logits(short))
        return over_samples(trainer, samples, measure, 1)


def check_labels(samples: list[Sample], kind: str) -> None:
    """Raise LayerselError unless every sample has labels that logits of this ``kind`` answer."""
    for sample in samples:
        labels = sample.labels
        if kind == ROW and isinstance(labels, int | float):
            continue
        if isinstance(labels, list) and (kind == ROW or len(labels) == len(sample.input_ids)):
            continue
        what = "a label of each row" if kind == ROW else "labels of tokens"
        raise LayerselError(
            f"layersel.selection.method: fisher needs {what}, training row {sample.row} has none. Use cka."
        )


def count_target_weights(model: PeftModel, stack: LayerStack) -> torch.Tensor:
    """Return how many weights lie under the LoRA modules of each layer: (layers,), float64."""
    lora = find_lora_modules(model.get_base_model())
    counts = torch.zeros(len(stack.layers), dtype=torch.float64)
    for layer, names in stack.lora_modules.items():
        counts[layer] = sum(lora[name].in_features * lora[name].out_features for name in names)
    return counts


def over_samples(
    trainer: Trainer, samples: list[Sample], measure: Callable[[list[int]], list[torch.Tensor]], size: int
) -> torch.Tensor | None:
    """Return ``measure`` of every sample, stacked in order, on rank 0; each rank measures its share in batches."""
    ranks, rank = engines.ranks_with_weights(trainer), engines.get_rank()
    share = range(ranks.index(rank), len(samples), len(ranks)) if rank in ranks else range(0)
    mine = sorted(share, key=lambda i: len(samples[i].input_ids))
    batches = [mine[start : start + size] for start in range(0, len(mine), size)]
    most = math.ceil(math.ceil(len(samples) / len(ranks)) / size)
    if engines.runs_in_lockstep(trainer):
        # A rank with fewer batches repeats a sample, and drops it, so that all gather each layer as often.
        batches += [[0]] * (most - len(batches))
    measured: dict[int, torch.Tensor] = {}
    with Progress(disable=rank != 0, transient=True) as progress:
        for round_ in progress.track(range(most), description="layersel: scoring layers"):
            if round_ < len(batches):
                values = measure(batches[round_])
                measured.update({index: value for index, value in zip(batches[round_], values) if index in share})
            # No rank waits for the others longer than a round: collective calls give up after half an hour.
            stop_if_signalled(trainer.args.device)
    return engines.gather_on_rank_zero(measured, ranks)


def batch_size(trainer: Trainer, samples: list[Sample]) -> int:
    """Return how many samples fit a forward pass of the size that training takes; a packed row holds several.

    Where every pass brings the whole model to the device again, more samples share one: without a graph they
    need the memory of one layer's activations.
    """
    longest = max(len(sample.input_ids) for sample in samples)
    rows = trainer.args.per_device_train_batch_size
    if getattr(trainer.args, "sample_packing", False):
        rows *= max(1, trainer.args.max_seq_length // longest)
    if engines.is_streamed(trainer):
        rows = max(rows, STREAMED_TOKENS // longest)
    return rows


def get_pad_token_id(trainer: Trainer) -> int:
    """Return the id that fills rows up; any does, for it is masked."""
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    pad_token_id = getattr(tokenizer, "pad_token_id", None)
    return 0 if pad_token_id is None else pad_token_id


def call(model: PeftModel, inputs: dict[str, torch.Tensor], logits_to_keep: int = 1) -> object:
    """Run the model under the adapter, without a cache; logits of the last ``logits_to_keep`` tokens (0: all)."""
    base = model.get_base_model()
    known = inspect.signature(base.forward).parameters
    options = {"use_cache": False, "logits_to_keep": logits_to_keep, "token_type_ids": inputs.get("token_type_ids")}
    return base(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        **{key: value for key, value in options.items() if key in known},
    )


def get_hidden(args: tuple, kwargs: dict) -> torch.Tensor:
    """Return the hidden states that a layer was called with, (samples, tokens, width)."""
    return args[0] if args else kwargs["hidden_states"]


def get_output(output: object) -> torch.Tensor:
    """Return the hidden states that a layer or a stack of layers returned, (samples, tokens, width)."""
    if isinstance(output, torch.Tensor):
        return output
    return output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]


@contextlib.contextmanager
def handle_removed(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    """Remove a hook at the end of the block."""
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def hook_layers(
    stack: LayerStack,
    before: Callable[[int, tuple, dict], None],
    after: Callable[[int, object], None] | None,
) -> Iterator[None]:
    """Call ``before(layer, args, kwargs)`` and ``after(layer, output)`` around every layer within the block."""
    with contextlib.ExitStack() as hooks:
        for index, layer in enumerate(stack.layers):
            handle = layer.register_forward_pre_hook(
                lambda module, args, kwargs, index=index: before(index, args, kwargs), with_kwargs=True
            )
            hooks.enter_context(handle_removed(handle))
            if after is not None:
                handle = layer.register_forward_hook(lambda module, args, output, index=index: after(index, output))
                hooks.enter_context(handle_removed(handle))
        yield


@contextlib.contextmanager
def scoring(trainer: Trainer, model: PeftModel, stack: LayerStack, backward: bool = False) -> Iterator[None]:
    """Put the model into the state for scoring, and everything back afterwards.

    Evaluation mode (no dropout), no parameter requires a gradient, the run's own precision, the global random
    states untouched, weights where the engine allows them to be.
    """
    base = model.get_base_model()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with contextlib.ExitStack() as state:
        state.enter_context(keep_random_state())
        state.callback(lambda: [parameter.requires_grad_(True) for parameter in trainable])
        state.enter_context(evaluating(model))
        model.requires_grad_(False)
        if engines.get_rank() not in engines.ranks_with_weights(trainer):
            pass  # nothing to put in place: this rank only waits for the others' measurements
        elif engines.is_streamed(trainer):
            state.enter_context(engines.materialize(trainer, tensors_outside(base, stack)))
        elif not getattr(base, "hf_device_map", None):
            # DeepSpeed would move the model there itself, later.
            model.to(trainer.args.device)
        for layer in stack.layers:
            state.enter_context(run_layer_alone(trainer, layer, backward))
        state.enter_context(precision(trainer))
        state.enter_context(torch.no_grad())
        yield


def precision(trainer: Trainer) -> torch.autocast:
    """Return the run's mixed precision as a context; DeepSpeed's own casting happens in its engine only."""
    dtype = torch.bfloat16 if trainer.args.bf16 else torch.float16
    return torch.autocast(trainer.args.device.type, dtype=dtype, enabled=trainer.args.bf16 or trainer.args.fp16)


@contextlib.contextmanager
def keep_random_state() -> Iterator[None]:
    """Give Python's, NumPy's and torch's global random streams back as they were."""
    python, arrays = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        yield
    random.setstate(python)
    numpy.random.set_state(arrays)


def tensors_outside(base: nn.Module, stack: LayerStack) -> list[torch.Tensor]:
    """Return the parameters and buffers that lie in no layer of the stack, each once."""
    found: dict[int, torch.Tensor] = {}
    for name, module in base.named_modules():
        if not name.startswith(f"{stack.name}."):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                found[id(tensor)] = tensor
    return list(found.values())


@contextlib.contextmanager
def run_layer_alone(trainer: Trainer, layer: nn.Module, backward: bool) -> Iterator[None]:
    """Let ``layer`` have its weights whole only while it runs; with ``backward``, run again for its gradient."""
    if not backward and not engines.is_streamed(trainer):
        yield
        return
    original, own = layer.forward, layer.__dict__.get("forward")

    @contextlib.contextmanager
    def ready() -> Iterator[None]:
        with contextlib.ExitStack() as state:
            if engines.is_streamed(trainer):
                tensors = [*layer.parameters(), *layer.buffers()]
                state.enter_context(engines.materialize(trainer, tensors))
            state.enter_context(precision(trainer))
            yield

    def forward(*args, **kwargs):
        if not torch.is_grad_enabled():
            with ready():
                return original(*args, **kwargs)
        rest: list[object] = []

        def run(hidden: torch.Tensor) -> torch.Tensor:
            positional, named = ((hidden, *args[1:]), {}) if args else ((), {"hidden_states": hidden})
            output = original(*positional, **{**kwargs, **named})
            if isinstance(output, tuple):
                rest[:] = output[1:]
                return output[0]
            return output

        hidden = get_hidden(args, kwargs)
        if not hidden.requires_grad:
            hidden = hidden.detach().requires_grad_()
        output = RecomputedLayer.apply(hidden, run, ready)
        return (output, *rest) if rest else output

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
        if own is not None:
            layer.forward = own


class RecomputedLayer(torch.autograd.Function):
    """A layer that is run without a graph, and once more in the backward pass, with its weights whole both times."""

    @staticmethod
    def forward(ctx, hidden, run, ready):
        ctx.run, ctx.ready = run, ready
        ctx.save_for_backward(hidden)
        with ready():
            return run(hidden)

    @staticmethod
    def backward(ctx, gradient):
        (hidden,) = ctx.saved_tensors
        with torch.enable_grad(), ctx.ready():
            hidden = hidden.detach().requires_grad_()
            torch.autograd.backward(ctx.run(hidden), gradient)
        return hidden.grad, None, None
