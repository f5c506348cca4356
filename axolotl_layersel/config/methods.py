"""How layers are chosen: the table of methods. Each has a module of its own, which is loaded when it is used.

Nothing here imports torch, so that settings can be checked without it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from axolotl_layersel.common.errors import LayerselError, suggest

# The package whose modules the methods are.
PACKAGE = "axolotl_layersel.selection.methods"
# What a method reads of the data.
NOTHING = "nothing"
TOKENS = "tokens"
LABELS = "tokens and labels"
BATCHES = "batches"  # it trains on them, whatever they are made of


@dataclass(frozen=True)
class Method:
    """A way to choose layers.

    Attributes:
        name: the value of ``method`` in the YAML file.
        summary: what the score of a layer is, for the documentation.
        module: where its function is, below this package.
        function: takes a ``Selection`` and returns a ``Choice``; every rank calls it.
        reads: what it reads of the data.
        needs_backward: whether it runs the model backward.
        keys: of the ``selection`` block, those that not every method has.
        units: what it can choose among, see ``units.UNITS``; the first is the default.
        rank_allocation: its default.
        fewest_samples: rows that it needs at least.
        more_evidence: what to give more of when its scores do not tell layers apart.
        way_out: what to do when layers cannot be scored.
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
        """Whether it looks at the data."""
        return self.reads != NOTHING

    def load(self) -> Callable[[Any], Any]:
        """Return its function, which takes a ``Selection`` and returns a ``Choice``."""
        return getattr(importlib.import_module(f"{PACKAGE}.{self.module}"), self.function)


METHODS = {
    method.name: method
    for method in (
        Method(
            "cka",
            "How much the layer rearranges your rows relative to each other: 0, they lie as before; towards "
            "1, in a new order. (1 minus the linear CKA of its input and output.) One forward pass per row.",
            "cka",
            keys=("num_samples", "seed", "token"),
            units=("layer", "group"),
            fewest_samples=3,  # the CKA of two rows is always 1
            way_out="Use `token: auto` or `mean`, or keep fewer layers.",
        ),
        Method(
            "cosine",
            "How far the layer turns the hidden state of a token, averaged over all tokens: 0, not at all; 1, "
            "to a right angle. One forward pass per row.",
            "cosine",
            units=("layer", "group"),
        ),
        Method(
            "relative",
            "How much the layer adds to the hidden state of a token, for its size, averaged over all tokens: 0, "
            "nothing; 1, as much as there was. One forward pass per row.",
            "relative",
            units=("layer", "group"),
        ),
        Method(
            "fisher",
            "How strongly the likelihood of your answers (for a classifier, of each row's label) depends on "
            "the layer's own frozen weights: the squared gradient, averaged over rows and weights. A forward "
            "and a backward pass per row, with the logits of a few answer tokens at a time, so that a large "
            "vocabulary takes no more memory. Axolotl's fused LoRA kernels are off meanwhile.",
            "fisher",
            reads=LABELS,
            needs_backward=True,
            units=("layer", "group", "module"),
        ),
        Method(
            "gradient",
            "What LoRA with `lora_r` there can be expected to gain: the singular values of the loss's gradient by "
            "the frozen weights, as far as they are the same in two halves of the rows. They also say how much rank "
            "pays where, see [below](#rank-where-it-pays). A forward and a backward pass per row.",
            "gradient",
            reads=LABELS,
            needs_backward=True,
            units=("module", "group", "layer"),
            rank_allocation="score",
        ),
        Method(
            "flexora",
            "The layer's gate after a short search that trains: above 0, its LoRA helped on rows that it was "
            "not trained on more than others' did. See [below](#searching-with-gates).",
            "flexora.choice",
            reads=BATCHES,
            needs_backward=True,
            keys=("flexora", "keep", "seed"),
            units=("layer", "group", "module"),
            more_evidence="more flexora.steps",
        ),
        Method(
            "random",
            "None, and no data are read: the layers are drawn by the seed.",
            "controls",
            "choose_random",
            reads=NOTHING,
            keys=("seed",),
            units=("layer", "group", "module"),
        ),
        Method(
            "first",
            "None, and no data are read: the lowest layers are kept.",
            "controls",
            "choose_first",
            reads=NOTHING,
            keys=(),
        ),
        Method(
            "last",
            "None, and no data are read: the highest layers are kept.",
            "controls",
            "choose_last",
            reads=NOTHING,
            keys=(),
        ),
        Method(
            "explicit",
            "None, and no data are read: the layers that you list are kept.",
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
        LayerselError: if there is none.
    """
    if name not in METHODS:
        raise LayerselError(f"layersel.selection.method: {name!r} is not known: {suggest(name, METHODS)}")
    return METHODS[name]


def list_data_free() -> str:
    """Return the names of the methods that look at no data, for messages."""
    return ", ".join(method.name for method in METHODS.values() if not method.needs_data)
