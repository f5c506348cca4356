"""PEFT's ``rank_pattern`` and ``alpha_pattern``: write them, and read them as PEFT does."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from peft import LoraConfig

V = TypeVar("V")


def write_pattern(values: Mapping[str, float]) -> dict[str, float]:
    """Return a ``rank_pattern`` or ``alpha_pattern`` that gives each module, by its full name, its value.

    It has one pattern for each distinct value, not for each module: PEFT matches every module against every pattern,
    and Python keeps 512 compiled ones; past that each match is compiled anew. PEFT also takes a name as the end of a
    longer one, so a name that another one ends in is tied to the beginning.
    """
    ends = {end for name in values for end in list_ends(name)}
    names: dict[float, list[str]] = {}
    for name in sorted(values):
        names.setdefault(values[name], []).append(f"{'^' if name in ends else ''}{re.escape(name)}")
    return {"|".join(names[value]): value for value in sorted(names)}


def read_pattern(patterns: Mapping[str, V], modules: Iterable[str]) -> dict[str, V]:
    """Return the values that PEFT reads from a ``rank_pattern`` or ``alpha_pattern``, of the modules that it names."""
    compiled = [(re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in patterns.items()]
    found = {name: next((value for pattern, value in compiled if pattern.match(name)), None) for name in modules}
    return {name: value for name, value in found.items() if value is not None}


def list_ends(name: str) -> list[str]:
    """Return what a module's name ends in after each of its dots: ``a.b.c`` ends in ``b.c`` and ``c``."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(1, len(parts))]


def resolve(config: LoraConfig, modules: Iterable[str]) -> dict[str, tuple[int, float]]:
    """Return the rank and the scaling that PEFT gives each of ``modules`` under ``config``."""
    modules = list(modules)
    ranks, alphas = (read_pattern(pattern or {}, modules) for pattern in (config.rank_pattern, config.alpha_pattern))
    resolved = {}
    for name in modules:
        rank, alpha = ranks.get(name, config.r), alphas.get(name, config.lora_alpha)
        resolved[name] = rank, alpha / (math.sqrt(rank) if config.use_rslora else rank)
    return resolved
