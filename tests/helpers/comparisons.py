"""Comparisons of arms with planted losses, without training."""

import random
from collections.abc import Mapping
from typing import Any

from axolotl_layersel.cli.compare.figures import ArmSettings, Comparison, CurvePoint, Failure, Figures, Settings

RATES = [1e-4, 2e-4, 4e-4]
MODULES = [f"model.layers.{layer}.{name}" for layer in range(6) for name in ("self_attn.q_proj", "mlp.up_proj")]
# What each arm of these comparisons does to the YAML file, and whether it chooses by the data.
ARMS: dict[str, tuple[dict[str, Any], bool]] = {
    "lora": ({"layersel": None}, False),
    "gradient": ({"layersel": {"selection": {"method": "gradient"}}}, True),
    "cka": ({"layersel": {"selection": {"method": "cka"}}}, True),
    "random": ({"layersel": {"selection": {"method": "random"}}}, False),
    "l1ra": ({"layersel": {"l1ra": {}}}, False),
    "lora@32": ({"layersel": None, "lora_r": 32}, False),
    "lora@4": ({"layersel": None, "lora_r": 4}, False),
}


def make_cell(arm: str, seed: int, loss: float, **changes: Any) -> Figures:
    """Return a cell with the test loss ``loss``; ``changes`` are further figures."""
    steps = changes.get("steps", 100)
    pace = {"random": 0.8, "cka": 0.8, "lora@32": 1.05}.get(arm, 1.0)
    start = 3.0
    validation = changes.get("validation_loss", loss + 0.01)
    curve = [
        CurvePoint(step=step, seconds=pace * step, validation_loss=validation + (start - validation) * (1 - part) ** 2)
        for part in (index / 8 for index in range(9))
        for step in (round(part * steps),)
    ]
    kept = MODULES if arm.startswith(("lora", "l1ra")) else random.Random(seed).sample(MODULES, 6)
    rank = {"lora@32": 32, "lora@4": 4}.get(arm, 16)
    figures: dict[str, Any] = {
        "arm": arm,
        "rate": 2e-4,
        "seed": seed,
        "steps": steps,
        "config_digest": f"{arm}-{seed}",
        "real_steps": 2500,
        "train_rows": 7000,
        "validation_rows": 350,
        "test_rows": 350,
        "validation_loss": validation,
        "test_loss": loss,
        "base_test_loss": start,
        "trainable_parameters": 61_440 * rank,
        "seconds_choosing": 12.5 if arm in ("gradient", "cka") else 0.0,
        "seconds_per_step": pace,
        "seconds_training": pace * steps,
        "peak_memory_bytes": 11_200_000_000 + 1_000_000 * rank,
        "memory_of": "device",
        "adapter_bytes": 122_880 * rank,
        "curve": curve,
        "ranks": {name: rank * len(MODULES) // len(kept) for name in MODULES if name in kept},
        "selected": None if len(kept) == len(MODULES) else (4, 6),
        "engine": "single",
        "processes": 1,
    }
    return Figures(**figures | changes)


def make_failure(arm: str, seed: int, rate: float = 2e-4, steps: int = 100) -> Failure:
    """Return a failed cell."""
    return Failure(
        arm=arm,
        rate=rate,
        seed=seed,
        steps=steps,
        config_digest=f"{arm}-{seed}",
        sentence="CUDA out of memory. Tried to allocate 2.00 GiB",
        log=f"outputs/run/compare/{arm}/{rate:g}/{seed}/log.txt",
    )


def make_comparison(
    cells: list[Figures | Failure], arms: Mapping[str, tuple[dict[str, Any], bool]] | None = None, **changes: Any
) -> Comparison:
    """Return a comparison of ``cells``; ``changes`` are further fields of it and of its settings."""
    names = dict.fromkeys(["lora", *(cell.arm for cell in cells)])
    arms = arms or {name: ARMS[name] for name in names}
    settings: dict[str, Any] = {
        "yaml": "run.yml",
        "folder": "outputs/run/compare",
        "arms": {name: ArmSettings(keys=keys, choosing=choosing) for name, (keys, choosing) in arms.items()},
        "rates": RATES,
        "seeds": sorted({cell.seed for cell in cells}) or [0],
        "steps": 100,
        "held_out": "10 % of the rows of the data",
        "lora_r": 16,
    }
    fields: dict[str, Any] = {
        "cells": cells,
        "best_rates": {cell.arm: 2e-4 for cell in cells if isinstance(cell, Figures)},
        "planned": len(cells),
    }
    for key, value in changes.items():
        (fields if key in Comparison.model_fields else settings)[key] = value
    return Comparison(settings=Settings(**settings), **fields)


def plant(
    gains: Mapping[str, float], seeds: int = 3, noise: float = 0.003, draw: float = 0.03, start: int = 0
) -> list[Figures | Failure]:
    """Return cells whose losses are 2.2 with ``gains`` added, an effect of the seed, and noise.

    Args:
        gains: what each arm adds to the loss; ``lora`` adds 0.
        seeds: the number of seeds.
        noise: the standard deviation of the noise of a cell.
        draw: that of what a random choice adds to it.
        start: the seed of the noise.
    """
    stream = random.Random(start)
    effects = [stream.gauss(0, 0.02) for _ in range(seeds)]
    spread = {"random": (noise**2 + draw**2) ** 0.5}
    return [
        make_cell(arm, seed, 2.2 + gain + effects[seed] + stream.gauss(0, spread.get(arm, noise)))
        for arm, gain in {"lora": 0.0, **gains}.items()
        for seed in range(seeds)
    ]
