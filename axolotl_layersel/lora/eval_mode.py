"""Run a model temporarily as in evaluation: without dropout, in the run's precision."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers import Trainer


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put ``model`` into evaluation mode within the block, and restore the mode of each module afterwards."""
    before = {module: module.training for module in model.modules()}
    try:
        for module in before:
            # 4-bit layers stay in training mode, since they have no dropout: on a CPU bitsandbytes 0.50.2 repacks their
            # weights, permanently and less precisely, when they first run in evaluation mode.
            module.training = hasattr(getattr(module, "weight", None), "quant_state")
        yield
    finally:
        for module, training in before.items():
            module.training = training


def precision(trainer: Trainer) -> torch.autocast:
    """Return the run's mixed precision as a context; DeepSpeed casts only inside its engine."""
    dtype = torch.bfloat16 if trainer.args.bf16 else torch.float16
    return torch.autocast(trainer.args.device.type, dtype=dtype, enabled=trainer.args.bf16 or trainer.args.fp16)
