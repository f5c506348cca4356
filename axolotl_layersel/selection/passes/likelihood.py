"""The gradient of one sample's log-likelihood, without the logits of all its tokens at once.

Logits, with what their loss and its gradient take, are 12 bytes or more for every token and word of the vocabulary.
So the model's body runs once; then the model is called again and again, while its body returns what it has computed,
for a few tokens at a time. Whatever lies between hidden states and logits (biases, scalings, soft caps, LoRA) is the
model's own code.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from axolotl_layersel.selection.data.label_alignment import IGNORED_LABEL, log_likelihood

LOG = logging.getLogger("axolotl.layersel")

# Logits that are held at a time; with their gradients some 200 MB.
LOGITS_AT_A_TIME = 2**24
# Logits computed for other tokens beside them differ by rounding: 4e-3 of a number in bf16. Those that depend on the
# tokens beside them differ by as much as they are.
ROUNDING = 0.02


class Replay:
    """What a body returned when it ran, and which part of it the next call of the model sees.

    Attributes:
        calls: of the body.
        output: what it returned at the first.
        positions: tokens whose hidden states it returns at the next call.
        part: those hidden states at the last call, (rows, positions, width), in a graph of their own.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.output: Any = None
        self.positions: Any = slice(None)
        self.part: torch.Tensor | None = None

    @property
    def hidden(self) -> torch.Tensor:
        """The hidden states of all tokens, (rows, tokens, width), in the graph of the body."""
        return self.output.last_hidden_state

    def give(self) -> Any:
        """Return the output with the hidden states of ``positions`` alone, or as it is where it has none."""
        if not isinstance(self.output, ModelOutput) or getattr(self.output, "last_hidden_state", None) is None:
            return self.output
        self.part = self.hidden[:, self.positions].detach().requires_grad_(self.hidden.requires_grad)
        return type(self.output)(**{**self.output, "last_hidden_state": self.part})


@contextlib.contextmanager
def replaying(body: nn.Module) -> Iterator[Replay]:
    """Let ``body`` run at the first call within the block only."""
    replay, original, own = Replay(), body.forward, body.__dict__.get("forward")

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        replay.calls += 1
        if replay.output is None:
            replay.output = original(*args, **kwargs)
        return replay.give()

    body.forward = forward
    try:
        yield replay
    finally:
        del body.forward
        if own is not None:
            body.forward = own


@torch.no_grad()
def count_tokens_at_a_time(base: nn.Module, call: Callable[[], torch.Tensor]) -> int | None:
    """Return how many tokens' logits to compute at a time; None where only all can be computed together.

    Args:
        base: a transformers model.
        call: runs it on one short sample and returns the logits, (tokens, vocabulary).
    """
    body = getattr(base, "base_model", base)
    reason = None if body is not base else "it has no body that is called for hidden states to make logits of"
    if reason is None:
        with replaying(body) as replay:
            logits = call()
            if replay.calls != 1 or replay.part is None:
                reason = "it has no body that returns hidden states for a head to make logits of"
            else:
                replay.positions = torch.arange(len(logits), device=replay.hidden.device).flip(0)[
                    : len(logits) // 2 + 1
                ]
                try:
                    again, expected = call(), logits[replay.positions.to(logits.device)]
                    if again.shape != expected.shape or (again - expected).norm() > ROUNDING * expected.norm():
                        reason = "the logits of a token depend on the hidden states of others"
                except (IndexError, RuntimeError, TypeError, ValueError) as error:
                    reason = f"its head does not take the hidden states of some tokens alone ({error})"
    if reason is None:
        return max(1, LOGITS_AT_A_TIME // logits.shape[-1])
    LOG.debug("layersel: %s computes the logits of all tokens at once: %s", type(base).__name__, reason)
    return None


def differentiate(
    base: PreTrainedModel, call: Callable[[], torch.Tensor], targets: torch.Tensor, at_a_time: int | None
) -> None:
    """Send the gradient of the targets' log-likelihood through the model, in one backward pass.

    Args:
        base: a transformers model.
        call: runs it on the rows and returns the logits, (rows, tokens, vocabulary).
        targets: (rows, tokens), the label that the logits at each token answer, −100 where none.
        at_a_time: as ``count_tokens_at_a_time`` returns it, for one row.
    """

    def backward(logits: torch.Tensor, targets: torch.Tensor) -> None:
        log_likelihood(logits.flatten(0, 1), targets.flatten().to(logits.device)).backward()

    if at_a_time is None:
        backward(call(), targets)
        return
    at_a_time = max(1, at_a_time // len(targets))
    answered = (targets != IGNORED_LABEL).any(dim=0).nonzero().flatten()
    if len(answered) == 0:
        answered = torch.zeros(1, dtype=torch.int64)  # its gradient is 0: a pass that ranks make together
    with replaying(base.base_model) as replay:
        gradients = []
        for positions in answered.split(at_a_time):
            replay.positions = positions
            backward(call(), targets[:, positions])
            assert replay.part is not None and replay.part.grad is not None, "the logits were made of it"
            gradients.append(replay.part.grad)
        gradient = torch.zeros_like(replay.hidden)
        gradient[:, answered] = torch.cat(gradients, dim=1)
        replay.hidden.backward(gradient)
