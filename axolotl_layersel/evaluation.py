"""Let a model compute without dropout for a while."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put ``model`` into evaluation mode within the block, then each of its modules into the mode that it was in."""
    before = {module: module.training for module in model.modules()}
    try:
        for module in before:
            # Not where weights are in 4 bits, which knows no dropout: seen in bitsandbytes 0.50.2, it packs them anew,
            # coarser and for good, when they first see data in evaluation mode on a CPU.
            module.training = hasattr(getattr(module, "weight", None), "quant_state")
        yield
    finally:
        for module, training in before.items():
            module.training = training
