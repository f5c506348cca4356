"""Defaults that follow the data, so that small training sets can be used too."""

import dataclasses
import logging
from typing import Any

from transformers import Trainer

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.methods import get_method, list_data_free
from axolotl_layersel.config.selection import ResolvedSelection, SelectionConfig
from axolotl_layersel.engines.collectives import get_rank
from axolotl_layersel.lora.run import Run
from axolotl_layersel.selection.data.calibration import check_indexable
from axolotl_layersel.selection.data.label_alignment import find_kind
from axolotl_layersel.selection.methods.flexora.validation import draw_labelled, find_least
from axolotl_layersel.selection.types import Selection

LOG = logging.getLogger("axolotl.layersel")


def fit_to_data(run: Run, settings: SelectionConfig, resolved: ResolvedSelection) -> ResolvedSelection:
    """Return ``resolved`` with the keys that ``settings`` leaves out fitted to the training set.

    Raises:
        LayerselError: on every process, if the set cannot be indexed, or has too few rows for any defaults.
    """
    trainer, search = run.trainer, resolved.flexora
    if resolved.num_samples is not None and settings.num_samples is None:
        samples = fit_samples(trainer.train_dataset, resolved.method, resolved.num_samples)
        return dataclasses.replace(resolved, num_samples=samples)
    if search is not None and search.val_source == "train" and getattr(settings.flexora, "val_samples", None) is None:
        rows = fit_validation(trainer, search.val_samples, resolved.seed, find_kind(run.model))
        return dataclasses.replace(resolved, flexora=dataclasses.replace(search, val_samples=rows))
    return resolved


def fit_samples(dataset: Any, method: str, default: int) -> int:
    """Return how many rows are scored by default: ``default``, or all of a smaller training set.

    Raises:
        LayerselError: if the method needs more.
    """
    check_indexable(dataset, "datasets")
    rows, fewest = len(dataset), get_method(method).fewest_samples
    if rows < fewest:
        raise LayerselError(
            f"datasets: the training set has too few rows to be compared by {method}: {rows} where it needs {fewest}. "
            f"Give more data, or use a method that needs none: {list_data_free()}."
        )
    if rows < default:
        report("num_samples", default, rows, "all rows of the training set")
    return min(default, rows)


def fit_validation(trainer: Trainer, default: int, seed: int, kind: str) -> int:
    """Return how many rows are held out by default: ``default``, or a third of the rows with a label to learn.

    Raises:
        LayerselError: if the training set cannot be split.
    """
    dataset: Any = trainer.train_dataset
    check_indexable(dataset, "datasets")
    most = len(dataset) - find_least(trainer)
    if most < 1:
        raise LayerselError(
            f"datasets: the training set has too few rows, {len(dataset)}, to be parted into rows to train on and to "
            "validate on by method flexora. Give more data or smaller batches, or use `val_source: eval`."
        )
    labelled = len(draw_labelled(dataset, 3 * default, seed, kind))
    rows = min(default, most, max(labelled // 3, 1))
    if rows < default:
        report("flexora.val_samples", default, rows, f"a third of the {labelled} training rows with a label to learn")
    return rows


def fit_to_units(settings: SelectionConfig, selection: Selection) -> Selection:
    """Return a selection that keeps its only unit if the settings do not say how much is kept."""
    written = (settings.ratio, settings.num_layers, settings.num_units, settings.keep)
    if len(selection.units) > 1 or selection.settings.ratio is None or any(value is not None for value in written):
        return selection
    return dataclasses.replace(selection, settings=dataclasses.replace(selection.settings, ratio=1.0))


def report(key: str, default: int, value: int, what: str) -> None:
    """Log, on process 0, that a default has another value in this run."""
    if get_rank() == 0:
        LOG.info("layersel: %s is %d in place of %d by default: %s", key, value, default, what)
