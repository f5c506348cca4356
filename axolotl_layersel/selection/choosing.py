"""Choose units by the scores of a calibration sample."""

from collections.abc import Callable, Mapping
from itertools import combinations
from statistics import mean

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.layer_names import LayerName
from axolotl_layersel.config.methods import LABELS, Method
from axolotl_layersel.engines.collectives import decide_on_rank_zero
from axolotl_layersel.selection.data.batch_rows import read_collated
from axolotl_layersel.selection.data.calibration import Sample, fingerprint, read_samples
from axolotl_layersel.selection.data.collator_labels import label_samples
from axolotl_layersel.selection.data.decoder_inputs import give_decoder_inputs
from axolotl_layersel.selection.types import Choice, Scores, Selection
from axolotl_layersel.selection.units import Unit


def choose_by_score(selection: Selection, score: Callable[[Selection, list[Sample]], Scores]) -> Choice:
    """Return the units with the highest scores on a calibration sample. Every process must call this.

    ``score``: returns the scores of layers, and of units if these are smaller; the same on every process.
    """
    keep = selection.count_kept()
    samples = draw_samples(selection)
    scores = score(selection, samples)
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
        tokens=mean(len(sample.input_ids) for sample in scored),
        fingerprint=fingerprint(scored),
    )


def draw_samples(selection: Selection) -> list[Sample]:
    """Return the calibration sample of the training set, with labels and decoder inputs where they are needed.

    Raises:
        LayerselError: if the training set does not have them.
    """
    settings, trainer, has_decoder = selection.settings, selection.run.trainer, selection.stack.has_decoder
    assert settings.num_samples is not None, "methods that draw rows have a number of them"
    dataset, collate = trainer.train_dataset, trainer.data_collator
    read = None if has_decoder else lambda row: read_collated(dataset, row, collate, settings.seed)
    samples = read_samples(dataset, settings.num_samples, settings.seed, has_decoder, read)
    if selection.method.reads == LABELS or has_decoder:
        samples = label_samples(samples, collate, settings.seed, has_decoder)
    return give_decoder_inputs(samples, selection.run.base) if has_decoder else samples


def choose_units(selection: Selection, scores: Scores, keep: int) -> list[Unit]:
    """Return the ``keep`` units with the highest scores, lowest layer first.

    Raises:
        LayerselError: if too few are scored, or all scores are equal.
    """
    units, method, candidates = selection.units, selection.method, selection.candidates
    if scores.units:
        values, what = [scores.units[unit.name] for unit in units], selection.settings.granularity
        return [units[i] for i in choose_highest(values, scores.unscored, list(range(len(units))), keep, method, what)]
    layers = set(choose_highest(scores.values, scores.unscored, candidates, keep, method))
    return [unit for unit in units if unit.layer in layers]


def choose_highest(
    scores: list[float | None],
    unscored: Mapping[LayerName, str],
    candidates: list[int],
    keep: int,
    method: Method,
    what: str = "layer",
) -> list[int]:
    """Return the ``keep`` candidates with the highest scores, ascending; ties go to the lower one.

    Args:
        scores: of every unit, None without one.
        unscored: why a unit has no score, by the name of its layer.
        candidates: positions in ``scores`` that may be chosen.
        keep: the number to choose.
        method: the method that scored them.
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

    The overlap is the weighted Jaccard index Σ min(a, b) / Σ max(a, b); with equal ranks, |A ∩ B| / |A ∪ B|.
    """

    def find_overlap(one: Mapping[str, int], other: Mapping[str, int]) -> float:
        pairs = [(one.get(name, 0), other.get(name, 0)) for name in {**one, **other}]
        return sum(map(min, pairs)) / sum(map(max, pairs))

    return mean(find_overlap(one, other) for one, other in combinations(choices, 2))
