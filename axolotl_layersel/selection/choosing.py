"""What is to be chosen, how many layers are kept, and which."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import mean

import torch

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.layer_names import (
    ENCODER_DECODER,
    STACKS,
    LayerName,
    format_names,
    name_layers,
    split_name,
)
from axolotl_layersel.config.methods import LABELS, Method, get_method
from axolotl_layersel.config.selection import MAX_RANK_FACTOR, ResolvedSelection, Token, check_room, count_share
from axolotl_layersel.engines.collectives import decide_on_rank_zero
from axolotl_layersel.lora.layers import LayerStack
from axolotl_layersel.lora.run import Run
from axolotl_layersel.selection.data.batch_rows import read_collated
from axolotl_layersel.selection.data.calibration import Sample, fingerprint, read_samples
from axolotl_layersel.selection.data.collator_labels import label_samples
from axolotl_layersel.selection.data.decoder_inputs import give_decoder_inputs
from axolotl_layersel.selection.gate_history import GateHistory
from axolotl_layersel.selection.units import Unit, find_units


@dataclass(frozen=True)
class Selection:
    """A choice that is to be made.

    Attributes:
        run: whose layers are chosen; its trainer has not trained.
        stack: the layers of its model.
        settings: as they take effect.
        candidates: the positions of the layers that may be chosen, ascending.
        lora_r: the rank that LoRA has without a selection.
        room: the highest rank that the modules have been built for, None where they can be built anew.
    """

    run: Run
    stack: LayerStack
    settings: ResolvedSelection
    candidates: list[int]
    lora_r: int
    room: int | None = None

    @classmethod
    def of(
        cls,
        run: Run,
        stack: LayerStack,
        settings: ResolvedSelection,
        lora_r: int | None = None,
        room: int | None = None,
    ) -> Selection:
        """Return what is to be chosen by ``settings``; every rank must call this.

        Raises:
            LayerselError: on every rank, if a layer named in the settings cannot be chosen.
        """
        candidates = decide_on_rank_zero(lambda: find_candidates(settings, stack))
        selection = cls(run, stack, settings, candidates, lora_r or run.config.r, room)
        if room is not None:
            check_room(settings.max_rank, room)
        if (settings.min_rank or 0) > selection.highest_rank:
            raise LayerselError(
                f"layersel.selection.min_rank: {settings.min_rank} is more than the highest rank, "
                f"{selection.highest_rank}. Lower it, or set max_rank."
            )
        return selection

    @property
    def method(self) -> Method:
        """How it is made."""
        return get_method(self.settings.method)

    @functools.cached_property
    def units(self) -> list[Unit]:
        """What is chosen among, lowest layer first."""
        return find_units(self.stack, self.settings.granularity, self.candidates)

    @property
    def highest_rank(self) -> int:
        """The highest rank that a unit can get."""
        if self.settings.rank_allocation == "same":
            return self.lora_r
        return self.settings.max_rank or self.room or MAX_RANK_FACTOR * self.lora_r

    def count_kept(self) -> int:
        """Return how many units are kept; every rank must call this.

        Raises:
            LayerselError: on every rank, if that is none, or more than there are.
        """
        units, what = self.units, f"{self.settings.granularity}s"
        return decide_on_rank_zero(lambda: count_kept(self.settings, len(units), what))


@dataclass(frozen=True)
class Choice:
    """What a method chose, and why.

    Attributes:
        modules: names of the LoRA modules that are kept, lowest layer first.
        scores: importance of every layer, None where it has none.
        unscored: why a layer has no score, by its name.
        module_scores: importance of the unit of every LoRA module, where other units than layers were chosen.
        gains: what the 1st, 2nd, … rank of every unit that is kept would gain, where the method knows.
        rows: of the dataset, that were looked at, in the order drawn.
        left_out: rows that were drawn, but could not be compared with the others.
        token: that stood for a row, where one did, see ``pooling.find_token``; by side where there are two.
        fingerprint: of those rows.
        history: the course of the search, where there was one.
    """

    modules: list[str]
    scores: list[float | None]
    unscored: dict[LayerName, str] = field(default_factory=dict)
    module_scores: dict[str, float | None] = field(default_factory=dict)
    gains: dict[str, list[float]] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    token: Token | dict[str, Token] | None = None
    fingerprint: str | None = None
    history: GateHistory | None = None


@dataclass(frozen=True)
class Scores:
    """What a method measured on samples.

    Attributes:
        values: importance of every layer, None where it has none.
        unscored: why a layer has no score, by its name.
        left_out: rows of the samples that could not be compared with the others.
        token: that stood for a row, where one did, see ``pooling.find_token``; by side where there are two.
        units: importance of every unit by its name, None where it has none, where they are others than layers.
        gains: what the 1st, 2nd, … rank of every unit would gain, by its name, where the method knows.
    """

    values: list[float | None]
    unscored: dict[LayerName, str] = field(default_factory=dict)
    left_out: list[int] = field(default_factory=list)
    token: Token | dict[str, Token] | None = None
    units: Mapping[str, float | None] = field(default_factory=dict)
    gains: dict[str, list[float]] = field(default_factory=dict)


def choose_by_score(selection: Selection, score: Callable[[list[Sample]], Scores]) -> Choice:
    """Return the units of the highest scores on a calibration sample; every rank must call this.

    Args:
        selection: by a method that draws rows.
        score: scores the layers, and the units where these are others, on every rank alike.
    """
    settings, keep = selection.settings, selection.count_kept()
    assert settings.num_samples is not None, "methods that draw rows have a number of them"
    trainer = selection.run.trainer
    has_decoder, dataset, collate = selection.stack.has_decoder, trainer.train_dataset, trainer.data_collator
    read = None if has_decoder else lambda row: read_collated(dataset, row, collate, settings.seed)
    samples = read_samples(dataset, settings.num_samples, settings.seed, has_decoder, read)
    if selection.method.reads == LABELS or has_decoder:
        samples = label_samples(samples, collate, settings.seed, has_decoder)
    if has_decoder:
        samples = give_decoder_inputs(samples, selection.run.base)
    scores = score(samples)
    kept = decide_on_rank_zero(lambda: choose_units(selection, scores, keep))
    left_out = set(scores.left_out)
    scored = [sample for sample in samples if sample.row not in left_out]
    return Choice(
        [module for unit in kept for module in unit.modules],
        scores.values,
        scores.unscored,
        {name: scores.units[unit.name] for unit in selection.units for name in unit.modules if scores.units},
        {unit.name: scores.gains[unit.name] for unit in kept if scores.gains},
        rows=[sample.row for sample in scored],
        left_out=scores.left_out,
        token=scores.token,
        fingerprint=fingerprint(scored),
    )


def choose_units(selection: Selection, scores: Scores, keep: int) -> list[Unit]:
    """Return the ``keep`` units of the highest scores, lowest layer first.

    Raises:
        LayerselError: if too few are scored, or all scores are equal.
    """
    units, method, candidates = selection.units, selection.method, selection.candidates
    if scores.units:
        values, what = [scores.units[unit.name] for unit in units], selection.settings.granularity
        return [units[i] for i in choose_highest(values, scores.unscored, list(range(len(units))), keep, method, what)]
    layers = set(choose_highest(scores.values, scores.unscored, candidates, keep, method))
    return [unit for unit in units if unit.layer in layers]


def find_highest_by_layer(selection: Selection, scores: Mapping[str, float | None]) -> list[float | None]:
    """Return the highest score of each layer's units, None where it has none."""
    highest: list[float | None] = [None] * len(selection.stack.layers)
    for layer in selection.candidates:
        found = [scores[unit.name] for unit in selection.units if unit.layer == layer]
        highest[layer] = max((score for score in found if score is not None), default=None)
    return highest


def find_candidates(settings: ResolvedSelection, stack: LayerStack) -> list[int]:
    """Return the positions of the layers that may be chosen, ascending.

    Raises:
        LayerselError: if a layer named in the settings does not exist or carries no LoRA.
    """
    carrying = [stack.names[layer] for layer in sorted(stack.lora_modules) if layer not in stack.idle]
    for key in ("layers", "candidates"):
        named: list[LayerName] = getattr(settings, key) or []
        check_naming(key, named, [side.name for side in stack.sides], settings.stacks, "this model")
        check_range(key, named, {side.name: len(side.layers) for side in stack.sides})
        idle = [name for name in named if stack.names.index(name) in stack.idle]
        if idle:
            raise LayerselError(
                f"layersel.selection.{key}: layers {format_names(idle)} lie above what the model reads of its vision "
                "tower (vision_feature_layer in its configuration), so LoRA in them learns nothing. Remove them from "
                "the list."
            )
        bare = [name for name in named if name not in carrying]
        if bare:
            raise LayerselError(
                f"layersel.selection.{key}: layers {format_names(bare)} carry no LoRA under these lora_target_modules. "
                "Remove them from the list, or target modules in them."
            )
    return [stack.names.index(name) for name in settings.candidates or carrying]


# How layers are named by the sides that are chosen among: what a model with them has, and an example.
WAYS = {
    STACKS["language"]: ("has one list of layers", "by their numbers, such as [0, 1, 5]"),
    ENCODER_DECODER: ("has an encoder and a decoder", "such as [encoder.3, decoder.0]"),
    STACKS["vision"]: ("has them in its vision tower under `stacks: vision`", "such as [vision.0, vision.3]"),
    STACKS["both"]: ("has them in two stacks under `stacks: both`", "such as [vision.3, language.0]"),
}


def check_naming(key: str, named: list[LayerName], sides: Sequence[str], stacks: str, model: str) -> None:
    """Raise LayerselError for layers that are named as in a model of another kind, or under another ``stacks``.

    Args:
        key: where they are named.
        named: the layers, all in one way.
        sides: names of the sides that are chosen among, see ``layers.Side``.
        stacks: the setting.
        model: what it is called in the message.
    """
    others = {split_name(name)[0] for name in named} - set(sides)
    if not others:
        return
    kind, way = WAYS[tuple(sides)]
    if stacks == "language" and others & set(STACKS["both"]):
        way += ", or set `stacks: both`, or `stacks: vision`, whose layers are named so"
    raise LayerselError(
        f"layersel.selection.{key}: {format_names(named)} is not how the layers of {model} are named, which {kind}. "
        f"Name them {way}."
    )


def check_range(key: str, named: list[LayerName], counts: Mapping[str, int]) -> None:
    """Raise LayerselError for layers, named under ``key``, that a model with so many on each side does not have."""
    names = [name_layers({side: count}) for side, count in counts.items()]
    outside = [name for name in named if not any(name in side for side in names)]
    if outside:
        known = " and ".join(f"{side[0]} to {side[-1]}" for side in names)
        raise LayerselError(
            f"layersel.selection.{key}: {format_names(outside)} are out of range: the model's layers are {known}."
        )


def count_kept(settings: ResolvedSelection, candidates: int, what: str = "layers") -> int:
    """Return how many of ``what`` are kept.

    Raises:
        LayerselError: if that is none, or more than there are.
    """
    key, number = ("num_layers", settings.num_layers) if what == "layers" else ("num_units", settings.num_units)
    if number is not None:
        if number > candidates:
            raise LayerselError(
                f"layersel.selection.{key}: {number} is more than the {candidates} {what} that can be chosen. Set it "
                f"to at most {candidates}."
            )
        return number
    ratio = settings.ratio
    assert ratio is not None, "settings as they take effect say how much is kept"
    keep = count_share(ratio, candidates)
    if keep == 0:
        raise LayerselError(
            f"layersel.selection.ratio: {ratio} of {candidates} {what} keeps none. Set at least "
            f"{1 / candidates:.3f}, or `{key}: 1`."
        )
    return keep


def choose_highest(
    scores: list[float | None],
    unscored: Mapping[LayerName, str],
    candidates: list[int],
    keep: int,
    method: Method,
    what: str = "layer",
) -> list[int]:
    """Return the ``keep`` candidates of the highest scores, ascending; ties go to the lower one.

    Args:
        scores: of every unit, None where it has none.
        unscored: why one has none, by the name of its layer.
        candidates: positions in ``scores`` that may be chosen.
        keep: how many are.
        method: that made the scores.
        what: the kind of unit, for messages.

    Raises:
        LayerselError: if too few are scored, or all scores are equal.
    """
    scored = {place: score for place in candidates if (score := scores[place]) is not None}
    if len(scored) < keep:
        reasons = "; ".join(f"layer {layer}: {reason}" for layer, reason in unscored.items())
        raise LayerselError(
            f"layersel.selection.method: {method.name} could score only {len(scored)} of {len(candidates)} {what}s, "
            f"{keep} are to be kept ({reasons}). {method.way_out}"
        )
    if keep < len(scored) and len(set(scored.values())) == 1:
        raise LayerselError(
            f"layersel.selection.method: {method.name} gives every {what} the score {next(iter(scored.values()))}, so "
            f"there is nothing to choose by. Use other data, {method.more_evidence}, or another method."
        )
    return sorted(sorted(scored, key=lambda place: (-scored[place], place))[:keep])


def find_mean_overlap(choices: list[Mapping[str, int]]) -> float:
    """Return the mean overlap of all pairs of ``choices``, which are ranks by module, none of them empty.

    That is the weighted Jaccard overlap Σ min(a, b) / Σ max(a, b): with equal ranks, |A ∩ B| / |A ∪ B| of the modules.
    """

    def find_overlap(one: Mapping[str, int], other: Mapping[str, int]) -> float:
        pairs = [(one.get(name, 0), other.get(name, 0)) for name in {**one, **other}]
        return sum(map(min, pairs)) / sum(map(max, pairs))

    return mean(find_overlap(one, other) for one, other in combinations(choices, 2))


def conclude(
    measured: torch.Tensor | None, places: list[str], samples: list[Sample], score: Callable[[torch.Tensor], Scores]
) -> Scores:
    """Return what rank 0 makes of the measurements, which it alone has; every rank must call this.

    Args:
        measured: (samples, places, ...), None on the other ranks.
        places: what was measured, in the order that the model runs.
        samples: what it was measured on.
        score: scores the layers by the measurements.

    Raises:
        LayerselError: on every rank, naming the place and the training row of a number that is not finite.
    """

    def decide() -> Scores:
        assert measured is not None, "rank 0 has the measurements"
        check_finite(measured.flatten(2).sum(dim=-1) if measured.dim() > 2 else measured, places, samples)
        return score(measured)

    return decide_on_rank_zero(decide)


def check_finite(measured: torch.Tensor, places: list[str], samples: list[Sample]) -> None:
    """Raise LayerselError naming the place and the training row of the first number that is not finite.

    Args:
        measured: (samples, places).
        places: what was measured, in the order that the model runs.
        samples: what it was measured on.
    """
    bad = (~measured.isfinite()).nonzero()
    if len(bad):
        place, sample = min((int(place), int(sample)) for sample, place in bad)
        raise LayerselError(
            f"layersel.selection.method: NaN or infinity in {places[place]} for training row {samples[sample].row}. "
            "Look at that row and at the base model's precision (fp16 overflows; try bf16)."
        )
