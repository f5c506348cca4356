"""The error of this package, suggestions for misspelt words in its messages, and reports that may fail."""

import contextlib
import difflib
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from axolotl_layersel.common.terminal import clean

LOG = logging.getLogger("axolotl.layersel")


class LayerselError(ValueError):
    """A setting, a file or a model that is refused. The message is one line that names it and a way out."""

    def __init__(self, message: str) -> None:
        super().__init__(clean(message))


def raise_first(faults: Iterable[str]) -> None:
    """Raise LayerselError with the first of ``faults``, which are messages, if there is one."""
    for fault in faults:
        raise LayerselError(fault)


def find_fault(check: Callable[..., object], *args: Any) -> Iterator[str]:
    """Yield the message of the LayerselError that ``check(*args)`` raises, nothing if it raises none."""
    try:
        check(*args)
    except LayerselError as error:
        yield str(error)


def suggest(word: str, known: Iterable[str]) -> str:
    """Return ``"did you mean X?"`` with the closest of ``known``, or the whole list if none is close."""
    known = sorted(known)
    nearest = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {nearest[0]!r}?" if nearest else f"known are: {', '.join(known)}"


@contextlib.contextmanager
def warning_instead(failure: str, then: str) -> Iterator[None]:
    """Log a warning in place of an error within the block, which only reports on a run and must not end it.

    Args:
        failure: what has failed, such as ``the plan cannot be printed``.
        then: what becomes of the run, and where the content of the report is, in sentences.
    """
    try:
        yield
    # An error of any library. rich exits the process if standard output is closed, as in `axolotl train ... | head`.
    except (Exception, SystemExit) as error:
        LOG.warning("layersel: %s (%s: %s). %s", failure, type(error).__name__, clean(str(error)), then)
