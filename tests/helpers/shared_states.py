"""Models whose layers share keys and values, on every process of an engine."""

from pathlib import Path

import torch

from axolotl_layersel import LayerselConfig, SelectionConfig, prepare_trainer
from helpers.families import make_base
from helpers.models import make_lora, make_trainer
from helpers.processes import make_arguments, train_and_record

TARGETS = ["q_proj", "k_proj", "v_proj"]


CHOICES = {
    "cka": {"num_samples": 9, "num_layers": 2},
    "fisher": {"num_samples": 9, "num_layers": 2},
    "gradient": {"num_samples": 9, "granularity": "layer", "num_layers": 2, "rank_allocation": "same"},
}


def run_process(family: str, engine: str, base: str, folder: str) -> None:
    """Choose with several methods on an engine, train the last choice, and write to ``folder``."""
    import helpers.cpu_engines  # noqa: F401  # lets the engines run without a GPU

    chosen = make_arguments(engine, [f"{family}TextDecoderLayer"])

    def load(arguments):
        # From a file, because ZeRO-3 then shards it at once.
        model = make_lora(type(make_base(family)).from_pretrained(base, dtype=torch.float32), TARGETS)
        model.enable_input_require_grads()
        return model

    for method, settings in CHOICES.items():
        trainer = make_trainer(load, Path(folder) / method, use_cpu=False, save_strategy="no", **chosen)
        prepare_trainer(trainer, LayerselConfig(selection=SelectionConfig(method=method, **settings)))
    train_and_record(trainer, folder)
