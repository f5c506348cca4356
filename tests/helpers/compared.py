"""Comparisons that tests share: their settings, and cells that have ended, without any run."""

from axolotl_layersel.cli.compare.arms import make_arms
from axolotl_layersel.cli.compare.cells import Cell
from axolotl_layersel.cli.compare.figures import CurvePoint, Figures, Settings

FILE = {
    "base_model": "some/model",
    "adapter": "lora",
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_target_modules": ["q_proj", "v_proj"],
    "learning_rate": 2e-4,
    "datasets": [{"path": "rows.jsonl", "type": "alpaca"}],
    "output_dir": "out",
}


def make_settings(arms=("lora", "random"), data=FILE, **values) -> Settings:
    """Return the settings of a comparison."""
    given = {
        "yaml": "run.yml",
        "folder": "out/compare",
        "arms": make_arms(list(arms), data),
        "rates": [5e-5, 1e-4, 2e-4, 4e-4, 8e-4],
        "seeds": [42, 43, 44],
        "steps": 100,
        "held_out": "10% of the training rows",
        "lora_r": 16,
    }
    return Settings(**{**given, **values})


def make_figures(cell: Cell, loss: float, digest: str = "", **values) -> Figures:
    """Return the figures of a cell."""
    given = {
        "real_steps": 1000,
        "train_rows": 90,
        "validation_rows": 5,
        "test_rows": 5,
        "validation_loss": loss,
        "test_loss": loss,
        "base_test_loss": 2.0,
        "trainable_parameters": 100,
        "seconds_choosing": 0.0,
        "seconds_per_step": 0.1,
        "seconds_training": 10.0,
        "peak_memory_bytes": 1000,
        "memory_of": "process",
        "adapter_bytes": 400,
        "curve": [CurvePoint(step=0, seconds=0, validation_loss=2.0)],
        "engine": "single",
        "processes": 1,
    }
    named = {"arm": cell.arm, "rate": cell.rate, "seed": cell.seed, "steps": cell.steps}
    return Figures(**named, config_digest=digest, **{**given, **values})
