"""Gates on LoRA modules or on their rank components: the same fp32 numbers on every rank, outside the engine."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from axolotl_layersel.engines import collectives

ATTRIBUTE = "layersel_gate"


class Gates:
    """Named gate vectors: a LoRA module under the gate c computes B·diag(c)·A·x·scaling.

    A gate has a number for each rank component, or one for all of them. Each is a leaf of autograd that no
    engine and no optimizer of the user's knows, so ZeRO, FSDP, clipping, loss scaling and learning-rate schedules
    pass it by. All lie in one flat tensor, as do their gradients: one all-reduce averages them.

    Attributes:
        values: (numbers of all gates,), fp32.
        gradient: the same shape, fp32; what backward passes have added up since ``clear_gradient``.
        parts: where each gate's numbers lie, by its name.

    Args:
        linears: the A of the modules that share a gate, by the gate's name.
        components: numbers in each gate: the modules' rank, or 1.
        device: where the gates are.
    """

    def __init__(self, linears: Mapping[str, Sequence[nn.Module]], components: int, device: torch.device) -> None:
        self.linears = linears
        self.parts = {name: slice(i * components, (i + 1) * components) for i, name in enumerate(linears)}
        self.values = torch.ones(len(linears) * components, device=device)
        self.gradient = torch.zeros_like(self.values)
        self.leaves: dict[str, torch.Tensor] = {}
        self.handles: list[torch.utils.hooks.RemovableHandle] = []

    def attach(self) -> None:
        """Let the modules multiply by their gates from now on."""
        for name, linears in self.linears.items():
            gate = self.values[self.parts[name]].detach().requires_grad_()
            # Backward adds to a gradient that is there in place: into the flat one.
            gate.grad = self.gradient[self.parts[name]]
            self.leaves[name] = gate
            for linear in linears:
                # An attribute and one hook for all, not a closure each: compiled code is shared between layers.
                setattr(linear, ATTRIBUTE, gate)
                self.handles.append(linear.register_forward_hook(multiply_by_gate))

    def detach(self) -> None:
        """Let the modules be plain LoRA modules again."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.leaves.clear()
        for linear in (linear for linears in self.linears.values() for linear in linears):
            if hasattr(linear, ATTRIBUTE):
                delattr(linear, ATTRIBUTE)

    def average_gradient(self) -> None:
        """Average the gradient over all ranks; a collective call."""
        collectives.average(self.gradient)

    def clear_gradient(self) -> None:
        """Start adding up anew."""
        self.gradient.zero_()

    def name_component(self, index: int) -> str:
        """Return the name of the gate that the number ``index`` of the flat tensors belongs to."""
        return next(name for name, part in self.parts.items() if part.start <= index < part.stop)


def multiply_by_gate(linear: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    """Return A·x times the gate; the product is rounded to the type of ``output`` once."""
    return (output * getattr(linear, ATTRIBUTE).to(output.device)).to(output.dtype)
