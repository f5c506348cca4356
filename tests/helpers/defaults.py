"""Runs with fewer rows than the defaults ask for."""

import json
from pathlib import Path

from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.engines import find_engine
from axolotl_layersel.training.prepare import prepare_trainer
from helpers.models import make_lora, make_rows, make_small_llama, make_trainer

UNREAD = "these keys are not read, and the run goes on without them: "


def choose(folder: Path, rows: int | list[dict], l1ra: dict | None = None, model=None, **block):
    """Return the trainer of a small Llama on these rows, and the plan that the block gives."""
    rows = make_rows(rows) if isinstance(rows, int) else rows
    trainer = make_trainer(model or make_lora(make_small_llama()), folder, rows, max_steps=20)
    return trainer, prepare_trainer(trainer, LayerselConfig(selection=block or None, l1ra=l1ra))


def run_process(folder: str) -> None:
    """Choose on fewer rows than there are processes."""
    plans = {}
    for method, block in {
        "cosine": {"num_samples": 2},
        "gradient": {},
        "flexora": {"ratio": 0.5, "flexora": {"steps": 3}},
    }.items():
        data = make_rows(2, seed=2)
        trainer = make_trainer(make_lora(make_small_llama()), Path(folder), data, per_device_train_batch_size=1)
        assert find_engine(trainer).name == "ddp"
        block = LayerselConfig(selection={"method": method, **block})
        plans[method] = prepare_trainer(trainer, block).model_dump(include={"modules", "ranks", "calibration_rows"})
    if trainer.accelerator.is_main_process:
        (Path(folder) / "plans.json").write_text(json.dumps(plans))
