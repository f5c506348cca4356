"""A run with a plain Trainer on several nodes."""

from pathlib import Path

from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.engines import collectives, find_engine
from axolotl_layersel.training.prepare import prepare_trainer
from helpers.models import make_lora, make_small_llama, make_trainer


def train_plainly(folder: str) -> None:
    """Train on one of two nodes with a plain Trainer that saves checkpoints on each node."""
    from accelerate import PartialState

    PartialState(cpu=True)
    arguments = {"save_on_each_node": True, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(make_lora(make_small_llama()), Path(folder), **arguments)
    prepare_trainer(trainer, LayerselConfig(selection={"method": "first", "num_layers": 3}))
    assert find_engine(trainer).name == "ddp"
    trainer.train()
    trainer.save_model()
    collectives.leave(0)
