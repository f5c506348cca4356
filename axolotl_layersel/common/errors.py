"""The one error of this package, and the sentence it ends in."""

import difflib
from collections.abc import Iterable

from axolotl_layersel.common.terminal import clean


class LayerselError(ValueError):
    """A setting, a file or a model that cannot be honoured: the message, one line, names it and the way out."""

    def __init__(self, message: str) -> None:
        super().__init__(clean(message))


def suggest(word: str, known: Iterable[str]) -> str:
    """Return ``"did you mean X?"`` for the nearest of ``known``, or the whole list where none is near."""
    known = sorted(known)
    nearest = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {nearest[0]!r}?" if nearest else f"known are: {', '.join(known)}"
