"""The controls that every claim is measured against: random, first, last and explicit layers."""

import random


def choose_without_data(
    method: str, candidates: list[int], keep: int, seed: int, layers: list[int] | None = None
) -> list[int]:
    """Return the layers that a control keeps, ascending.

    ``random`` draws ``keep`` of the ``candidates`` by ``seed``; ``first`` and ``last`` take the lowest and the
    highest; ``explicit`` takes ``layers``.
    """
    candidates = sorted(candidates)
    if method == "random":
        return sorted(random.Random(seed).sample(candidates, keep))
    if method == "first":
        return candidates[:keep]
    if method == "last":
        return candidates[len(candidates) - keep :]
    return sorted(layers or [])
