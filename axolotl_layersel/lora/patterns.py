"""PEFT's ``rank_pattern`` and ``alpha_pattern``: write them, and read them as PEFT does."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

V = TypeVar("V")


def write_pattern(values: Mapping[str, float]) -> dict[str, float]:
    """Return a ``rank_pattern`` or ``alpha_pattern`` that gives each module, by full name, its value.

    The result has one pattern per distinct value, not per module: PEFT matches every module against every pattern, and
    Python caches only 512 compiled ones. PEFT also matches a name at the end of a longer one, so such names are
    anchored with ``^``.
    """
    ends = {end for name in values for end in list_ends(name)}
    names: dict[float, list[str]] = {}
    for name in sorted(values):
        names.setdefault(values[name], []).append(f"{'^' if name in ends else ''}{re.escape(name)}")
    return {"|".join(names[value]): value for value in sorted(names)}


def read_pattern(patterns: Mapping[str, V], modules: Iterable[str]) -> dict[str, V]:
    """Return the values that a ``rank_pattern`` or ``alpha_pattern`` gives to ``modules``, by PEFT's rule."""
    compiled = [(re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in patterns.items()]
    found = {name: next((value for pattern, value in compiled if pattern.match(name)), None) for name in modules}
    return {name: value for name, value in found.items() if value is not None}


def list_ends(name: str) -> list[str]:
    """Return the parts of a name after each of its dots: ``b.c`` and ``c`` for ``a.b.c``."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(1, len(parts))]


def resolve(config: Any, modules: Iterable[str]) -> dict[str, tuple[int, float]]:
    """Return the rank and the scaling that PEFT gives each of ``modules``.

    ``config``: a ``LoraConfig``, or anything with its fields of ranks and alphas.
    """
    modules = list(modules)
    ranks, alphas = (read_pattern(pattern or {}, modules) for pattern in (config.rank_pattern, config.alpha_pattern))
    resolved = {}
    for name in modules:
        rank, alpha = ranks.get(name, config.r), alphas.get(name, config.lora_alpha)
        resolved[name] = rank, alpha / (math.sqrt(rank) if config.use_rslora else rank)
    return resolved


def scale_by_rank(scaling: float, before: int, after: int, exponent: float) -> float:
    """Return the scaling of a module whose rank changes: ``scaling`` · (``before`` / ``after``)^``exponent``.

    Rank 0, which a module has without any component in use, counts as rank 1.
    """
    return scaling * (max(before, 1) / max(after, 1)) ** exponent
