"""Gates on LoRA modules or their rank components: fp32 numbers outside the engine, the same on every process."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from axolotl_layersel.engines import collectives

ATTRIBUTE = "layersel_gate"


class Gates:
    """Named gate vectors: a LoRA module with gate c adds B·diag(c)·A·x·scaling.

    A gate has one number per rank component, or one in all. Each gate is an autograd leaf that is unknown to the engine
    and to the user's optimizer, so sharding, clipping, loss scaling and learning-rate schedules do not affect it. All
    gates share one flat tensor, and their gradients another, so one all-reduce averages them.

    Attributes:
        values: all gates, (numbers,), fp32.
        gradient: the gradient accumulated since ``clear_gradient``, (numbers,), fp32.
        parts: each gate's slice of the flat tensors, by name.

    Args:
        linears: the A of the modules that share a gate, by the gate's name.
        components: numbers in each gate: the modules' rank, or 1.
        device: the device of the gates.
    """

    def __init__(self, linears: Mapping[str, Sequence[nn.Module]], components: int, device: torch.device) -> None:
        self.linears = linears
        self.parts = {name: slice(i * components, (i + 1) * components) for i, name in enumerate(linears)}
        self.values = torch.ones(len(linears) * components, device=device)
        self.gradient = torch.zeros_like(self.values)
        self.leaves: dict[str, torch.Tensor] = {}
        self.handles: list[torch.utils.hooks.RemovableHandle] = []

    def attach(self) -> None:
        for name, linears in self.linears.items():
            gate = self.values[self.parts[name]].detach().requires_grad_()
            # Backward accumulates into an existing gradient in place, here a view of the flat one.
            gate.grad = self.gradient[self.parts[name]]
            self.leaves[name] = gate
            for linear in linears:
                # One hook reads the gate from an attribute: unlike closures, it lets layers share compiled code.
                setattr(linear, ATTRIBUTE, gate)
                self.handles.append(linear.register_forward_hook(multiply_by_gate))

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.leaves.clear()
        for linear in (linear for linears in self.linears.values() for linear in linears):
            if hasattr(linear, ATTRIBUTE):
                delattr(linear, ATTRIBUTE)

    def average_gradient(self) -> None:
        """Average the gradient over all processes; a collective call."""
        collectives.average(self.gradient)

    def clear_gradient(self) -> None:
        self.gradient.zero_()

    def name_component(self, index: int) -> str:
        """Return the name of the gate that owns the number ``index`` of the flat tensors."""
        return next(name for name, part in self.parts.items() if part.start <= index < part.stop)


def multiply_by_gate(linear: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    """Return A·x times the gate, rounded once to the dtype of ``output``."""
    return (output * getattr(linear, ATTRIBUTE).to(output.device)).to(output.dtype)
