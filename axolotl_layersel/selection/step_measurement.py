"""Measure what the cut of the backward pass saves, in the first steps of a run: ``layersel.selection.time``.

Some of these steps run without the cut. No weight trains below it, so gradients and weights are the same with and
without it, and only the time differs.
"""

import logging
import time
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from axolotl_layersel.engines.collectives import gather_from_all, get_rank
from axolotl_layersel.engines.trainers import generates
from axolotl_layersel.lora.backward_end import find_input_embeddings
from axolotl_layersel.lora.run import Run
from axolotl_layersel.selection.backward_cut import TruncatedBackward
from axolotl_layersel.selection.callback import LayerSelectionCallback

LOG = logging.getLogger("axolotl.layersel")
# Optimizer steps of this process, from 1. Those before warm up caches and allocators.
MEASURED = range(9, 21)
MIDDLE = 15
# The most of the free memory that a step without the cut may be expected to take.
SAFE_MEMORY = 0.9


def is_cut(step: int, settling: int) -> bool:
    """Return whether the backward pass is cut in a measured step.

    Steps alternate, or with steps that settle the first half is cut. ``settling``: see ``Engine``.
    """
    return step < MIDDLE if settling else step % 2 == 1


def counts(step: int, settling: int) -> bool:
    """Return whether the time of a measured step counts: not while the engine settles."""
    first = MEASURED.start if step < MIDDLE else MIDDLE
    return step - first >= settling


def expect_peak(held: int, peak: int, share: float) -> float:
    """Return the most bytes that a step without the cut can be expected to take.

    A step with the cut holds the activations of the layers that train, and one without it those of all layers.

    Args:
        held: the bytes between two steps.
        peak: the most bytes so far.
        share: the share of the layers with a backward pass.
    """
    return held + (peak - held) / share


class StepMeasurement(TrainerCallback):
    """Times steps with and without the cut, and logs their ratio once.

    It measures nothing in a run of fewer steps, with ``torch_compile``, which would compile the model again, in a run
    that generates its data, and where a step without the cut may not fit into the memory of the GPU.

    Args:
        run: the run; its trainer calls this callback after ``cutting``.
        cutting: the callback that cuts the backward pass.
        expected: the ratio by the formula.
    """

    def __init__(self, run: Run, cutting: LayerSelectionCallback, expected: float) -> None:
        self.run = run
        self.cutting = cutting
        self.expected = expected
        self.step = 0
        self.measures = False
        self.tokens = 0
        self.began = 0.0
        self.seconds: dict[bool, list[float]] = {}  # per token, by whether the pass was cut
        self.counter: torch.utils.hooks.RemovableHandle | None = None

    @property
    def truncated(self) -> TruncatedBackward:
        assert self.cutting.truncated is not None, "the other callback has cut the pass"
        return self.cutting.truncated

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.stop()  # training may have failed, and begin again
        self.step, self.seconds = 0, {True: [], False: []}
        self.measures = (
            state.max_steps - state.global_step >= MEASURED.stop - 1
            and self.run.device.type in ("cpu", "cuda")
            and not args.torch_compile
            and not generates(self.run.trainer)
            and self.truncated.can_open()
        )

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.step += 1
        if not self.measures or self.step not in MEASURED:
            return
        if self.step == MEASURED.start:
            self.start_counting()
        self.truncated.close()
        if not is_cut(self.step, self.run.engine.settling_steps):
            self.truncated.open()
        self.tokens, self.began = 0, self.read_clock()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not self.measures:
            return
        if self.step == MEASURED.start - 1:
            # All processes must agree, because passes communicate on some engines.
            self.measures = all(gather_from_all(self.has_room()))
        if self.step not in MEASURED:
            return
        settling = self.run.engine.settling_steps
        if counts(self.step, settling):
            self.seconds[is_cut(self.step, settling)].append((self.read_clock() - self.began) / max(self.tokens, 1))
        if self.step == MEASURED[-1]:
            self.stop()
            self.report()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.stop()

    def start_counting(self) -> None:
        """Count the tokens that the model reads, with padding."""

        def count(module: torch.nn.Module, given: tuple[Any, ...]) -> None:
            self.tokens += given[0].numel() if given else 0

        embeddings = find_input_embeddings(self.run.base)
        assert embeddings is not None, "the pass can be opened"
        self.counter = embeddings.register_forward_pre_hook(count)

    def stop(self) -> None:
        """Leave the run as it is without a measurement."""
        self.measures = False
        if self.counter is not None:
            self.counter.remove()
            self.counter = None
        self.truncated.close()

    def read_clock(self) -> float:
        """Return the time in seconds when all work so far is done."""
        if self.run.device.type == "cuda":
            torch.cuda.synchronize(self.run.device)
        return time.perf_counter()

    def has_room(self) -> bool:
        """Return whether a step without the cut fits into the memory of this process's GPU."""
        device = self.run.device
        if device.type != "cuda":
            return True
        layers = len(self.truncated.stack.layers)
        held, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        expected = expect_peak(held, peak, (layers - self.truncated.lowest) / layers)
        return expected <= SAFE_MEMORY * (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))

    def report(self) -> None:
        """Log the measured ratio, on process 0."""
        if get_rank() == 0:
            LOG.info(
                "layersel: a step takes %.2f of its time without the cut, measured in steps %d to %d (formula: %.2f)",
                median(self.seconds[True]) / median(self.seconds[False]),
                MEASURED[0],
                MEASURED[-1],
                self.expected,
            )
