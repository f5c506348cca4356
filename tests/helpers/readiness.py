"""A run of a model with another adapter, on every process of an engine."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.l1ra import L1RAConfig
from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.config.selection import SelectionConfig
from axolotl_layersel.lora.run import Run
from axolotl_layersel.training.prepare import prepare_trainer
from helpers.models import make_lora, make_rows, make_trainer
from helpers.processes import make_arguments, train_and_record

BLOCKS = {
    "selection": LayerselConfig(selection=SelectionConfig(method="last", ratio=0.5)),
    "freeze": LayerselConfig(selection=SelectionConfig(method="last", ratio=0.5, unselected="freeze")),
    "l1ra": LayerselConfig(l1ra=L1RAConfig(update_ratio=0.2, move_ratio=0.3)),
}


def freeze_all(model):
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def train_beside_another(engine: str, base: str, folder: str) -> None:
    """Train an adapter and biases on an engine with another adapter in the model.

    Then one process switches to it, one trains nothing, and one has a third adapter.
    """
    from transformers import LlamaForCausalLM

    import helpers.cpu_engines  # noqa: F401  # lets the engines run without a GPU

    arguments = {**make_arguments(engine, ["LlamaDecoderLayer"]), "use_cpu": False, "save_strategy": "no"}

    def make(place: str):
        def load(arguments):
            # From a file, because ZeRO-3 then shards it at once.
            loaded = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
            model = make_lora(loaded, task_type="CAUSAL_LM", bias="lora_only")
            torch.manual_seed(7)  # the same on all processes
            model.add_adapter("other", LoraConfig(r=3, target_modules=["q_proj", "up_proj"]))
            return model

        return make_trainer(load, Path(folder) / place, make_rows(16, longest=7), **arguments)

    trainer = make("trained")
    run = Run.of(trainer)
    prepare_trainer(trainer, BLOCKS["selection"])
    others = {name: parameter for name, parameter in trainer.model.named_parameters() if ".other." in name}
    before = {name: run.engine.gather_parameter(parameter) for name, parameter in others.items()}
    train_and_record(trainer, folder)
    run.engine.reshard()
    after = {name: run.engine.gather_parameter(parameter) for name, parameter in trainer.model.named_parameters()}
    assert len(before) == 6 * 2 * 2 and all(torch.equal(value, after[name]) for name, value in before.items())

    rank, differing = trainer.args.process_index, make("differing")
    prepare_trainer(differing, BLOCKS["selection"])
    if rank == trainer.args.world_size - 1:
        differing.model.set_adapter("other")
    with pytest.raises(LayerselError) as caught:
        differing.train()
    idle = make("idle")
    if rank == 0:
        freeze_all(idle.model)
    with pytest.raises(LayerselError) as stopped:
        prepare_trainer(idle, BLOCKS["selection"])
    refusals = [caught.value, stopped.value]
    if engine != "single":
        added = make("added")
        prepare_trainer(added, BLOCKS["selection"])
        if rank == 0:
            added.model.add_adapter("third", LoraConfig(r=3, target_modules=["v_proj"]))
        with pytest.raises(LayerselError) as refused:
            added.train()
        refusals.append(refused.value)
    (Path(folder) / f"refusals-{rank}").write_text("\n".join(map(str, refusals)))
