"""The gradient of the rows' log-likelihood, without the logits of all tokens at once.

Logits, with their loss and its gradient, take 12 bytes or more for every token and entry of the vocabulary. So the
model's body runs once. Then the model is called for a few tokens at a time, and its body returns their hidden states
from memory. Whatever lies between hidden states and logits (biases, scalings, soft caps, LoRA) is the model's own code.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from axolotl_layersel.selection.data.label_alignment import IGNORED_LABEL, log_likelihood
from axolotl_layersel.selection.passes.hooks import replacing_method
from axolotl_layersel.selection.passes.sizes import LOGITS_AT_A_TIME

LOG = logging.getLogger("axolotl.layersel")

# Logits of a token computed with other tokens differ by rounding: 4e-3 of a number in bf16. If they depend on the other
# tokens, they differ by their own size.
ROUNDING = 0.02


class Replay:
    """The output of a model's body, and the part of it that the next call of the model gets.

    Attributes:
        calls: the number of calls of the body.
        output: the body's output at the first call.
        positions: the tokens whose hidden states the body returns at the next call.
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
        """Return the output with the hidden states of ``positions`` only, or unchanged if it has no hidden states."""
        if not isinstance(self.output, ModelOutput) or getattr(self.output, "last_hidden_state", None) is None:
            return self.output
        self.part = self.hidden[:, self.positions].detach().requires_grad_(self.hidden.requires_grad)
        return type(self.output)(**{**self.output, "last_hidden_state": self.part})


@contextlib.contextmanager
def replaying(body: nn.Module) -> Iterator[Replay]:
    """Let ``body`` run only at the first call within the block, and replay its output afterwards."""
    replay, original = Replay(), body.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        replay.calls += 1
        if replay.output is None:
            replay.output = original(*args, **kwargs)
        return replay.give()

    with replacing_method(body, "forward", forward):
        yield replay


@torch.no_grad()
def count_tokens_at_a_time(base: nn.Module, call: Callable[[], torch.Tensor]) -> int | None:
    """Return how many tokens' logits to compute at a time; None if they can only be computed all together.

    Args:
        base: a transformers model.
        call: runs it on one short sample and returns the logits, (tokens, vocabulary).
    """
    body = getattr(base, "base_model", base)
    if body is base:
        reason: str | None = "it has no body that is called for hidden states to make logits of"
    else:
        with replaying(body) as replay:
            logits = call()
            reason = find_dependence(replay, call, logits)
    if reason is None:
        return max(1, LOGITS_AT_A_TIME // logits.shape[-1])
    LOG.debug("layersel: %s computes the logits of all tokens at once: %s", type(base).__name__, reason)
    return None


def find_dependence(replay: Replay, call: Callable[[], torch.Tensor], logits: torch.Tensor) -> str | None:
    """Return why logits cannot be computed for some tokens only, None if they can.

    ``logits``: of the first call, (tokens, vocabulary).
    """
    if replay.calls != 1 or replay.part is None:
        return "it has no body that returns hidden states for a head to make logits of"
    # More than half of the tokens, last ones first.
    replay.positions = torch.arange(len(logits), device=replay.hidden.device).flip(0)[: len(logits) // 2 + 1]
    try:
        again, expected = call(), logits[replay.positions.to(logits.device)]
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        return f"its head does not take the hidden states of only some tokens ({error})"
    if again.shape != expected.shape or (again - expected).norm() > ROUNDING * expected.norm():
        return "the logits of a token depend on the hidden states of others"
    return None


def differentiate(
    base: PreTrainedModel, call: Callable[[], torch.Tensor], targets: torch.Tensor, at_a_time: int | None
) -> None:
    """Run the backward pass of the targets' log-likelihood through the model, once.

    Args:
        base: a transformers model.
        call: runs it on the rows and returns the logits, (rows, tokens, vocabulary).
        targets: (rows, tokens), the label that the logits at each token answer, −100 without one.
        at_a_time: the result of ``count_tokens_at_a_time``, for one row.
    """

    def backward(logits: torch.Tensor, targets: torch.Tensor) -> None:
        log_likelihood(logits.flatten(0, 1), targets.flatten().to(logits.device)).backward()

    if at_a_time is None:
        backward(call(), targets)
        return
    at_a_time = max(1, at_a_time // len(targets))
    answered = (targets != IGNORED_LABEL).any(dim=0).nonzero().flatten()
    if len(answered) == 0:
        answered = torch.zeros(1, dtype=torch.int64)  # its gradient is 0, in a pass that all processes make
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
