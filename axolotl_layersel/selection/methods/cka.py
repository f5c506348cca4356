"""CKA: a layer that changes its input's geometry much is important (Layer-wise LoRA, arXiv 2602.05988)."""

import contextlib
import dataclasses
import logging

import torch
from torch import nn

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.layer_names import VISION, name_layers
from axolotl_layersel.config.selection import Token
from axolotl_layersel.engines import collectives
from axolotl_layersel.selection.choosing import Choice, Scores, Selection, choose_by_score, conclude
from axolotl_layersel.selection.data.calibration import Sample, are_most, count_most_common, place_tokens
from axolotl_layersel.selection.data.row_token import find_token
from axolotl_layersel.selection.passes import forward
from axolotl_layersel.selection.report import describe_token

LOG = logging.getLogger("axolotl.layersel")

# Embeddings of one repeated token differ by rounding only, about 1e-7 of their norm in fp32 and 4e-3 in bf16
# times zero: equal tokens give equal rows. Centring in fp64 then leaves about 1e-16; 1e-5 is far from both.
ZERO_VARIANCE = 1e-5


def choose(selection: Selection) -> Choice:
    """Return the layers that change the geometry of their input most; every rank must call this."""
    return choose_by_score(selection, lambda samples: score(selection, samples))


def score(selection: Selection, samples: list[Sample]) -> Scores:
    """Return 1 − CKA of each layer's or branch's input and output at one token of each sample.

    Every rank must call this.
    """
    setting, stack = selection.settings.token, selection.stack
    assert setting is not None, "CKA has a token"
    tokens = {side.name: find_token(selection.run.base, setting, side.name) for side in stack.sides}
    seeing = [sample for sample in samples if stack.vision is None or sample.pixels is not None]
    if not seeing:
        return Scores([None] * len(stack.layers), dict.fromkeys(stack.names, forward.NO_IMAGES))
    compared, positions = place_tokens(seeing, tokens)
    rows = {sample.row for sample in compared}
    left_out = [sample.row for sample in samples if sample.row not in rows]
    if collectives.get_rank() == 0:
        if len(seeing) < len(samples):
            LOG.warning(
                "layersel: stacks: %s: %d of the %d rows drawn have no image, so nothing of them comes through the "
                "vision tower, and they are not compared",
                selection.settings.stacks,
                len(samples) - len(seeing),
                len(samples),
            )
        unlike = [sample.row for sample in seeing if sample.row not in rows]
        for (side, token), placed in zip(tokens.items(), positions):
            report_token(compared, placed, unlike, setting, token, side)
    states = measure_token_states(selection, compared, *positions)
    places = range(len(forward.name_places(selection)))
    if selection.settings.granularity == "layer":
        pairs = [(place + side, place + side + 1) for place, side in zip(places, stack.side_of)]
    else:
        pairs = [(2 * place, 2 * place + 1) for place in places]

    def score_states(states: torch.Tensor) -> Scores:
        found = forward.arrange_scores(selection, *score_pairs(states, pairs))
        return dataclasses.replace(found, left_out=left_out, token=tokens.get("", tokens))

    return conclude(states, name_states(selection), compared, score_states)


def centre(representations: torch.Tensor) -> torch.Tensor:
    """Return ``representations`` (samples, width) in float64 with the mean of each column taken away."""
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
        pairs: which representations lie before and after each layer or branch.
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


def measure_token_states(
    selection: Selection, samples: list[Sample], *positions: list[int] | None
) -> torch.Tensor | None:
    """Return the hidden states of one token of each sample, fp32 on the CPU.

    Of layers they are those of Hugging Face's ``hidden_states``, (samples, layers + 1, width): the embeddings, then
    each layer's output, the last after the final norm; of several predictions of them the active one, see
    ``passes.take_active``; of an encoder and then of its decoder, which has embeddings of
    its own, (samples, layers + 2, width). Of branches they are those before and after each of them,
    (samples, 2 × branches, width), the last before the final norm. Only the rows asked for are kept of each output.
    Those of a vision tower are the means of each row's patches. Where the width of the sides differs, the narrower ones
    are filled up with zeros, which change no CKA.

    Args:
        selection: by this method.
        samples: what is measured.
        positions: of the token in each of them, for each side of the model; None for the mean over its tokens.
    """
    run, stack = selection.run, selection.stack
    layers = selection.settings.granularity == "layer"
    expected = len(name_states(selection))
    rows: list[tuple[int, torch.Tensor]] = []
    patches: dict[int, list[torch.Tensor]] = {}  # of the row's images, which may come one after the other

    def measure(indices: list[int]) -> list[torch.Tensor]:
        inputs = forward.make_inputs(run, [samples[i] for i in indices])
        rows.clear()
        patches.clear()

        def keep(place: int, hidden: torch.Tensor, side: int) -> None:
            placed = positions[side]
            if stack.sides[side].name == VISION:
                seen, _ = forward.arrange_tokens(selection, hidden, inputs, stack.sides[side])
                patches.setdefault(place, []).append(seen)
                return
            hidden, mask = forward.arrange_tokens(selection, hidden, inputs, stack.sides[side])
            if placed is None:
                kept = (hidden.float() * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
            else:
                kept = hidden[torch.arange(len(indices)), [placed[i] for i in indices]]
            rows.append((place, kept.float().cpu()))

        def keep_input(layer: int, args: tuple, kwargs: dict) -> None:
            keep(layer + stack.side_of[layer], forward.get_hidden(args, kwargs), stack.side_of[layer])

        def record(place: int, before: torch.Tensor, after: torch.Tensor) -> None:
            side = stack.side_of[selection.units[place].layer]
            keep(2 * place, before, side)
            keep(2 * place + 1, after, side)

        def keep_end(side: int, output: object) -> None:
            layers = [layer for layer, of in enumerate(stack.side_of) if of == side]
            keep(layers[-1] + side + 1, forward.get_output(output), side)

        with contextlib.ExitStack() as watching:
            if layers:
                watching.enter_context(forward.hook_layers(stack, keep_input, None))
                for number, side in enumerate(stack.sides):
                    handle = side.owner.register_forward_hook(
                        lambda module, args, output, number=number: keep_end(number, output)
                    )
                    watching.enter_context(forward.handle_removed(handle))
            else:
                watching.enter_context(forward.watch_places(selection, record))
            forward.call(run, inputs)
        rows.extend((place, torch.cat(seen, dim=1).float().mean(dim=1).cpu()) for place, seen in patches.items())
        rows.sort(key=lambda row: row[0])
        if [place for place, _ in rows] != list(range(expected)):
            raise LayerselError(
                f"layersel.selection.method: {type(run.base).__name__} does not run each of its "
                f"{len(stack.layers)} layers once in a forward pass; such models are not supported."
            )
        # Rows of their own: a view is sent to rank 0 with the storage of the whole batch.
        widest = max(kept.shape[1] for _, kept in rows)
        states = [nn.functional.pad(kept, (0, widest - kept.shape[1])) for _, kept in rows]
        return [state.clone() for state in torch.stack(states, dim=1)]

    with forward.scoring(selection):
        return forward.over_samples(run, samples, measure, forward.count_fitting(run, samples))


def name_states(selection: Selection) -> list[str]:
    """Return what ``measure_token_states`` measures, as messages call it."""
    places = forward.name_places(selection)
    if selection.settings.granularity == "layer":
        states = []
        for number, side in enumerate(selection.stack.sides):
            states.append(f"the embeddings of the {side.name}" if side.name else "the embeddings")
            states += [place for place, of in zip(places, selection.stack.side_of) if of == number]
        return states
    return [f"{side} {place}" for place in places for side in ("the input of", "the output of")]


def report_token(
    samples: list[Sample], positions: list[int] | None, left_out: list[int], setting: str, token: Token, side: str = ""
) -> None:
    """Log which token stands for a row, which rows are not scored, and a warning where that token says little.

    Args:
        samples: those that are scored.
        positions: of the token in each, None for the mean.
        left_out: rows that are not.
        setting: the value of ``token``.
        token: what it comes to in this model.
        side: of the model, see ``layers.Side``, that it comes to that in.
    """
    where = f" in the {side}" if side else ""
    LOG.info("layersel: token: %s: rows are compared at %s%s", setting, describe_token(token), where)
    if left_out:
        LOG.warning(
            "layersel: token: %s: %d of the %d rows drawn lack the ending that the others share, as rows do that are "
            "cut at sequence_len, and are not scored: %s",
            setting,
            len(left_out),
            len(samples) + len(left_out),
            ", ".join(map(str, left_out)),
        )
    alike = 0 if positions is None else count_most_common(samples, positions, side)
    if are_most(alike, len(samples)):
        LOG.warning(
            "layersel: token: %s: %d of %d rows have the same token there, so its embedding says next to nothing about "
            "a row, and the score of layer %s hangs on few rows or on none. %s",
            setting,
            alike,
            len(samples),
            name_layers({side: 1})[0],
            # Of a first token `auto` may have made this choice too.
            "Use `token: auto` or `mean`." if token == "last" else "Use `token: mean`.",
        )
