"""A run that writes its adapter."""

from axolotl_layersel.config.l1ra import L1RAConfig
from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.config.selection import SelectionConfig
from axolotl_layersel.training.prepare import prepare_trainer
from helpers.models import make_lora, make_small_llama, make_trainer

MOVING = LayerselConfig(l1ra=L1RAConfig(update_ratio=0.2, last_update_ratio=1.0))


CHOSEN = LayerselConfig(selection=SelectionConfig(method="explicit", layers=[1, 4]))


BLOCKS = {"l1ra": MOVING, "selection": CHOSEN}


def prepare(folder, block: LayerselConfig, model=None, **arguments):
    values = {"max_steps": 12, "save_strategy": "steps", "save_steps": 4, **arguments}
    trainer = make_trainer(model or make_lora(make_small_llama()), folder, **values)
    prepare_trainer(trainer, block)
    return trainer
