"""What a method is given, and what it returns: the selection to make, scores, and the choice."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.layer_names import LayerName
from axolotl_layersel.config.methods import Method, get_method
from axolotl_layersel.config.selection import MAX_RANK_FACTOR, ResolvedSelection, Token, check_room
from axolotl_layersel.engines.collectives import decide_on_rank_zero
from axolotl_layersel.lora.layers import LayerStack
from axolotl_layersel.lora.run import Run
from axolotl_layersel.selection.candidates import count_kept, find_candidates
from axolotl_layersel.selection.gate_history import GateHistory
from axolotl_layersel.selection.units import Unit, find_units


@dataclass(frozen=True)
class Selection:
    """A choice that is to be made.

    Attributes:
        run: the run whose layers are chosen; its trainer has not trained.
        stack: the layers of its model.
        settings: the settings as they take effect.
        candidates: the positions of the layers that may be chosen, ascending.
        lora_r: the rank of LoRA without a selection.
        room: the highest rank that the modules have room for, None if they can be built anew.
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
        """Return the selection to make by ``settings``. Every process must call this.

        Raises:
            LayerselError: on every process, if a layer named in the settings cannot be chosen.
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
        """The method that makes the choice."""
        return get_method(self.settings.method)

    @property
    def by_layer(self) -> bool:
        """Whether units are whole layers."""
        return self.settings.granularity == "layer"

    @functools.cached_property
    def units(self) -> list[Unit]:
        """The units that may be chosen, lowest layer first."""
        return find_units(self.stack, self.settings.granularity, self.candidates)

    @property
    def highest_rank(self) -> int:
        """The highest rank that a unit can get."""
        if self.settings.rank_allocation == "same":
            return self.lora_r
        return self.settings.max_rank or self.room or MAX_RANK_FACTOR * self.lora_r

    def count_kept(self) -> int:
        """Return how many units are kept. Every process must call this.

        Raises:
            LayerselError: on every process, if that is 0, or more than there are.
        """
        units, what = self.units, f"{self.settings.granularity}s"
        return decide_on_rank_zero(lambda: count_kept(self.settings, len(units), what))

    def find_highest_by_layer(self, scores: Mapping[str, float | None]) -> list[float | None]:
        """Return the highest score of each layer's units, None without one. ``scores``: by unit name."""
        highest: list[float | None] = [None] * len(self.stack.layers)
        for layer in self.candidates:
            found = [scores[unit.name] for unit in self.units if unit.layer == layer]
            highest[layer] = max((score for score in found if score is not None), default=None)
        return highest


@dataclass(frozen=True)
class Scores:
    """The measurements of a method on samples.

    Attributes:
        values: the importance of every layer, None without one.
        unscored: why a layer has no score, by layer name.
        left_out: rows of the samples that could not be compared with the others.
        token: the token that stood for a row, see ``row_token.find_token``; by side if there are two.
        units: the importance of every unit by name, None without one; empty if units are layers.
        gains: the gain of the 1st, 2nd, … rank of every unit by name, if the method measures it.
    """

    values: list[float | None]
    unscored: dict[LayerName, str] = field(default_factory=dict)
    left_out: list[int] = field(default_factory=list)
    token: Token | dict[str, Token] | None = None
    units: Mapping[str, float | None] = field(default_factory=dict)
    gains: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """The choice of a method, and its reasons; see ``Scores`` for the attributes that are not listed.

    Attributes:
        modules: names of the LoRA modules that are kept, lowest layer first.
        scores: the importance of every layer, None without one.
        module_scores: the importance of the unit of every LoRA module; empty if units are layers.
        rows: the rows of the dataset that were read, in the order drawn.
        tokens: the mean length of those rows.
        fingerprint: a digest of those rows.
        history: the course of the search, if there was one.
    """

    modules: list[str]
    scores: list[float | None]
    unscored: dict[LayerName, str] = field(default_factory=dict)
    module_scores: dict[str, float | None] = field(default_factory=dict)
    gains: dict[str, list[float]] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    token: Token | dict[str, Token] | None = None
    tokens: float | None = None
    fingerprint: str | None = None
    history: GateHistory | None = None
