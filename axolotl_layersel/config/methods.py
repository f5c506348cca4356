"""The table of methods that choose layers. The module of a method is imported when the method is used."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from axolotl_layersel.common.errors import LayerselError, suggest

# The package that holds the modules of the methods.
PACKAGE = "axolotl_layersel.selection.methods"
# The part of the data that a method reads.
NOTHING = "nothing"
TOKENS = "tokens"
LABELS = "tokens and labels"
BATCHES = "batches"  # of any content: the method trains on them


@dataclass(frozen=True)
class Method:
    """A way to choose layers.

    Attributes:
        name: the value of ``method`` in the YAML file.
        summary: what the score of a layer means, for the documentation.
        module: the module of its function, relative to ``PACKAGE``.
        function: takes a ``Selection`` and returns a ``Choice``; every process calls it.
        reads: the part of the data that it reads.
        needs_backward: whether it runs the model backward.
        keys: the keys of the ``selection`` block that it reads and some other method does not.
        units: the kinds of unit that it can choose, see ``units.UNITS``; the first is the default.
        rank_allocation: the default of ``rank_allocation``.
        fewest_samples: the lowest number of rows that it accepts.
        more_evidence: the advice when its scores do not tell layers apart.
        way_out: the advice when layers cannot be scored.
    """

    name: str
    summary: str
    module: str
    function: str = "choose"
    reads: str = TOKENS
    needs_backward: bool = False
    keys: tuple[str, ...] = ("num_samples", "seed")
    units: tuple[str, ...] = ("layer",)
    rank_allocation: str = "same"
    fewest_samples: int = 2
    more_evidence: str = "more `num_samples`"
    way_out: str = "Keep fewer layers."

    @property
    def draws_rows(self) -> bool:
        """Whether it scores layers on a calibration sample of training rows."""
        return self.reads in (TOKENS, LABELS)

    @property
    def needs_data(self) -> bool:
        """Whether it reads the data."""
        return self.reads != NOTHING

    def load(self) -> Callable[[Any], Any]:
        """Import and return its function, which takes a ``Selection`` and returns a ``Choice``."""
        return getattr(importlib.import_module(f"{PACKAGE}.{self.module}"), self.function)


METHODS = {
    method.name: method
    for method in (
        Method(
            "cka",
            "How much the layer rearranges your rows relative to each other: 0 if not at all, and towards 1 the more "
            "it does. (1 minus the linear CKA of its input and output.) One forward pass per row.",
            "cka",
            keys=("num_samples", "seed", "token"),
            units=("layer", "group"),
            fewest_samples=3,  # the CKA of two rows is always 1
            way_out="Use `token: auto` or `mean`, or keep fewer layers.",
        ),
        Method(
            "cosine",
            "The angle by which the layer rotates the hidden state of a token, as 1 minus its cosine, averaged over "
            "all tokens: 0 if not at all, 1 for a right angle. One forward pass per row.",
            "cosine",
            units=("layer", "group"),
        ),
        Method(
            "relative",
            "How much the layer adds to the hidden state of a token, relative to its norm, averaged over all tokens: "
            "0 for nothing, 1 for as much as the norm. One forward pass per row.",
            "relative",
            units=("layer", "group"),
        ),
        Method(
            "fisher",
            "How strongly the likelihood of your answers (for a classifier, of each row's label) depends on "
            "the layer's own frozen weights: the squared gradient, averaged over rows and weights. A forward "
            "and a backward pass per row, with the logits of a few answer tokens at a time, so that a large "
            "vocabulary needs no more memory. Axolotl's fused LoRA kernels are off during the passes.",
            "fisher",
            reads=LABELS,
            needs_backward=True,
            units=("layer", "group", "module"),
        ),
        Method(
            "gradient",
            "The expected gain from LoRA of rank `lora_r` in the layer: the singular values of the loss's gradient "
            "with respect to the frozen weights, as far as two halves of the rows agree on them. They also say how "
            "much rank pays off in each module, see [Ranks and budgets](ranks.md). A forward and a backward pass per "
            "row.",
            "gradient",
            reads=LABELS,
            needs_backward=True,
            keys=("num_samples", "seed", "time"),
            units=("module", "group", "layer"),
            rank_allocation="score",
        ),
        Method(
            "flexora",
            "The layer's gate after a short search that trains: above 0 if its LoRA helped more than that of other "
            "layers on rows that it was not trained on. See [The search](flexora.md).",
            "flexora.choice",
            reads=BATCHES,
            needs_backward=True,
            keys=("flexora", "keep", "seed"),
            units=("layer", "group", "module"),
            more_evidence="more flexora.steps",
        ),
        Method(
            "random",
            "No score and no data: the layers are drawn at random with the seed.",
            "controls",
            "choose_random",
            reads=NOTHING,
            keys=("seed",),
            units=("layer", "group", "module"),
        ),
        Method(
            "first",
            "No score and no data: the lowest layers are chosen.",
            "controls",
            "choose_first",
            reads=NOTHING,
            keys=(),
        ),
        Method(
            "last",
            "No score and no data: the highest layers are chosen.",
            "controls",
            "choose_last",
            reads=NOTHING,
            keys=(),
        ),
        Method(
            "explicit",
            "No score and no data: the layers that you list are chosen.",
            "controls",
            "choose_explicit",
            reads=NOTHING,
            keys=("layers",),
        ),
    )
}


def get_method(name: str) -> Method:
    """Return the method ``name``.

    Raises:
        LayerselError: if no method has this name.
    """
    if name not in METHODS:
        raise LayerselError(f"layersel.selection.method: {name!r} is not known: {suggest(name, METHODS)}")
    return METHODS[name]


def list_data_free() -> str:
    """Return the names of the methods that read no data, for messages."""
    return ", ".join(method.name for method in METHODS.values() if not method.needs_data)
