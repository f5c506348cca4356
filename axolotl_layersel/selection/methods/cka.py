"""CKA: a layer is important if it changes its input's geometry much (Layer-wise LoRA, arXiv 2602.05988)."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.layer_names import VISION, name_layers
from axolotl_layersel.config.selection import Token
from axolotl_layersel.engines import collectives
from axolotl_layersel.selection.choosing import choose_by_score
from axolotl_layersel.selection.data.calibration import Sample, are_most, count_most_common, place_tokens
from axolotl_layersel.selection.data.row_token import find_token
from axolotl_layersel.selection.passes import forward
from axolotl_layersel.selection.passes.hooks import get_hidden, get_output, hooking_layers, removing
from axolotl_layersel.selection.types import Choice, Scores, Selection

LOG = logging.getLogger("axolotl.layersel")

# Embeddings of one repeated token differ only by rounding, about 1e-7 of their norm in fp32 and 4e-3 in bf16
# times zero: equal tokens give equal rows. Centring in fp64 then leaves about 1e-16; 1e-5 is far from both.
ZERO_VARIANCE = 1e-5


def choose(selection: Selection) -> Choice:
    """Return the units that change the geometry of their input most. Every process must call this."""
    return choose_by_score(selection, score)


def score(selection: Selection, samples: list[Sample]) -> Scores:
    """Return 1 − CKA of each layer's or branch's input and output at one token of each sample.

    Every process must call this.
    """
    setting, stack = selection.settings.token, selection.stack
    assert setting is not None, "CKA has a token"
    tokens = {side.name: find_token(selection.run.base, setting, side.name) for side in stack.sides}
    seeing = [sample for sample in samples if stack.vision is None or sample.pixels is not None]
    if not seeing:
        return Scores([None] * len(stack.layers), dict.fromkeys(stack.names, forward.NO_IMAGES))
    compared, positions = place_tokens(seeing, tokens)
    rows = {sample.row for sample in compared}
    if collectives.get_rank() == 0:
        report_rows(selection, len(samples), seeing, compared)
        for (side, token), placed in zip(tokens.items(), positions):
            report_token(compared, placed, setting, token, side)
    states = measure_token_states(selection, compared, *positions)
    if selection.by_layer:
        pairs = [(layer + side, layer + side + 1) for layer, side in enumerate(stack.side_of)]
    else:
        pairs = [(2 * place, 2 * place + 1) for place in range(len(selection.units))]

    def score_states(states: torch.Tensor) -> Scores:
        found = forward.arrange_scores(selection, *score_pairs(states, pairs))
        left_out = [sample.row for sample in samples if sample.row not in rows]
        return dataclasses.replace(found, left_out=left_out, token=tokens.get("", tokens))

    return forward.conclude(states, name_states(selection), compared, score_states)


def centre(representations: torch.Tensor) -> torch.Tensor:
    """Return ``representations``, (samples, width), in float64 with the mean of each column subtracted."""
    values = representations.double()
    return values - values.mean(dim=0, keepdim=True)


def is_constant(representations: torch.Tensor) -> bool:
    """Return whether all samples have the same representation: ‖Xc‖ ≤ 1e-5·‖X‖ (Frobenius)."""
    norm = representations.double().norm()
    return bool(centre(representations).norm() <= ZERO_VARIANCE * norm)


def linear_cka(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the linear CKA of two representations of the same samples, in [0, 1], computed in float64.

    CKA(X, Y) = ‖YcᵀXc‖²_F / (‖XcᵀXc‖_F · ‖YcᵀYc‖_F), with centred columns (Kornblith et al. 2019, eq. 4).
    With fewer samples than features the same numbers come from the Gram matrices K = XcXcᵀ and L = YcYcᵀ:
    ⟨K, L⟩ / (‖K‖·‖L‖), which are n×n.

    Args:
        first: (samples, features), any floating dtype.
        second: (samples, other features), any floating dtype.

    Raises:
        ValueError: if one of them is the same for all samples: CKA is 0/0 there.
    """
    if is_constant(first) or is_constant(second):
        raise ValueError("linear CKA is undefined where all samples have the same representation")
    x, y = centre(first), centre(second)
    if x.shape[0] < max(x.shape[1], y.shape[1]):
        gram_x, gram_y = x @ x.T, y @ y.T
        return float((gram_x * gram_y).sum() / (gram_x.norm() * gram_y.norm()))
    return float((y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


def score_pairs(states: torch.Tensor, pairs: list[tuple[int, int]]) -> tuple[list[float | None], dict[int, str]]:
    """Return the importance 1 − CKA(before, after) of each pair of representations, and why a pair has none.

    Args:
        states: (samples, representations, width).
        pairs: the representations before and after each layer or branch.
    """
    scores: list[float | None] = []
    reasons: dict[int, str] = {}
    constant = [is_constant(states[:, i]) for i in range(states.shape[1])]
    for place, (before, after) in enumerate(pairs):
        if constant[before] or constant[after]:
            where = "input" if constant[before] else "output"
            reasons[place] = f"its {where} is the same for all samples at the token chosen"
            scores.append(None)
        else:
            scores.append(1 - linear_cka(states[:, before], states[:, after]))
    return scores, reasons


class TokenStates:
    """Records hidden states of one token of each sample, see ``measure_token_states``.

    Attributes:
        positions: the positions of the token in each sample, by side; None for the mean over the tokens.
        indices: the samples of the batch.
        inputs: the model's inputs.
        rows: the recorded hidden states, (samples, width), each with its place.
        patches: by place, the patches of the images of the row, which can run one after the other.
    """

    def __init__(self, selection: Selection, samples: list[Sample], positions: Sequence[list[int] | None]) -> None:
        self.selection, self.samples, self.positions = selection, samples, positions
        self.stack = selection.stack
        self.indices: list[int] = []
        self.inputs: dict[str, Any] = {}
        self.rows: list[tuple[int, torch.Tensor]] = []
        self.patches: dict[int, list[torch.Tensor]] = {}

    def measure(self, indices: list[int]) -> list[torch.Tensor]:
        """Return the hidden states of the samples at ``indices``, each (places, width)."""
        self.begin(indices)
        with self.watching():
            forward.call(self.selection.run, self.inputs)
        return self.end()

    def begin(self, indices: list[int]) -> None:
        """Start a batch."""
        self.indices, self.rows, self.patches = indices, [], {}
        self.inputs = forward.make_inputs(self.selection.run, [self.samples[i] for i in indices])

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Record hidden states as the model runs within the block."""
        with contextlib.ExitStack() as watching:
            if not self.selection.by_layer:
                watching.enter_context(forward.watching_places(self.selection, self.record_branch))
            else:
                watching.enter_context(hooking_layers(self.stack, self.record_input))
                for number, side in enumerate(self.stack.sides):
                    end = functools.partial(self.record_end, number)
                    watching.enter_context(removing(side.owner.register_forward_hook(end)))
            yield

    def record_input(self, layer: int, args: tuple, kwargs: dict) -> None:
        """Record the input of a layer."""
        side = self.stack.side_of[layer]
        self.record(layer + side, get_hidden(args, kwargs), side)

    def record_end(self, side: int, owner: nn.Module, args: tuple, output: object) -> None:
        """Record the output of a side, after its final norm."""
        last = max(layer for layer, of in enumerate(self.stack.side_of) if of == side)
        self.record(last + side + 1, get_output(output), side)

    def record_branch(self, place: int, before: torch.Tensor, after: torch.Tensor) -> None:
        """Record the hidden states around a branch."""
        side = self.stack.side_of[self.selection.units[place].layer]
        self.record(2 * place, before, side)
        self.record(2 * place + 1, after, side)

    def record(self, place: int, hidden: torch.Tensor, side: int) -> None:
        """Record one token of each row of ``hidden``."""
        hidden, mask = forward.arrange_tokens(self.selection, hidden, self.inputs, self.stack.sides[side])
        placed = self.positions[side]
        if self.stack.sides[side].name == VISION:
            self.patches.setdefault(place, []).append(hidden)
            return
        if placed is None:
            kept = (hidden.float() * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        else:
            kept = hidden[torch.arange(len(self.indices)), [placed[i] for i in self.indices]]
        self.rows.append((place, kept.float().cpu()))

    def end(self) -> list[torch.Tensor]:
        """Return the hidden states of each sample of the batch, (places, width).

        Raises:
            LayerselError: if a place was recorded twice or not at all.
        """
        means = [(place, torch.cat(seen, dim=1).float().mean(dim=1).cpu()) for place, seen in self.patches.items()]
        rows = sorted([*self.rows, *means], key=lambda row: row[0])
        if [place for place, _ in rows] != list(range(len(name_states(self.selection)))):
            raise LayerselError(
                f"layersel.selection.method: {type(self.selection.run.base).__name__} does not run each of its "
                f"{len(self.stack.layers)} layers once in a forward pass; such models are not supported."
            )
        # Zeros change no CKA, and make the widths of all sides equal.
        widest = max(kept.shape[1] for _, kept in rows)
        states = [nn.functional.pad(kept, (0, widest - kept.shape[1])) for _, kept in rows]
        # A view of a row would be sent to process 0 with the storage of the whole batch.
        return [state.clone() for state in torch.stack(states, dim=1)]


def measure_token_states(
    selection: Selection, samples: list[Sample], *positions: list[int] | None
) -> torch.Tensor | None:
    """Return the hidden states of one token of each sample, fp32 on the CPU.

    For layers they are Hugging Face's ``hidden_states``, (samples, layers + 1, width): the embeddings, then each
    layer's output, the last one after the final norm. An encoder and its decoder each begin with embeddings, so there
    are layers + 2. For branches they are the states before and after each one, (samples, 2 × branches, width), the last
    one before the final norm. A vision tower's are the means over each row's patches. Narrow sides are padded with
    zeros.

    Args:
        selection: by this method.
        samples: the samples to measure.
        positions: of the token in each of them, for each side of the model; None for the mean over its tokens.
    """
    states = TokenStates(selection, samples, positions)
    with forward.scoring(selection):
        return forward.over_samples(selection, samples, states.measure, forward.count_fitting(selection.run, samples))


def name_states(selection: Selection) -> list[str]:
    """Return the name in messages of every hidden state of ``measure_token_states``."""
    places, stack = forward.name_places(selection), selection.stack
    if not selection.by_layer:
        return [f"{side} {place}" for place in places for side in ("the input of", "the output of")]
    states = []
    for number, side in enumerate(stack.sides):
        states.append(f"the embeddings of the {side.name}" if side.name else "the embeddings")
        states += [place for place, of in zip(places, stack.side_of) if of == number]
    return states


def report_rows(selection: Selection, drawn: int, seeing: list[Sample], compared: list[Sample]) -> None:
    """Log a warning about rows that were drawn, and cannot be compared with the others.

    Args:
        selection: by this method.
        drawn: the number of rows drawn.
        seeing: those of them with an image, if a vision tower is scored.
        compared: those of ``seeing`` that can be compared.
    """
    settings, rows = selection.settings, {sample.row for sample in compared}
    if len(seeing) < drawn:
        LOG.warning(
            "layersel: stacks: %s: %d of the %d rows drawn have no image, so nothing of them comes through the "
            "vision tower, and they are not compared",
            settings.stacks,
            drawn - len(seeing),
            drawn,
        )
    unlike = [str(sample.row) for sample in seeing if sample.row not in rows]
    if unlike:
        LOG.warning(
            "layersel: token: %s: %d of the %d rows drawn lack the ending that the others share, as rows do that are "
            "cut at sequence_len, and are not scored: %s",
            settings.token,
            len(unlike),
            len(seeing),
            ", ".join(unlike),
        )


def report_token(
    samples: list[Sample], positions: list[int] | None, setting: str, token: Token, side: str = ""
) -> None:
    """Log a warning if the token that stands for a row says little.

    Args:
        samples: the scored samples.
        positions: of the token in each, None for the mean.
        setting: the value of ``token``.
        token: the token that the setting resolves to.
        side: the side of the model in which it does, see ``layers.Side``.
    """
    alike = 0 if positions is None else count_most_common(samples, positions, side)
    if are_most(alike, len(samples)):
        LOG.warning(
            "layersel: token: %s: %d of %d rows have the same token there, so its embedding says next to nothing about "
            "a row, and the score of layer %s hangs on few rows or on none. %s",
            setting,
            alike,
            len(samples),
            name_layers({side: 1})[0],
            # `auto` can also resolve to the first token.
            "Use `token: auto` or `mean`." if token == "last" else "Use `token: mean`.",
        )
