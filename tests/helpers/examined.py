"""Files for ``doctor``, and their models without weights."""

import json
from dataclasses import replace
from pathlib import Path

from axolotl_layersel.cli.doctor.case import Case
from axolotl_layersel.cli.doctor.model import build_model
from axolotl_layersel.config.faults import list_faults

CONFIGS = Path(__file__).parent / "model_configs"
TARGETS = ["q_proj", "v_proj", "down_proj"]
FILE = {
    "base_model": "base",
    "plugins": ["axolotl_layersel.LayerSelectionPlugin"],
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_target_modules": TARGETS,
    "optimizer": "adamw_torch",
}


def make_case(base, processes: int = 1, lowest: int | None = None, **values) -> Case:
    """Return the case of a file whose base model has the configuration of ``base``."""
    data = {**FILE, **values}
    block, faults = list_faults(data, with_folder=False)
    assert not faults
    case = Case(data, block.drop_unread(), block, processes, lowest=lowest)
    content = json.loads(base.config.to_json_string(use_diff=False))
    return replace(case, model=build_model(content, data, block.selection, 3))


def collect(facts: list) -> dict:
    """Return the values of facts by key."""
    return {fact.key: fact.value for fact in facts}
