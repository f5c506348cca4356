"""The first step of a run: the gradients of LoRA, and how often each layer ran."""

import torch
from transformers import TrainerCallback

from axolotl_layersel import LayerselConfig, SelectionConfig, prepare_trainer
from axolotl_layersel.selection.callback import LayerSelectionCallback


class FirstGradients(TrainerCallback):
    """Keeps the gradients of the first step, and counts how often each layer ran."""

    def __init__(self, layers):
        self.kept = {}
        self.runs = [0] * len(layers)
        self.graphs = [False] * len(layers)
        for index, layer in enumerate(layers):
            first = next(layer.children())
            first = first[0] if isinstance(first, torch.nn.ModuleList) else first
            first.register_forward_pre_hook(lambda *_, index=index: self.count(index))
            layer.register_forward_hook(lambda module, args, output, index=index: self.note(index, output))

    def count(self, index):
        self.runs[index] += 1

    def note(self, index, output):
        output = output if isinstance(output, torch.Tensor) else output[0]
        self.graphs[index] = self.graphs[index] or output.grad_fn is not None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = model.named_parameters()
        self.kept = self.kept or {name: p.grad.clone() for name, p in named if p.grad is not None}


def train_selected(trainer, selection: SelectionConfig, layers, truncate: bool) -> FirstGradients:
    """Return the record of the first step of a run that ``selection`` prepares, its backward pass cut or whole."""
    prepare_trainer(trainer, LayerselConfig(selection=selection))
    if not truncate:
        trainer.remove_callback(LayerSelectionCallback)
    return train_first_step(trainer, layers)


def train_first_step(trainer, layers) -> FirstGradients:
    """Train with matrices B that are not 0, and return the record of the first step."""
    torch.manual_seed(0)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    gradients = FirstGradients(layers)
    trainer.add_callback(gradients)
    trainer.train()
    return gradients
