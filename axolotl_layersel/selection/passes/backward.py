"""Backward passes of the rows' log-likelihood, and the gradients that arrive at the weights under LoRA on the way."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import nn

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.engines import collectives
from axolotl_layersel.lora.run import Run
from axolotl_layersel.selection.choosing import Selection
from axolotl_layersel.selection.data.calibration import Sample, cut_sample
from axolotl_layersel.selection.data.label_alignment import IGNORED_LABEL, ROW, align, find_kind, row_log_likelihood
from axolotl_layersel.selection.passes import forward
from axolotl_layersel.selection.passes.likelihood import count_tokens_at_a_time, differentiate
from axolotl_layersel.selection.passes.recomputation import find_impure

# Tokens of a forward pass that shows how a model works.
PROBED_TOKENS = 16
# What a module was given in each of its calls, and the gradients by what it returned, each (..., width). Of LoRA on a
# parameter nothing, and the gradient by the parameter itself, (experts, outputs, inputs).
Look = Callable[[int, list[torch.Tensor], list[torch.Tensor]], None]


@contextlib.contextmanager
def watching_gradients(modules: Sequence[LoraLayer], look: Look) -> Iterator[Callable[[], None]]:
    """Call ``look(place, given, gradients)`` in every backward pass through the base layer of each of ``modules``.

    It is called when the gradients of all calls of the module have arrived, so that no more than what one layer
    computes is held, and of a module that several layers share what it is given in all of them. Most modules are called
    once. DeBERTa also puts its relative positions through those of its
    attention, which depend on nothing that requires a gradient: there their output is made to.

    Yields:
        What looks at modules of which one call had no gradient, as nothing was made of its output; call it after each
        backward pass.
    """
    # Calls in layers that are computed again later, and calls of which gradients are to arrive.
    announced, waiting = [0] * len(modules), [0] * len(modules)
    seen: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in modules]

    def finish(place: int) -> None:
        calls, announced[place], waiting[place], seen[place] = seen[place], 0, 0, []
        look(place, [given for given, _ in calls], [gradient for _, gradient in calls])

    @contextlib.contextmanager
    def watch_parameter(place: int, module: ParamWrapper) -> Iterator[None]:
        # PEFT adds to the parameter what this returns, so the gradient by the one is that by the other.
        compute, calls = module.get_delta_weight, []

        @functools.wraps(compute)
        def get_delta_weight(*args: Any, **kwargs: Any) -> torch.Tensor:
            change = compute(*args, **kwargs)
            calls.append(change.shape)
            if torch.is_grad_enabled():
                change = change.detach().requires_grad_()
                change.register_hook(lambda gradient: look(place, [], [orient(module, gradient.detach())]))
            return change

        def check_called(module: nn.Module, args: tuple, output: object) -> None:
            if not calls:
                raise LayerselError(
                    "lora_target_parameters: something else than PEFT computes LoRA on experts here, such as a plugin "
                    "with kernels for them, so the gradient by their weights is not to be seen. Remove it from "
                    "`plugins` for `axolotl-layersel plan`, and give its plan to the run; or use method cka or cosine."
                )
            calls.clear()

        vars(module)["get_delta_weight"] = get_delta_weight
        try:
            with forward.handle_removed(module.register_forward_hook(check_called)):
                yield
        finally:
            del vars(module)["get_delta_weight"]

    def watch(place: int, module: LoraLayer) -> torch.utils.hooks.RemovableHandle:
        def hook(linear: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
            if not torch.is_grad_enabled():
                announced[place] += 1
                return None
            given, watched = args[0].detach(), output if output.requires_grad else output.detach().requires_grad_()
            waiting[place] += 1

            def receive(gradient: torch.Tensor) -> None:
                seen[place].append((given, gradient.detach()))
                if len(seen[place]) == max(announced[place], waiting[place]):
                    finish(place)

            watched.register_hook(receive)
            return watched

        return module.get_base_layer().register_forward_hook(hook)

    def finish_others() -> None:
        for place, calls in enumerate(seen):
            if calls:
                finish(place)
            announced[place] = waiting[place] = 0

    with contextlib.ExitStack() as hooks:
        for place, module in enumerate(modules):
            if isinstance(module, ParamWrapper):
                hooks.enter_context(watch_parameter(place, module))
            else:
                hooks.enter_context(forward.handle_removed(watch(place, module)))
        yield finish_others


def orient(module: ParamWrapper, gradient: torch.Tensor) -> torch.Tensor:
    """Return the gradient by the parameter under a LoRA module as (experts, outputs, inputs), in that module's sense.

    In PEFT 0.20.0 it is so for 2-D parameters, and for 3-D ones where PEFT swapped their dimensions.
    """
    if gradient.dim() == 2:
        return gradient[None]
    return gradient if module._did_swap_in_out_features else gradient.transpose(1, 2)


def compute_logits(run: Run, batch: list[Sample]) -> torch.Tensor:
    """Return the logits of ``batch``: (rows, tokens, vocabulary), or (rows, outputs)."""
    return forward.call(run, forward.make_inputs(run, batch), logits_to_keep=0).logits


def cut_probe(samples: list[Sample]) -> Sample:
    """Return the beginning of the longest sample, on which a model is tried out.

    Rows that the trainer's collator makes cannot be cut: of them it is the shortest, as a whole.
    """
    if forward.are_collated(samples):
        return min(samples, key=forward.count_tokens)
    return cut_sample(max(samples, key=forward.count_tokens), PROBED_TOKENS)


def find_batch_size(run: Run, samples: list[Sample], modules: Sequence[LoraLayer]) -> int:
    """Return how many samples share a backward pass: one where it could not be told what of a gradient is whose.

    Call it within ``passes.scoring``; every rank must call this.
    """
    size = forward.count_fitting(run, samples, with_graph=True)
    if any(isinstance(module, ParamWrapper) for module in modules):
        return 1  # the gradient by a weight is that of all rows
    if run.engine.has_weights() and not forward.are_collated(samples):  # which are alone in any case
        probe = [cut_probe(samples)] * 2
        size = 1 if any_routed(modules, lambda: compute_logits(run, probe)) else size
    # Rank 0 has weights on every engine. All make as many passes, whatever they have seen of the model.
    return collectives.decide_on_rank_zero(lambda: size)


def any_routed(modules: Sequence[LoraLayer], call: Callable[[], object]) -> bool:
    """Return whether a module is given something else than the rows' tokens in their order.

    Experts are given tokens in an order that no longer says whose they are, and DeBERTa's attention is given its
    relative positions, which are all rows'.

    ``call``: runs the model on two rows that are as long as each other.
    """
    given: list[torch.Size] = []
    with contextlib.ExitStack() as hooks:
        for module in modules:
            handle = module.get_base_layer().register_forward_pre_hook(lambda _, args: given.append(args[0].shape))
            hooks.enter_context(forward.handle_removed(handle))
        call()
    tokens = max((shape[1] for shape in given if len(shape) > 2), default=0)
    others = any(shape[0] != (2 * tokens if len(shape) == 2 else 2) for shape in given)
    return others or len(given) < len(modules)


def split_rows(values: torch.Tensor, rows: int) -> torch.Tensor:
    """Return what a module was given, or its gradient, as (rows, tokens, width): some models put all rows into one.

    Of one row all dimensions but the last are tokens, in whatever order: Longformer's attention has rows second.
    """
    if rows == 1:
        return values.flatten(0, -2)[None]
    return values if values.dim() > 2 else values.view(rows, -1, values.shape[-1])


def prepare_backward(
    selection: Selection, samples: list[Sample], keeps_activations: bool = False
) -> Callable[[list[Sample]], None]:
    """Return what sends the gradient of a batch's summed log-likelihood through the model, see ``likelihood``.

    Call it, and what it returns, within ``passes.scoring``; every rank must call this. ``samples``: those that batches
    are made of. ``keeps_activations``: as it is given to ``passes.scoring``.

    Raises:
        LayerselError: if the rows have no labels of the kind that the model's logits answer, or layers cannot be
            computed again one at a time.
    """
    run = selection.run
    kind, at_a_time = find_kind(run.model), None
    check_labels(samples, kind, selection.method.name)
    if run.engine.is_streamed or not keeps_activations:
        check_layers_pure(selection, samples)
    if kind != ROW and run.engine.has_weights():
        probe = [cut_probe(samples)]
        at_a_time = count_tokens_at_a_time(run.base, lambda: compute_logits(run, probe)[0])

    def backward_rows(batch: list[Sample]) -> None:
        logits, problem_type = compute_logits(run, batch), run.base.config.problem_type
        labels = [align(torch.tensor(sample.labels), kind).to(logits.device) for sample in batch]
        pairs = zip(logits, labels)
        torch.stack([row_log_likelihood(row, label, problem_type) for row, label in pairs]).sum().backward()

    def backward_tokens(batch: list[Sample]) -> None:
        targets = [align(torch.tensor(sample.labels), kind) for sample in batch]
        padded = nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=IGNORED_LABEL)
        # Where a pass communicates, ranks make it together.
        if bool((padded != IGNORED_LABEL).any()) or run.engine.runs_in_lockstep:
            differentiate(run.base, lambda: compute_logits(run, batch), padded, at_a_time)

    def backward(batch: list[Sample]) -> None:
        with torch.enable_grad():
            (backward_rows if kind == ROW else backward_tokens)(batch)

    return backward


def check_layers_pure(selection: Selection, samples: list[Sample]) -> None:
    """Raise LayerselError on every rank where a layer reads what it is not given; every rank must call this."""
    run, stack, found = selection.run, selection.stack, None
    if run.engine.has_weights():
        probe = [cut_probe(samples)]
        layers = [layer for side in (*stack.sides, *stack.beside) for layer in side.layers]
        found = find_impure(layers, lambda: compute_logits(run, probe))
    name = collectives.decide_on_rank_zero(lambda: found)
    if name is not None:
        raise LayerselError(
            f"layersel.selection.method: {selection.method.name} computes layers again one at a time, and {name} reads "
            "of other layers what it is not given, through which no gradient would reach them. Use method cka or "
            "cosine, or on one process or DDP method gradient without `gradient_checkpointing`."
        )


def check_labels(samples: list[Sample], kind: str, method: str) -> None:
    """Raise LayerselError unless all samples have labels that logits of this ``kind`` answer, for ``method``."""
    for sample in samples:
        labels = sample.labels
        if kind == ROW and isinstance(labels, int | float):
            continue
        if isinstance(labels, list) and (kind == ROW or len(labels) == len(sample.list_tokens("decoder"))):
            continue
        what = "a label of each row" if kind == ROW else "labels of tokens"
        raise LayerselError(
            f"layersel.selection.method: {method} needs {what}, training row {sample.row} has none. Use cka."
        )
