"""The error of this package, and suggestions for misspelt words in its messages."""

import difflib
from collections.abc import Iterable

from axolotl_layersel.common.terminal import clean


class LayerselError(ValueError):
    """A setting, a file or a model that is refused. The message is one line that names it and a way out."""

    def __init__(self, message: str) -> None:
        super().__init__(clean(message))


def suggest(word: str, known: Iterable[str]) -> str:
    """Return ``"did you mean X?"`` with the closest of ``known``, or the whole list if none is close."""
    known = sorted(known)
    nearest = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {nearest[0]!r}?" if nearest else f"known are: {', '.join(known)}"
