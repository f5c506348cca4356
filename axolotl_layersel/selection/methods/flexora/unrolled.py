"""Unrolled gate steps: the LoRA steps since the last one, repeated as differentiable SGD steps.

These virtual steps train only the LoRA weights under gates, without dropout. With SGD as the run's optimizer, and
without dropout or clipping, they reach the weights of the run.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Trainer

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.engines import trainers
from axolotl_layersel.engines.collectives import average_differentiably
from axolotl_layersel.lora.gates import Gates
from axolotl_layersel.selection.methods.flexora.hypergradient import Loss, find_unrolled_gradient

# A function from a micro-batch to its loss, summed over the labels, and their number.
SummedLoss = Callable[[Any], tuple[torch.Tensor, torch.Tensor]]


class InnerSteps:
    """The optimizer steps since the last gate step.

    Attributes:
        weights: the LoRA weights before them, fp32, by name in the trainer's model.
        steps: the micro-batches of each step, each with the ``num_items_in_batch`` of the trainer; the last step can be
            incomplete.
        learning_rates: the learning rate of each step.
    """

    def __init__(self, trainer: Trainer, gates: Gates) -> None:
        self.trainer = trainer
        self.gates = gates
        self.weights: dict[str, torch.Tensor] = {}
        self.steps: list[list[tuple[Any, Any]]] = []
        self.learning_rates: list[float] = []

    def begin(self) -> None:
        """Start from the current weights."""
        self.weights = {name: weight.detach().float().clone() for name, weight in self.find_weights().items()}
        self.steps, self.learning_rates = [[]], []

    def find_weights(self) -> dict[str, nn.Parameter]:
        """Return the LoRA weights under gates, by their name in the trainer's model."""
        downs = {id(linear) for linears in self.gates.linears.values() for linear in linears}
        weights: dict[str, nn.Parameter] = {}
        for name, module in trainers.get_model(self.trainer).named_modules():
            for adapter, down in getattr(module, "lora_A", {}).items():
                if id(down) in downs:
                    weights[f"{name}.lora_A.{adapter}.weight"] = down.weight
                    weights[f"{name}.lora_B.{adapter}.weight"] = module.lora_B[adapter].weight
        return weights

    def add(self, inputs: Any, num_items_in_batch: Any) -> None:
        """Add a micro-batch to the current step.

        Raises:
            LayerselError: if the optimizer has several learning rates.
        """
        assert self.trainer.optimizer is not None, "the trainer makes steps with it"
        rates = {float(group["lr"]) for group in self.trainer.optimizer.param_groups}
        if len(rates) > 1:
            raise LayerselError(
                "layersel.selection.flexora.hypergradient: 'unrolled' makes the LoRA steps with one learning rate, and "
                f"the optimizer has {len(rates)}. Use `first_order`, or one learning rate."
            )
        self.steps[-1].append((dict(inputs), num_items_in_batch))
        self.learning_rates[len(self.steps) - 1 :] = rates

    def end_step(self) -> None:
        """End the current step."""
        self.steps.append([])

    def measure(self, batches: list[Any], compute_loss: SummedLoss) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the validation loss after the unrolled steps, summed over labels, and the number of labels.

        The gradient is written to the gates'. Every process must call this.
        """
        labels = torch.zeros((), device=self.gates.values.device)
        names, model = list(self.weights), LossOf(self.trainer)

        def evaluate(weights: list[torch.Tensor], compute: Callable, *args: Any) -> Any:
            swapped = {f"model.{name}": weight for name, weight in zip(names, weights, strict=True)}
            return torch.func.functional_call(model, swapped, (compute, *args))

        def make_inner_loss(step: list[tuple[Any, Any]]) -> Loss:
            def inner_loss(weights: list[torch.Tensor]) -> torch.Tensor:
                losses = [evaluate(weights, self.compute_inner_loss, *part, len(step)) for part in step]
                return torch.stack(losses).sum()

            return inner_loss

        def validate(weights: list[torch.Tensor]) -> torch.Tensor:
            nonlocal labels
            losses = []
            for inputs in batches:
                loss, targets = evaluate(weights, compute_loss, inputs)
                losses.append(loss)
                labels = labels + targets
            return torch.stack(losses).sum()

        with without_checkpointing(trainers.get_model(self.trainer)), sdpa_kernel(SDPBackend.MATH):
            loss, gradients = find_unrolled_gradient(
                [weight.requires_grad_() for weight in self.weights.values()],
                list(self.gates.leaves.values()),
                [make_inner_loss(step) for step in self.steps if step],
                self.learning_rates,
                validate,
                average_differentiably,
            )
        self.gates.gradient.copy_(torch.cat(gradients))
        return loss, labels

    def compute_inner_loss(self, inputs: Any, num_items_in_batch: Any, micro_batches: int) -> torch.Tensor:
        """Return the loss of a training micro-batch with its weight in the optimizer step."""
        trainer = self.trainer
        prepared = trainers.prepare_inputs(trainer, dict(inputs))
        loss = trainers.compute_loss(trainer, prepared, num_items_in_batch)
        by_labels = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        return loss if by_labels or trainer.compute_loss_func is not None else loss / micro_batches


class LossOf(nn.Module):
    """A trainer's model, as a module whose weights ``torch.func.functional_call`` can exchange for a loss."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__()
        self.model = trainer.model

    def forward(self, compute: Callable, *args: Any) -> Any:
        """Return the result of ``compute``."""
        return compute(*args)


@contextlib.contextmanager
def without_checkpointing(model: nn.Module) -> Iterator[None]:
    """Make the model keep its activations: recomputed in the backward pass, they would have the wrong weights."""
    layers: list[Any] = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True
