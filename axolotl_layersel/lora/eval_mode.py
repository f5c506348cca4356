"""Let a model compute for a while as it is evaluated in a run: without dropout, in the run's precision."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers import Trainer


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put ``model`` into evaluation mode within the block, then each of its modules into the mode that it was in."""
    before = {module: module.training for module in model.modules()}
    try:
        for module in before:
            # A 4-bit layer has no dropout, and stays in training mode: bitsandbytes 0.50.2 packs its weights again,
            # coarser and for good, when they first see data in evaluation mode on a CPU.
            module.training = hasattr(getattr(module, "weight", None), "quant_state")
        yield
    finally:
        for module, training in before.items():
            module.training = training


def precision(trainer: Trainer) -> torch.autocast:
    """Return the run's mixed precision as a context; DeepSpeed's own casting happens in its engine only."""
    dtype = torch.bfloat16 if trainer.args.bf16 else torch.float16
    return torch.autocast(trainer.args.device.type, dtype=dtype, enabled=trainer.args.bf16 or trainer.args.fp16)
