"""Plans that no run has made."""

import random
from dataclasses import asdict

from axolotl_layersel.config.selection import SelectionConfig
from axolotl_layersel.selection.gate_history import GateHistory
from axolotl_layersel.selection.plan import LayerChoice, Plan


def make_plan(scores: list[float | None] = (0.5, None, 0.1), selected: tuple[int, ...] = (0,), **values) -> Plan:
    layers = [LayerChoice(layer=i, score=score, selected=i in selected) for i, score in enumerate(scores)]
    settings = asdict(SelectionConfig(method="cka").resolve(run_seed=1))
    default = {
        "method": "cka",
        "unselected": "remove",
        "stack": "model.layers",
        "modules": [f"model.layers.{i}.self_attn.q_proj" for i in selected],
        "settings": settings,
        "seed": 1,
        "calibration_rows": [3, 1],
        "dataset_fingerprint": "sha256:00",
        "base_model": "some/model",
        "versions": {},
        "engine": "single",
        "processes": 1,
        "seconds": 0.5,
    }
    return Plan(layers=layers, **{**default, **values})


TYPES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj")


def make_search(names: list[str], steps: int = 5) -> GateHistory:
    generator, history = random.Random(0), GateHistory(names)
    slopes = [generator.gauss(0, 1) for _ in names]
    for step in range(1, steps + 1):
        history.add(1 / step, 2 / step if step % 2 else None, [slope * step for slope in slopes])
    return history


def list_modules(layers: int) -> list[str]:
    return [f"model.layers.{layer}.{kind}" for layer in range(layers) for kind in TYPES]
