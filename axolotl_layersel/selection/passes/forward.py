"""Run the model over the calibration sample before any engine exists, and leave everything as it was.

Samples are spread over the processes, and their measurements are gathered in sample order, so the result does not
depend on the number of processes. Process 0 gets the measurements, the others None. Under ZeRO-3 and FSDP2 the weights
of one layer at a time are whole on the device.
"""

import contextlib
import inspect
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.progress import PhaseProgress
from axolotl_layersel.common.randomness import keep_random_state
from axolotl_layersel.config.layer_names import VISION
from axolotl_layersel.engines import collectives, trainers
from axolotl_layersel.engines.signals import stop_if_signalled
from axolotl_layersel.lora.eval_mode import evaluating, precision
from axolotl_layersel.lora.layers import Side
from axolotl_layersel.lora.run import Run
from axolotl_layersel.selection.data.calibration import Sample, collate
from axolotl_layersel.selection.passes.branches import watch_branches
from axolotl_layersel.selection.passes.hooks import (
    get_hidden,
    get_output,
    hooking_layers,
    removing,
    replacing_method,
    set_hidden,
)
from axolotl_layersel.selection.passes.recomputation import recompute
from axolotl_layersel.selection.passes.sizes import STREAMED_TOKENS, STREAMED_TOKENS_BACKWARD
from axolotl_layersel.selection.types import Scores, Selection

LOG = logging.getLogger("axolotl.layersel")
# Why a layer of a vision tower has no score.
NO_IMAGES = "no row drawn has an image"
# Arguments to which a layer adds its keys and values; run again, it would add them twice.
CACHES = ("past_key_values", "past_key_value", "layer_past")
# The change of a layer's input, summed over each sample's tokens, (samples,): from the layer's inputs and outputs,
# (samples, tokens, width), the outputs before any final norm, and a mask, (samples, tokens), 1 at real tokens.
Comparison = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


# --- Scores -------------------------------------------------------------------------------------------------------


def score_by_tokens(selection: Selection, samples: list[Sample], compare: Comparison) -> Scores:
    """Return the mean of ``compare`` over all tokens of all samples, for each layer and for each unit.

    Every process must call this.
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
        tokens: each sample's number of tokens, (samples,), or (samples, places) where it differs by place.
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
            # A place adds up: images and videos of one row can run through a vision tower one after the other.
            sums[:, place] += torch.stack([compare(before, after, mask), mask.sum(dim=1)], dim=1).double().cpu()

        with watching_places(selection, record):
            call(run, inputs)
        return [row.clone() for row in sums]

    with scoring(selection):
        return over_samples(selection, samples, measure, count_fitting(run, samples))


def name_places(selection: Selection) -> list[str]:
    """Return the name in messages of every measured place: layers, or units if units are smaller."""
    if selection.by_layer:
        return [f"layer {name}" for name in selection.stack.names]
    return [unit.name for unit in selection.units]


def list_sides(selection: Selection) -> list[Side]:
    """Return the side of the model that each place of ``name_places`` is in."""
    stack = selection.stack
    layers = range(len(stack.layers)) if selection.by_layer else [unit.layer for unit in selection.units]
    return [stack.sides[stack.side_of[layer]] for layer in layers]


def arrange_scores(selection: Selection, values: list[float | None], unscored: dict[int, str]) -> Scores:
    """Return the scores of every place as scores of layers, and of units if units are smaller.

    ``unscored``: why a place has no score, by place.
    """
    if selection.by_layer:
        return Scores(values, {selection.stack.names[place]: why for place, why in unscored.items()})
    units = {unit.name: value for unit, value in zip(selection.units, values)}
    found = [(selection.units[place], why) for place, why in unscored.items()]
    by_layer = {selection.stack.names[unit.layer]: f"{unit.name}: {why}" for unit, why in found}
    return Scores(selection.find_highest_by_layer(units), by_layer, units=units)


def conclude(
    measured: torch.Tensor | None, places: list[str], samples: list[Sample], score: Callable[[torch.Tensor], Scores]
) -> Scores:
    """Return the scores that process 0 computes of its measurements. Every process must call this.

    Args:
        measured: (samples, places, ...), None on the other processes.
        places: the names of the measured places, in the order that the model runs them.
        samples: the measured samples.
        score: computes scores from measurements.

    Raises:
        LayerselError: on every process, naming the place and the training row of a number that is not finite.
    """

    def decide() -> Scores:
        assert measured is not None, "process 0 has the measurements"
        sums = measured.flatten(2).sum(dim=-1) if measured.dim() > 2 else measured
        bad = (~sums.isfinite()).nonzero()
        if len(bad):
            place, sample = min((int(place), int(sample)) for sample, place in bad)
            raise LayerselError(
                f"layersel.selection.method: NaN or infinity in {places[place]} for training row "
                f"{samples[sample].row}. Look at that row and at the base model's precision (fp16 overflows; try bf16)."
            )
        return score(measured)

    return collectives.decide_on_rank_zero(decide)


# --- Samples ------------------------------------------------------------------------------------------------------


def find_share(run: Run, samples: int) -> range:
    """Return the indices of the samples that this process measures."""
    ranks, rank = run.engine.list_ranks_with_weights(), collectives.get_rank()
    return range(ranks.index(rank), samples, len(ranks)) if rank in ranks else range(0)


def over_samples(
    selection: Selection, samples: list[Sample], measure: Callable[[list[int]], list[torch.Tensor]], size: int
) -> torch.Tensor | None:
    """Return ``measure`` of every sample, stacked in order, on process 0; each process measures its share in batches.

    ``measure``: returns a tensor for each of the samples at the indices that it is called with.
    """
    run = selection.run
    ranks = run.engine.list_ranks_with_weights()
    share = find_share(run, len(samples))
    mine = sorted(share, key=lambda i: count_tokens(samples[i]))
    batches = [mine[start : start + size] for start in range(0, len(mine), size)]
    most = math.ceil(math.ceil(len(samples) / len(ranks)) / size)
    if run.engine.runs_in_lockstep:
        # All processes gather each layer equally often: one with fewer batches repeats a sample, and drops the result.
        batches += [[0]] * (most - len(batches))
    measured: dict[int, torch.Tensor] = {}
    with showing_progress(selection, samples, batches) as progress:
        for round_ in range(most):
            if round_ < len(batches):
                values = measure(batches[round_])
                measured.update({index: value for index, value in zip(batches[round_], values) if index in share})
            # Processes wait for each other in every round, as collective calls time out after half an hour.
            stop_if_signalled(run.device)
            if round_ < len(batches):
                progress.advance(count_padded(samples, batches[round_]))
    return collectives.gather_on_rank_zero(measured, ranks)


def showing_progress(selection: Selection, samples: list[Sample], batches: list[list[int]]) -> PhaseProgress:
    """Return the progress of a pass over the ``batches`` of this process, and log on process 0 that it begins.

    Its work is counted in tokens, because the batches with the shortest rows come first.
    """
    shown, settings, backward = collectives.get_rank() == 0, selection.settings, selection.method.needs_backward
    if shown:
        LOG.info(
            "layersel: scoring by %s begins: a forward %spass over %d rows, drawn by seed %d",
            settings.method,
            "and a backward " if backward else "",
            len(samples),
            settings.seed,
        )
    tokens = count_trained_tokens(selection.run, samples) if backward else None

    def find_training() -> float | None:
        each = progress.pace.find_seconds_per_work()
        return None if each is None or tokens is None else each * tokens

    total = sum(count_padded(samples, batch) for batch in batches)
    progress = PhaseProgress("scoring", total, shown, find_training, "Lower `num_samples` to shorten it.")
    return progress


def count_padded(samples: list[Sample], batch: list[int]) -> int:
    """Return the number of tokens in a batch of ``samples``, with padding."""
    return len(batch) * max(count_tokens(samples[i]) for i in batch)


def count_trained_tokens(run: Run, samples: list[Sample]) -> float | None:
    """Return about how many tokens training passes forward and backward on each process, None if that is unknown.

    It is known if a row of training is a row of tokens, as it is in ``samples``. In preference training a row is two of
    them. Engines that gather each layer are left out, because training does not gather like a pass that scores.
    """
    arguments: Any = run.trainer.args
    columns = getattr(run.trainer.train_dataset, "column_names", None) or ()
    if arguments.max_steps <= 0 or "input_ids" not in columns or are_collated(samples) or run.engine.is_streamed:
        return None
    row = sum(map(count_tokens, samples)) / len(samples)
    if getattr(arguments, "sample_packing", False):
        row = arguments.max_seq_length
    rows = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    return arguments.max_steps * rows * row


def count_fitting(run: Run, samples: list[Sample], with_graph: bool = False) -> int:
    """Return how many samples fit a forward pass of the size that training takes; a packed row holds several.

    If every pass streams the whole model to the device, more samples share one. They need the memory of one layer's
    activations, and ``with_graph`` that of the hidden states between the layers. Collated rows are batches of one.
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
    """Return whether the trainer's collator makes the model's inputs of samples, each as a batch of one row."""
    return any(sample.make_inputs for sample in samples)


def count_tokens(sample: Sample) -> int:
    """Return the number of tokens of a sample, including those of its decoder."""
    return len(sample.input_ids) + len(sample.decoder_input_ids or [])


def make_inputs(run: Run, samples: list[Sample]) -> dict[str, Any]:
    """Return samples as a batch on the trainer's device.

    A collated sample must be the only one; its inputs are all that the collator returns, such as pixels and grid sizes.
    """
    (make, *others) = [sample.make_inputs for sample in samples]
    if make is not None:
        assert not others, "collated rows share no pass"
        return trainers.prepare_inputs(run.trainer, make())
    tokenizer = getattr(run.trainer.processing_class, "tokenizer", run.trainer.processing_class)
    pad_token_id = getattr(tokenizer, "pad_token_id", None)
    # Without a padding token any id will do, because padding is masked.
    return collate(samples, 0 if pad_token_id is None else pad_token_id, run.device)


def call(run: Run, inputs: dict[str, Any], logits_to_keep: int = 1) -> Any:
    """Run the model under the adapter, without a cache; logits of the last ``logits_to_keep`` tokens (0: all)."""
    base = run.base
    known = inspect.signature(base.forward).parameters
    optional = ("token_type_ids", "decoder_input_ids", "decoder_attention_mask")
    options = {"use_cache": False, "logits_to_keep": logits_to_keep, **{key: inputs.get(key) for key in optional}}
    others = {key: value for key, value in inputs.items() if key not in options}
    return base(**others, **{key: value for key, value in options.items() if key in known})


# --- Hidden states ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def watching_places(selection: Selection, record: Callable[[int, torch.Tensor, torch.Tensor], None]) -> Iterator[None]:
    """Call ``record(place, before, after)`` with the hidden states around every place of ``name_places``.

    They are (samples, tokens, width), and the last ones precede any final norm.
    """
    stack, given = selection.stack, dict[int, torch.Tensor]()

    def before(layer: int, args: tuple, kwargs: dict) -> None:
        given[layer] = get_hidden(args, kwargs)

    def after(layer: int, output: object) -> None:
        record(layer, given.pop(layer), get_output(output))

    with contextlib.ExitStack() as watching:
        if selection.by_layer:
            watching.enter_context(hooking_layers(stack, before, after))
        else:
            places: dict[int, dict[tuple[str, ...], int]] = {}
            for place, unit in enumerate(selection.units):
                places.setdefault(unit.layer, {})[unit.parts] = place
            for layer, by_parts in places.items():
                watching.enter_context(watch_branches(stack.layers[layer], by_parts, record))
        yield


def arrange_tokens(
    selection: Selection, hidden: torch.Tensor, inputs: dict[str, torch.Tensor], side: Side
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return hidden states of one side of a model as (samples, tokens, width), and their mask, (samples, tokens).

    The tokens of a vision tower are the patches of all images of the batch's only row, in one or several calls.

    Raises:
        LayerselError: if the hidden states cannot be assigned to rows and tokens.
    """
    if side.name == VISION:
        hidden = hidden.flatten(0, -2)[None]
        return hidden, torch.ones(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
    own = inputs.get("decoder_attention_mask") if side.name == "decoder" else None
    mask = inputs.get("attention_mask") if own is None else own
    mask = (torch.ones_like(inputs["input_ids"]) if mask is None else mask).to(hidden.device)
    read = take_active(selection.run.base, hidden)
    if read.dim() != 3 or len(read) != len(mask) or read.shape[1] < mask.shape[1]:
        raise LayerselError(
            f"layersel.selection.method: {selection.method.name} compares hidden states of rows × tokens × width, and "
            f"in {type(side.owner).__name__} those of {' × '.join(map(str, mask.shape))} tokens are "
            f"{' × '.join(map(str, hidden.shape))}. Use method gradient or fisher, which compare none."
        )
    return read[:, : mask.shape[1]], mask  # LED pads rows to its attention window


def take_active(base: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Return the hidden states that the layers of a model read: the active one of several predictions.

    Gemma 3n has four predictions of each token's hidden state (AltUp, arXiv 2301.13310), (4, samples, tokens, width).
    Attention and MLP read and write the active one, by which the layer corrects the others.
    """
    active = getattr(base.config.get_text_config(), "altup_active_idx", None)
    return hidden[active] if active is not None and hidden.dim() == 4 else hidden


# --- The model's state --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def scoring(selection: Selection, keeps_activations: bool = False) -> Iterator[None]:
    """Put the model into the state for scoring, and restore everything afterwards.

    The model is in evaluation mode (no dropout), and no parameter requires a gradient. The run's own precision applies.
    The global random states do not change. Weights are where the engine allows them to be.

    ``keeps_activations``: keep those of all layers until the backward pass, as training without checkpointing does;
    otherwise each layer is computed again. Streamed layers always are.
    """
    run, stack = selection.run, selection.stack
    model, base = run.model, run.base
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # A vision tower is whole all at once: rows without an image do not run its layers, and processes gather together.
    streamed = [side for side in (*stack.sides, *stack.beside) if side.name != VISION]
    with contextlib.ExitStack() as state:
        state.enter_context(keep_random_state())
        state.callback(lambda: [parameter.requires_grad_(True) for parameter in trainable])
        state.enter_context(evaluating(model))
        model.requires_grad_(False)
        if not run.engine.has_weights():
            pass  # this process only waits for the others' measurements
        elif run.engine.is_streamed:
            state.enter_context(run.engine.materialize(tensors_outside(base, streamed)))
        elif not getattr(base, "hf_device_map", None):
            # DeepSpeed would move the model there itself, later.
            model.to(run.device)
        for side in (*stack.sides, *stack.beside):
            for layer in side.layers:
                gathers = run.engine.is_streamed and side in streamed
                recomputes = selection.method.needs_backward and not keeps_activations
                if gathers or recomputes:
                    state.enter_context(running_alone(run, layer, gathers))
                if keeps_activations:
                    state.enter_context(removing(layer.register_forward_pre_hook(begin_graph, with_kwargs=True)))
        state.enter_context(precision(run.trainer))
        state.enter_context(torch.no_grad())
        yield


def tensors_outside(base: nn.Module, sides: list[Side]) -> list[torch.Tensor]:
    """Return the parameters and buffers that lie in no layer of ``sides``, each once."""
    found: dict[int, torch.Tensor] = {}
    for name, module in base.named_modules():
        if not any(f"{name}.".startswith(f"{side.path}.") for side in sides):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                found[id(tensor)] = tensor
    return list(found.values())


def begin_graph(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Make a layer's hidden states require a gradient, because no parameter of the model does."""
    hidden = get_hidden(args, kwargs)
    if not torch.is_grad_enabled() or hidden.requires_grad:
        return None
    return set_hidden(args, kwargs, hidden.detach().requires_grad_())


def running_alone(run: Run, layer: nn.Module, gathers: bool) -> contextlib.AbstractContextManager[None]:
    """Compute ``layer`` again in backward passes within the block; ``gathers``: make it whole only as it runs."""
    original = layer.forward

    @contextlib.contextmanager
    def ready() -> Iterator[None]:
        with contextlib.ExitStack() as state:
            if gathers:
                state.enter_context(run.engine.materialize([*layer.parameters(), *layer.buffers()]))
            state.enter_context(precision(run.trainer))
            yield

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            with ready():
                return original(*args, **kwargs)
        return recompute(original, ready, args, {**kwargs, **{key: None for key in CACHES if key in kwargs}})

    return replacing_method(layer, "forward", forward)
