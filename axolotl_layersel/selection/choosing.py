"""How many layers are kept, and which."""

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import combinations
from statistics import mean

from axolotl_layersel.args import DEFAULT_RATIO, SelectionArgs
from axolotl_layersel.errors import LayerselError
from axolotl_layersel.layers import LayerStack


@dataclass(frozen=True)
class Choice:
    """What a method chose, and why.

    Attributes:
        modules: names of the LoRA modules that are kept, lowest layer first.
        scores: importance of every layer, None where it has none.
        unscored: why a layer has no score, by layer.
        module_scores: importance of every LoRA module, where modules were chosen.
        rows: of the dataset, that were looked at, in the order drawn.
        left_out: rows that were drawn, but could not be compared with the others.
        fingerprint: of those rows.
    """

    modules: list[str]
    scores: list[float | None]
    unscored: dict[int, str] = field(default_factory=dict)
    module_scores: dict[str, float] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    fingerprint: str | None = None


def find_candidates(settings: SelectionArgs, stack: LayerStack) -> list[int]:
    """Return the layers that may be chosen, ascending.

    Raises:
        LayerselError: if a layer named in the settings does not exist or carries no LoRA.
    """
    last = len(stack.layers) - 1
    for key in ("layers", "candidates"):
        named = getattr(settings, key) or []
        outside = [layer for layer in named if layer > last]
        if outside:
            raise LayerselError(
                f"layersel.selection.{key}: {outside} are out of range: the model's layers are 0 to {last}."
            )
        bare = [layer for layer in named if layer not in stack.lora_modules]
        if bare:
            raise LayerselError(
                f"layersel.selection.{key}: layers {bare} carry no LoRA under these lora_target_modules. "
                "Remove them from the list, or target modules in them."
            )
    return sorted(settings.candidates or stack.lora_modules)


def count_kept(settings: SelectionArgs, candidates: int, what: str = "layers") -> int:
    """Return how many of ``what`` are kept: floor(ratio × candidates + 1e-9), for 0.29 × 100 is 28.999….

    Raises:
        LayerselError: if that is none, or more than there are.
    """
    if settings.layers is not None:
        return len(settings.layers)
    if settings.num_layers is not None:
        if settings.num_layers > candidates:
            raise LayerselError(
                f"layersel.selection.num_layers: {settings.num_layers} is more than the {candidates} layers that can "
                f"be chosen. Set it to at most {candidates}."
            )
        return settings.num_layers
    ratio = DEFAULT_RATIO if settings.ratio is None else settings.ratio
    keep = math.floor(ratio * candidates + 1e-9)
    if keep == 0:
        way_out = ", or `num_layers: 1`" if what == "layers" else ""
        raise LayerselError(
            f"layersel.selection.ratio: {ratio} of {candidates} {what} keeps none. Set at least "
            f"{1 / candidates:.3f}{way_out}."
        )
    return keep


def choose(
    scores: list[float | None], unscored: dict[int, str], candidates: list[int], keep: int, method: str
) -> list[int]:
    """Return the ``keep`` candidates of the highest scores, ascending; ties go to the lower layer.

    Raises:
        LayerselError: if too few are scored, or all scores are equal.
    """
    scored = [layer for layer in candidates if scores[layer] is not None]
    if len(scored) < keep:
        reasons = "; ".join(f"layer {layer}: {reason}" for layer, reason in sorted(unscored.items()))
        raise LayerselError(
            f"layersel.selection.method: {method} could score only {len(scored)} of {len(candidates)} layers, {keep} "
            f"are to be kept ({reasons}). Use `token: auto` or `mean`, or keep fewer layers."
        )
    more = "more flexora.steps" if method == "flexora" else "more `num_samples`"
    if keep < len(scored) and len({scores[layer] for layer in scored}) == 1:
        raise LayerselError(
            f"layersel.selection.method: {method} gives every layer the score {scores[scored[0]]}, so there is "
            f"nothing to choose by. Use other data, {more}, or another method."
        )
    return sorted(sorted(scored, key=lambda layer: (-scores[layer], layer))[:keep])  # type: ignore[operator]


def find_mean_overlap(choices: list[Collection]) -> float:
    """Return the mean Jaccard overlap |A ∩ B| / |A ∪ B| of all pairs of ``choices``, none of them empty."""
    sets = [set(choice) for choice in choices]
    return mean(len(one & other) / len(one | other) for one, other in combinations(sets, 2))
