"""Backward passes of the rows' log-likelihood, and the gradients that reach the weights under LoRA on the way."""

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
from axolotl_layersel.selection.data.calibration import Sample, cut_sample
from axolotl_layersel.selection.data.label_alignment import IGNORED_LABEL, ROW, align, find_kind, row_log_likelihood
from axolotl_layersel.selection.passes import forward
from axolotl_layersel.selection.passes.hooks import removing, replacing_method
from axolotl_layersel.selection.passes.likelihood import count_tokens_at_a_time, differentiate
from axolotl_layersel.selection.passes.recomputation import find_impure
from axolotl_layersel.selection.types import Selection

# Length of the probe input, which shows how a model works.
PROBED_TOKENS = 16
# Takes the place of a module, its inputs, and the gradients of its outputs, a tensor (..., width) for each call. For
# LoRA on a parameter there are no inputs, and the gradient is that of the parameter, (experts, outputs, inputs).
Look = Callable[[int, list[torch.Tensor], list[torch.Tensor]], None]


# --- Measuring ----------------------------------------------------------------------------------------------------


class GradientRecorder:
    """Sums over the gradients of each sample at each of several modules; subclasses define them.

    Attributes:
        modules: the LoRA modules, in order.
        sums: (rows of the batch, modules), float64.
    """

    def __init__(self, modules: Sequence[LoraLayer]) -> None:
        self.modules = modules
        self.sums = torch.zeros(0)

    def begin(self, indices: list[int]) -> None:
        """Start a batch of the samples at ``indices``."""
        self.sums = torch.zeros(len(indices), len(self.modules), dtype=torch.float64)

    def record(self, place: int, given: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
        """Add the calls of the module at ``place`` in this batch, see ``Look``."""
        raise NotImplementedError

    def end(self) -> list[torch.Tensor]:
        """Return the sums of each sample, (modules,)."""
        return [row.clone() for row in self.sums]


def measure_gradients(
    selection: Selection, samples: list[Sample], recorder: GradientRecorder, keeps_activations: bool = False
) -> torch.Tensor | None:
    """Return what ``recorder`` sums over a backward pass of each sample, (samples, modules), float64, on process 0.

    ``keeps_activations``: see ``forward.scoring``. Every process must call this.

    Raises:
        LayerselError: if the rows have no labels of the kind that the model's logits answer, or layers cannot be
            computed again one at a time.
    """
    run = selection.run
    with forward.scoring(selection, keeps_activations):
        backward = prepare_backward(selection, samples, keeps_activations)
        size = find_batch_size(run, samples, recorder.modules)
        with watching_gradients(recorder.modules, recorder.record) as finish:

            def measure(indices: list[int]) -> list[torch.Tensor]:
                recorder.begin(indices)
                backward([samples[i] for i in indices])
                finish()
                return recorder.end()

            return forward.over_samples(selection, samples, measure, size)


# --- Gradients at modules -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def watching_gradients(modules: Sequence[LoraLayer], look: Look) -> Iterator[Callable[[], None]]:
    """Call ``look(place, given, gradients)`` in every backward pass through the base layer of each of ``modules``.

    It is called once the gradients of all calls of a module have arrived, so that no more is held than one layer
    computes. A module that several layers share is looked at once, with its inputs in all of them.

    Yields:
        A function that looks at modules one of whose calls had no gradient; call it after each backward pass.
    """
    watches = [
        ParameterWatch(place, module, look) if isinstance(module, ParamWrapper) else LinearWatch(place, module, look)
        for place, module in enumerate(modules)
    ]

    def finish() -> None:
        for watch in watches:
            watch.end()

    with contextlib.ExitStack() as hooks:
        for watch in watches:
            hooks.enter_context(watch.attached())
        yield finish


class LinearWatch:
    """Collects the inputs and output gradients of a linear module until those of all its calls have arrived.

    Most modules are called once. DeBERTa's attention also computes its relative positions, which depend on nothing that
    requires a gradient, by them; their output is made to require one.
    """

    def __init__(self, place: int, module: LoraLayer, look: Look) -> None:
        self.place, self.module, self.look = place, module, look
        self.announced = 0  # calls in layers that are computed again later
        self.waiting = 0  # calls whose gradients will arrive
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def attached(self) -> contextlib.AbstractContextManager[None]:
        """Watch the module within the block."""
        return removing(self.module.get_base_layer().register_forward_hook(self.begin))

    def begin(self, linear: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        """Wait for the gradient of a call's output."""
        if not torch.is_grad_enabled():
            self.announced += 1
            return None
        watched = output if output.requires_grad else output.detach().requires_grad_()
        self.waiting += 1
        watched.register_hook(functools.partial(self.record, args[0].detach()))
        return watched

    def record(self, given: torch.Tensor, gradient: torch.Tensor) -> None:
        """Take a gradient that has arrived, and look at the module with the last one."""
        self.seen.append((given, gradient.detach()))
        if len(self.seen) == max(self.announced, self.waiting):
            self.end()

    def end(self) -> None:
        """Look at the module, if gradients have arrived since the last look, and start anew."""
        seen, self.seen, self.announced, self.waiting = self.seen, [], 0, 0
        if seen:
            self.look(self.place, [given for given, _ in seen], [gradient for _, gradient in seen])


class ParameterWatch:
    """Passes on the gradient of a parameter under LoRA as it arrives.

    PEFT adds the result of ``get_delta_weight`` to the parameter, so the two have the same gradient.
    """

    def __init__(self, place: int, module: ParamWrapper, look: Look) -> None:
        self.place, self.module, self.look = place, module, look
        self.compute = module.get_delta_weight
        self.called = False

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Watch the module within the block."""
        with (
            replacing_method(self.module, "get_delta_weight", lambda *args, **kwargs: self.begin(*args, **kwargs)),
            removing(self.module.register_forward_hook(self.check_called)),
        ):
            yield

    def begin(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the change of the parameter by LoRA, and wait for its gradient."""
        self.called = True
        change = self.compute(*args, **kwargs)
        if torch.is_grad_enabled():
            change = change.detach().requires_grad_()
            change.register_hook(self.record)
        return change

    def record(self, gradient: torch.Tensor) -> None:
        """Look at a gradient that has arrived."""
        self.look(self.place, [], [orient(self.module, gradient.detach())])

    def check_called(self, module: nn.Module, args: tuple, output: object) -> None:
        """Raise LayerselError if the module has run without its ``get_delta_weight``."""
        if not self.called:
            raise LayerselError(
                "lora_target_parameters: something else than PEFT computes LoRA on experts here, such as a plugin "
                "with kernels for them, so the gradient by their weights is not to be seen. Remove it from "
                "`plugins` for `axolotl-layersel plan`, and give its plan to the run; or use method cka or cosine."
            )
        self.called = False

    def end(self) -> None:
        """Do nothing: every gradient was looked at as it arrived."""


def orient(module: ParamWrapper, gradient: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the parameter under a LoRA module as (experts, outputs, inputs) of that LoRA.

    In PEFT 0.20.0 this is the layout of 2-D parameters, and of 3-D ones whose dimensions PEFT has swapped.
    """
    if gradient.dim() == 2:
        return gradient[None]
    return gradient if module._did_swap_in_out_features else gradient.transpose(1, 2)


def split_rows(values: torch.Tensor, rows: int) -> torch.Tensor:
    """Return inputs of a module, or their gradients, as (rows, tokens, width): some models flatten all rows into one.

    All dimensions of a single row but the last are tokens, in whatever order: Longformer's attention has rows second.
    """
    if rows == 1:
        return values.flatten(0, -2)[None]
    return values if values.dim() > 2 else values.view(rows, -1, values.shape[-1])


# --- The pass -----------------------------------------------------------------------------------------------------


def prepare_backward(
    selection: Selection, samples: list[Sample], keeps_activations: bool = False
) -> Callable[[list[Sample]], None]:
    """Return a function that runs the backward pass of a batch's summed log-likelihood, see ``likelihood``.

    Call it, and what it returns, within ``forward.scoring``. Every process must call this.

    Args:
        selection: by a method that reads labels.
        samples: all samples that batches are made of.
        keeps_activations: as for ``forward.scoring``.

    Raises:
        LayerselError: see ``measure_gradients``.
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
        # A pass that communicates is made on all processes, even without a label here.
        if bool((padded != IGNORED_LABEL).any()) or run.engine.runs_in_lockstep:
            differentiate(run.base, lambda: compute_logits(run, batch), padded, at_a_time)

    return torch.enable_grad()(backward_rows if kind == ROW else backward_tokens)


def compute_logits(run: Run, batch: list[Sample]) -> torch.Tensor:
    """Return the logits of ``batch``: (rows, tokens, vocabulary), or (rows, outputs)."""
    return forward.call(run, forward.make_inputs(run, batch), logits_to_keep=0).logits


def cut_probe(samples: list[Sample]) -> Sample:
    """Return the beginning of the longest sample, or of collated samples, which cannot be cut, the shortest one."""
    if forward.are_collated(samples):
        return min(samples, key=forward.count_tokens)
    return cut_sample(max(samples, key=forward.count_tokens), PROBED_TOKENS)


def find_batch_size(run: Run, samples: list[Sample], modules: Sequence[LoraLayer]) -> int:
    """Return how many samples share a backward pass: 1 if gradients could not be assigned to samples.

    Call it within ``forward.scoring``. Every process must call this.
    """
    size = forward.count_fitting(run, samples, with_graph=True)
    if any(isinstance(module, ParamWrapper) for module in modules):
        return 1  # the gradient of a weight is summed over all rows
    if run.engine.has_weights() and not forward.are_collated(samples):  # collated samples never share a pass
        probe = [cut_probe(samples)] * 2
        size = 1 if any_routed(modules, lambda: compute_logits(run, probe)) else size
    # Process 0 has weights on every engine. All processes make equally many passes.
    return collectives.decide_on_rank_zero(lambda: size)


def any_routed(modules: Sequence[LoraLayer], call: Callable[[], object]) -> bool:
    """Return whether the input of a module is something else than the rows' tokens in their order.

    Experts get tokens in an order that does not tell their row, and DeBERTa's attention gets relative positions that
    all rows share.

    ``call``: runs the model on two rows of the same length.
    """
    given: list[torch.Size] = []
    with contextlib.ExitStack() as hooks:
        for module in modules:
            handle = module.get_base_layer().register_forward_pre_hook(lambda _, args: given.append(args[0].shape))
            hooks.enter_context(removing(handle))
        call()
    tokens = max((shape[1] for shape in given if len(shape) > 2), default=0)
    others = any(shape[0] != (2 * tokens if len(shape) == 2 else 2) for shape in given)
    return others or len(given) < len(modules)


def check_layers_pure(selection: Selection, samples: list[Sample]) -> None:
    """Raise LayerselError on every process if a layer reads more than its arguments. Every process must call this."""
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
