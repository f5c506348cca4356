"""Gates on the rank components of LoRA modules: the same fp32 numbers on every rank, outside the engine."""

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from axolotl_layersel import engines

ATTRIBUTE = "layersel_gate"


class Gates:
    """A gate for every rank component of every module: the module computes B·diag(c)·A·x·scaling.

    Each gate vector is a leaf of autograd that no engine and no optimizer of the user's knows, so ZeRO, FSDP,
    clipping, loss scaling and learning-rate schedules pass it by. All lie in one flat tensor, as do their
    gradients: one all-reduce averages them.

    Attributes:
        values: (components of all modules,), fp32.
        gradient: the same shape, fp32; what backward passes have added up since ``clear_gradient``.
        parts: where each module's components lie, by its name.
    """

    def __init__(self, modules: dict[str, LoraLayer], adapter: str, device: torch.device) -> None:
        self.linears = {name: module.lora_A[adapter] for name, module in modules.items()}
        self.parts: dict[str, slice] = {}
        end = 0
        for name, linear in self.linears.items():
            self.parts[name] = slice(end, end := end + linear.out_features)
        self.values = torch.ones(end, device=device)
        self.gradient = torch.zeros_like(self.values)
        self.handles: list[torch.utils.hooks.RemovableHandle] = []

    def attach(self) -> None:
        """Let the modules multiply by their gates from now on."""
        for name, linear in self.linears.items():
            gate = self.values[self.parts[name]].detach().requires_grad_()
            # Backward adds to a gradient that is there in place: into the flat one.
            gate.grad = self.gradient[self.parts[name]]
            # An attribute and one hook for all, not a closure each: compiled code is shared between layers.
            setattr(linear, ATTRIBUTE, gate)
            self.handles.append(linear.register_forward_hook(multiply_by_gate))

    def detach(self) -> None:
        """Let the modules be plain LoRA modules again."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        for linear in self.linears.values():
            if hasattr(linear, ATTRIBUTE):
                delattr(linear, ATTRIBUTE)

    def average_gradient(self) -> None:
        """Average the gradient over all ranks; a collective call."""
        engines.average(self.gradient)

    def clear_gradient(self) -> None:
        """Start adding up anew."""
        self.gradient.zero_()

    def name_component(self, index: int) -> str:
        """Return the name of the module that the component ``index`` of the flat tensors belongs to."""
        return next(name for name, part in self.parts.items() if part.start <= index < part.stop)


def multiply_by_gate(linear: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    """Return A·x times the gate; the product is rounded to the type of ``output`` once."""
    return (output * getattr(linear, ATTRIBUTE).to(output.device)).to(output.dtype)
