"""Run the model over the calibration sample before any engine exists, and leave everything as it was.

Samples are spread over the ranks and their measurements gathered in sample order, so the result does not
depend on the number of processes; rank 0 has them, the others None. Under ZeRO-3 and FSDP2 one layer at a
time is whole on the device.
"""

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.progress import Progress
from torch import nn
from transformers import PreTrainedModel

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.randomness import keep_random_state
from axolotl_layersel.config.layer_names import VISION
from axolotl_layersel.engines import collectives, trainers
from axolotl_layersel.engines.signals import stop_if_signalled
from axolotl_layersel.lora.eval_mode import evaluating, precision
from axolotl_layersel.lora.layers import LayerStack, Side
from axolotl_layersel.lora.run import Run
from axolotl_layersel.selection.choosing import Scores, Selection, conclude, find_highest_by_layer
from axolotl_layersel.selection.data.calibration import Sample, collate
from axolotl_layersel.selection.passes.branches import watch_branches
from axolotl_layersel.selection.passes.recomputation import get_hidden, recompute

# Tokens of a forward pass that gathers or copies each layer's weights: at 70B the activations of one layer
# take some 5 GB, and the copy is hidden behind enough work.
STREAMED_TOKENS = 16384
# Of a pass that is also made backward: at 70B the hidden states between the layers take as much.
STREAMED_TOKENS_BACKWARD = 4096
# Why a layer of a vision tower has no score.
NO_IMAGES = "no row drawn has an image"
# What a layer is given to add its keys and values to, which it would do twice.
CACHES = ("past_key_values", "past_key_value", "layer_past")
# What a layer does to its input, summed over each sample's tokens, (samples,): from the layer's inputs and outputs,
# (samples, tokens, width), the latter before any final norm, and a mask, (samples, tokens), 1 at real tokens.
Comparison = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def score_by_tokens(selection: Selection, samples: list[Sample], compare: Comparison) -> Scores:
    """Return the mean of ``compare`` over all tokens of all samples, for each layer and for each unit.

    Every rank must call this.
    """
    measured = measure_token_sums(selection, samples, compare)

    def score(measured: torch.Tensor) -> Scores:
        sums, tokens = measured.unbind(dim=-1)
        bare = {int(place): NO_IMAGES for place in (tokens.sum(dim=0) == 0).nonzero()}
        means = average_over_tokens(sums, tokens)
        return arrange_scores(selection, [None if i in bare else mean for i, mean in enumerate(means)], bare)

    return conclude(measured, name_places(selection), samples, score)


def average_over_tokens(sums: torch.Tensor, tokens: torch.Tensor) -> list[float]:
    """Return each place's mean over all tokens of all samples.

    Args:
        sums: (samples, places), over each sample's tokens.
        tokens: (samples,), or (samples, places) where these differ: how many tokens each sample has there.
    """
    return (sums.sum(dim=0) / tokens.sum(dim=0)).tolist()


def measure_token_sums(selection: Selection, samples: list[Sample], compare: Comparison) -> torch.Tensor | None:
    """Return the sum of ``compare`` over each sample's tokens, and their number: (samples, places, 2), float64."""
    run, sides = selection.run, list_sides(selection)

    def measure(indices: list[int]) -> list[torch.Tensor]:
        inputs = make_inputs(run, [samples[i] for i in indices])
        sums = torch.zeros(len(indices), len(sides), 2, dtype=torch.float64)

        def record(place: int, before: torch.Tensor, after: torch.Tensor) -> None:
            before, mask = arrange_tokens(selection, before, inputs, sides[place])
            after, _ = arrange_tokens(selection, after.to(before.device), inputs, sides[place])
            # Images and videos of one row go through a vision tower one after the other.
            sums[:, place] += torch.stack([compare(before, after, mask), mask.sum(dim=1)], dim=1).double().cpu()

        with watch_places(selection, record):
            call(run, inputs)
        return [row.clone() for row in sums]

    with scoring(selection):
        return over_samples(run, samples, measure, count_fitting(run, samples))


def name_places(selection: Selection) -> list[str]:
    """Return what is measured, as messages call it: every layer, or every unit where units are others."""
    if selection.settings.granularity == "layer":
        return [f"layer {name}" for name in selection.stack.names]
    return [unit.name for unit in selection.units]


def list_sides(selection: Selection) -> list[Side]:
    """Return the side of the model that each place of ``name_places`` is in."""
    stack = selection.stack
    if selection.settings.granularity == "layer":
        return [stack.sides[side] for side in stack.side_of]
    return [stack.sides[stack.side_of[unit.layer]] for unit in selection.units]


def arrange_scores(selection: Selection, values: list[float | None], unscored: dict[int, str] | None = None) -> Scores:
    """Return the scores of every place as those of layers, or of units where they are others.

    ``unscored``: why a place has none, by place.
    """
    reasons = unscored or {}
    if selection.settings.granularity == "layer":
        return Scores(values, {selection.stack.names[place]: why for place, why in reasons.items()})
    units = {unit.name: value for unit, value in zip(selection.units, values)}
    found = [(selection.units[place], why) for place, why in reasons.items()]
    by_layer = {selection.stack.names[unit.layer]: f"{unit.name}: {why}" for unit, why in found}
    return Scores(find_highest_by_layer(selection, units), by_layer, units=units)


@contextlib.contextmanager
def watch_places(selection: Selection, record: Callable[[int, torch.Tensor, torch.Tensor], None]) -> Iterator[None]:
    """Call ``record(place, before, after)`` with the hidden states around every place of ``name_places``.

    They are (samples, tokens, width), and the last ones lie before any final norm.
    """
    stack, given = selection.stack, dict[int, torch.Tensor]()

    def before(layer: int, args: tuple, kwargs: dict) -> None:
        given[layer] = get_hidden(args, kwargs)

    with contextlib.ExitStack() as watching:
        if selection.settings.granularity == "layer":
            watching.enter_context(
                hook_layers(stack, before, lambda layer, output: record(layer, given.pop(layer), get_output(output)))
            )
        else:
            places: dict[int, dict[tuple[str, ...], int]] = {}
            for place, unit in enumerate(selection.units):
                places.setdefault(unit.layer, {})[unit.parts] = place
            for layer, by_parts in places.items():
                watching.enter_context(watch_branches(stack.layers[layer], by_parts, record))
        yield


def find_share(run: Run, samples: int) -> range:
    """Return which of so many samples this rank measures."""
    ranks, rank = run.engine.list_ranks_with_weights(), collectives.get_rank()
    return range(ranks.index(rank), samples, len(ranks)) if rank in ranks else range(0)


def over_samples(
    run: Run, samples: list[Sample], measure: Callable[[list[int]], list[torch.Tensor]], size: int
) -> torch.Tensor | None:
    """Return ``measure`` of every sample, stacked in order, on rank 0; each rank measures its share in batches."""
    ranks, rank = run.engine.list_ranks_with_weights(), collectives.get_rank()
    share = find_share(run, len(samples))
    mine = sorted(share, key=lambda i: count_tokens(samples[i]))
    batches = [mine[start : start + size] for start in range(0, len(mine), size)]
    most = math.ceil(math.ceil(len(samples) / len(ranks)) / size)
    if run.engine.runs_in_lockstep:
        # A rank with fewer batches repeats a sample, and drops it, so that all gather each layer as often.
        batches += [[0]] * (most - len(batches))
    measured: dict[int, torch.Tensor] = {}
    with Progress(disable=rank != 0, transient=True) as progress:
        for round_ in progress.track(range(most), description="layersel: scoring layers"):
            if round_ < len(batches):
                values = measure(batches[round_])
                measured.update({index: value for index, value in zip(batches[round_], values) if index in share})
            # No rank waits for the others longer than a round: collective calls give up after half an hour.
            stop_if_signalled(run.device)
    return collectives.gather_on_rank_zero(measured, ranks)


def count_fitting(run: Run, samples: list[Sample], with_graph: bool = False) -> int:
    """Return how many samples fit a forward pass of the size that training takes; a packed row holds several.

    Where every pass brings the whole model to the device again, more samples share one: they need the memory of one
    layer's activations, and with a graph that of the hidden states between the layers. A row that the trainer's
    collator makes a batch of is one by itself.
    """
    if are_collated(samples):
        return 1
    longest = max(map(count_tokens, samples))
    arguments: Any = run.trainer.args
    rows = arguments.per_device_train_batch_size
    if getattr(arguments, "sample_packing", False):
        rows *= max(1, arguments.max_seq_length // longest)
    if run.engine.is_streamed:
        rows = max(rows, (STREAMED_TOKENS_BACKWARD if with_graph else STREAMED_TOKENS) // longest)
    return rows


def are_collated(samples: list[Sample]) -> bool:
    """Return whether the trainer's collator makes batches of samples, each of one row."""
    return any(sample.make_inputs for sample in samples)


def count_tokens(sample: Sample) -> int:
    """Return how many tokens a sample has, those of a decoder of its own with the others."""
    return len(sample.input_ids) + len(sample.decoder_input_ids or [])


def make_inputs(run: Run, samples: list[Sample]) -> dict[str, Any]:
    """Return samples as a batch on the trainer's device; any id fills rows up, for it is masked.

    A sample that the trainer's collator makes is alone; whatever that returns is in it, pixels and sizes of grids too.
    """
    (make, *others) = [sample.make_inputs for sample in samples]
    if make is not None:
        assert not others, "such rows share no pass"
        return trainers.prepare_inputs(run.trainer, make())
    tokenizer = getattr(run.trainer.processing_class, "tokenizer", run.trainer.processing_class)
    pad_token_id = getattr(tokenizer, "pad_token_id", None)
    return collate(samples, 0 if pad_token_id is None else pad_token_id, run.device)


def get_mask(inputs: dict[str, Any], side: Side) -> torch.Tensor:
    """Return the mask of what one side of a model reads of a batch, (samples, tokens), 1 at real tokens."""
    own = inputs.get("decoder_attention_mask") if side.name == "decoder" else None
    mask = inputs.get("attention_mask") if own is None else own
    return mask if mask is not None else torch.ones_like(inputs["input_ids"])


def arrange_tokens(
    selection: Selection, hidden: torch.Tensor, inputs: dict[str, torch.Tensor], side: Side
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return hidden states of one side of a model as (samples, tokens, width), and their mask, (samples, tokens).

    A vision tower has patches for tokens, all images of the batch's only row in one or one after the other.

    Raises:
        LayerselError: if it cannot be told which of the hidden states are whose.
    """
    if side.name == VISION:
        hidden = hidden.flatten(0, -2)[None]
        return hidden, torch.ones(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
    mask = get_mask(inputs, side).to(hidden.device)
    read = take_active(selection.run.base, hidden)
    if read.dim() != 3 or len(read) != len(mask) or read.shape[1] < mask.shape[1]:
        raise LayerselError(
            f"layersel.selection.method: {selection.method.name} compares hidden states of rows × tokens × width, and "
            f"in {type(side.owner).__name__} those of {' × '.join(map(str, mask.shape))} tokens are "
            f"{' × '.join(map(str, hidden.shape))}. Use method gradient or fisher, which compare none."
        )
    return cut_to(read, mask), mask


def take_active(base: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Return the hidden states that the layers of a model read: of several predictions of them the active one.

    Gemma 3n has four predictions of each token's hidden state (AltUp, arXiv 2301.13310), (4, samples, tokens, width).
    Attention and MLP of each layer read and write the active one, by which the layer corrects the others.
    """
    active = getattr(base.config.get_text_config(), "altup_active_idx", None)
    return hidden[active] if active is not None and hidden.dim() == 4 else hidden


def cut_to(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the hidden states of as many tokens as ``mask`` has: LED fills rows up to its window by itself."""
    return hidden[:, : mask.shape[1]]


def call(run: Run, inputs: dict[str, Any], logits_to_keep: int = 1) -> Any:
    """Run the model under the adapter, without a cache; logits of the last ``logits_to_keep`` tokens (0: all)."""
    base = run.base
    known = inspect.signature(base.forward).parameters
    optional = ("token_type_ids", "decoder_input_ids", "decoder_attention_mask")
    options = {"use_cache": False, "logits_to_keep": logits_to_keep, **{key: inputs.get(key) for key in optional}}
    others = {key: value for key, value in inputs.items() if key not in options}
    return base(**others, **{key: value for key, value in options.items() if key in known})


def get_output(output: Any) -> torch.Tensor:
    """Return the hidden states that a layer or a stack of layers returned, usually (samples, tokens, width)."""
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
def scoring(selection: Selection, keeps_activations: bool = False) -> Iterator[None]:
    """Put the model into the state for scoring, and everything back afterwards.

    Evaluation mode (no dropout), no parameter requires a gradient, the run's own precision, the global random
    states untouched, weights where the engine allows them to be.

    ``keeps_activations``: of all layers until the backward pass, as training without checkpointing does; else each
    layer is computed again. Where weights are streamed, it always is.
    """
    run, stack = selection.run, selection.stack
    model, base = run.model, run.base
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with contextlib.ExitStack() as state:
        state.enter_context(keep_random_state())
        state.callback(lambda: [parameter.requires_grad_(True) for parameter in trainable])
        state.enter_context(evaluating(model))
        model.requires_grad_(False)
        if not run.engine.has_weights():
            pass  # nothing to put in place: this rank only waits for the others' measurements
        elif run.engine.is_streamed:
            state.enter_context(run.engine.materialize(tensors_outside(base, list_streamed(stack))))
        elif not getattr(base, "hf_device_map", None):
            # DeepSpeed would move the model there itself, later.
            model.to(run.device)
        streamed = {id(layer) for side in list_streamed(stack) for layer in side.layers}
        for layer in [layer for side in (*stack.sides, *stack.beside) for layer in side.layers]:
            recomputes = selection.method.needs_backward and not keeps_activations
            gathers = run.engine.is_streamed and id(layer) in streamed
            state.enter_context(run_layer_alone(run, layer, gathers, recomputes))
            if keeps_activations:
                state.enter_context(handle_removed(layer.register_forward_pre_hook(begin_graph, with_kwargs=True)))
        state.enter_context(precision(run.trainer))
        state.enter_context(torch.no_grad())
        yield


def list_streamed(stack: LayerStack) -> list[Side]:
    """Return the sides whose layers are whole one at a time, where weights are streamed.

    A vision tower's are whole all together: rows without an image do not run them, and ranks gather together.
    """
    return [side for side in (*stack.sides, *stack.beside) if side.name != VISION]


def tensors_outside(base: nn.Module, sides: list[Side]) -> list[torch.Tensor]:
    """Return the parameters and buffers that lie in no layer of ``sides``, each once."""
    found: dict[int, torch.Tensor] = {}
    for name, module in base.named_modules():
        if not any(f"{name}.".startswith(f"{side.path}.") for side in sides):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                found[id(tensor)] = tensor
    return list(found.values())


def begin_graph(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Let a layer's hidden states require a gradient, where one is computed: no parameter of the model does."""
    if not torch.is_grad_enabled() or get_hidden(args, kwargs).requires_grad:
        return None
    hidden = get_hidden(args, kwargs).detach().requires_grad_()
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


@contextlib.contextmanager
def run_layer_alone(run: Run, layer: nn.Module, gathers: bool, backward: bool) -> Iterator[None]:
    """Run ``layer`` again for its gradient with ``backward``, and whole only while it runs with ``gathers``."""
    if not backward and not gathers:
        yield
        return
    original, own = layer.forward, layer.__dict__.get("forward")

    @contextlib.contextmanager
    def ready() -> Iterator[None]:
        with contextlib.ExitStack() as state:
            if gathers:
                tensors = [*layer.parameters(), *layer.buffers()]
                state.enter_context(run.engine.materialize(tensors))
            state.enter_context(precision(run.trainer))
            yield

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            with ready():
                return original(*args, **kwargs)
        named = {**kwargs, **{key: None for key in CACHES if key in kwargs}}
        return recompute(original, ready, args, named)

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
        if own is not None:
            layer.forward = own
