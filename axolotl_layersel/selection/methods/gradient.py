"""Gradient: rank pays where the loss's gradient by the frozen weights is large in few directions, and not by chance.

The gradient of the loss by a weight, G (outputs × inputs), bounds the gain of LoRA there. To first order a component
u·vᵀ changes the loss by uᵀ·G·v, which is largest for the singular vectors of G, where it is the singular value. G is
never formed. It is seen through a random sketch, Y = G·Ω with Ω (inputs × width), which is s⁻¹ times the gradient of B
if the rows of A were Ωᵀ (randomized range finder, Halko et al. 2011, arXiv 0909.4061, section 4.1).
"""

from collections.abc import Sequence

import torch
from peft.tuners.lora import LoraLayer, ParamWrapper

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.progress import PhaseProgress
from axolotl_layersel.common.randomness import make_row_generator
from axolotl_layersel.engines import collectives
from axolotl_layersel.lora.modules import count_experts
from axolotl_layersel.selection.choosing import choose_by_score
from axolotl_layersel.selection.data.calibration import Sample
from axolotl_layersel.selection.passes.backward import GradientRecorder, measure_gradients, split_rows
from axolotl_layersel.selection.passes.forward import conclude, find_share
from axolotl_layersel.selection.passes.sizes import OVERSAMPLING
from axolotl_layersel.selection.types import Choice, Scores, Selection


def choose(selection: Selection) -> Choice:
    """Return the units whose first components promise most. Every process must call this."""
    return choose_by_score(selection, score)


def score(selection: Selection, samples: list[Sample]) -> Scores:
    """Return the gains of rank in each unit, whose score is the gain of ``lora_r``. Every process must call this."""
    modules = selection.stack.list_modules(selection.candidates)
    width = selection.highest_rank + OVERSAMPLING
    measured, sketches = measure_sketches(selection, samples, modules, width)

    def score_units(measured: torch.Tensor) -> Scores:
        for name, sketch in sketches.items():
            if not sketch.isfinite().all():
                raise LayerselError(
                    f"layersel.selection.method: the gradient of {name} is too large for its precision. Use bf16, or "
                    "another method."
                )
        gains = {}
        with PhaseProgress("computing gains of rank", len(sketches), shown=True) as progress:  # on process 0
            for name, sketch in sketches.items():
                gains[name] = find_gains(sketch)
                progress.advance(1)
        units = {unit.name: add_up([gains[name] for name in unit.modules]) for unit in selection.units}
        scores = {name: float(values[: selection.lora_r].sum()) for name, values in units.items()}
        return Scores(
            selection.find_highest_by_layer(scores),
            units={} if selection.by_layer else scores,
            gains={name: values.tolist() for name, values in units.items()},
        )

    return conclude(measured, modules, samples, score_units)


def add_up(gains: list[torch.Tensor]) -> torch.Tensor:
    """Return the joint gain of the 1st, 2nd, … rank of several modules; narrow ones have fewer components."""
    return torch.nn.utils.rnn.pad_sequence(gains, batch_first=True).sum(dim=0)


def draw_sketch(inputs: int, width: int, seed: int) -> torch.Tensor:
    """Return Ω, (inputs, width), fp32: orthogonal columns in random directions, of length √(inputs / width).

    The mean of ΩΩᵀ is the identity, so YYᵀ = GΩΩᵀGᵀ is GGᵀ on average, and exactly if ``width`` is ``inputs``.
    """
    gaussian = torch.randn(inputs, width, generator=make_row_generator(seed, "sketch", inputs), dtype=torch.float64)
    return (torch.linalg.qr(gaussian)[0] * (inputs / width) ** 0.5).float()


def find_gains(halves: torch.Tensor) -> torch.Tensor:
    """Return the gain of each component of a module, from the part of the gradient that both halves of the rows share.

    Y₁ + Y₂ has signal and noise, Y₁ − Y₂ as much noise and no signal. So with their singular values σ and ν the signal
    of component i is √(σᵢ² − νᵢ²), or 0 if noise could have given as much.

    Args:
        halves: Y₁ and Y₂, (2, outputs, width), or for experts (2, experts, outputs, width). A rank of experts is a
            component of each of them, so their gains add up.

    Returns:
        (min(outputs, width),), descending, float64, in units of the loss summed over the rows' labels.
    """
    first, second = halves.double()
    sigma, noise = torch.linalg.svdvals(first + second), torch.linalg.svdvals(first - second)
    gains = (sigma.square() - noise.square()).clamp(min=0).sqrt()
    falling = torch.cummin(gains, dim=-1).values
    return falling.sum(dim=0) if falling.dim() > 1 else falling


class Sketches(GradientRecorder):
    """Adds up the gradients of samples through a sketch of each module, in two halves of the samples.

    Args:
        modules: the LoRA modules, in order.
        width: the columns of a sketch; no more than a module's inputs are used.
        seed: draws the sketches.
        share: the indices of the samples that this process measures.
        device: holds the sketches.

    Attributes:
        values: the sketch of each module, fp32, (2, outputs, width), or for experts (2, experts, outputs, width).
        drawn: Ω, by number of inputs.
        halves: the rows of the batch that are in each half.
    """

    def __init__(self, modules: Sequence[LoraLayer], width: int, seed: int, share: range, device: torch.device) -> None:
        super().__init__(modules)
        self.share = share
        self.values: list[torch.Tensor] = []
        self.drawn: dict[int, torch.Tensor] = {}
        self.halves: list[torch.Tensor] = []
        for module in modules:
            inputs, outputs = module.in_features, module.out_features
            assert inputs is not None and outputs is not None, "PEFT has made A and B by them"
            columns = min(width, inputs)
            if inputs not in self.drawn:
                self.drawn[inputs] = draw_sketch(inputs, columns, seed).to(device)
            experts = (count_experts(module),) if isinstance(module, ParamWrapper) else ()
            self.values.append(torch.zeros(2, *experts, outputs, columns, device=device))

    def begin(self, indices: list[int]) -> None:
        super().begin(indices)
        # A sample that is only repeated for other processes, outside the share, is in neither half.
        self.halves = [
            torch.tensor(
                [row for row, i in enumerate(indices) if i in self.share and i % 2 == parity], dtype=torch.int64
            )
            for parity in (0, 1)
        ]

    def record(self, place: int, given: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
        if isinstance(self.modules[place], ParamWrapper):
            for gradient in gradients:
                self.add_weight(place, gradient)
        for inputs, gradient in zip(given, gradients):
            self.add_call(place, inputs, gradient)

    def add_call(self, place: int, given: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add one call of a linear module: its inputs and its output gradients, both (..., width)."""
        given, gradient = (split_rows(values, len(self.sums)) for values in (given, gradient))
        projected = given.to(gradient.dtype) @ self.drawn[given.shape[-1]].to(gradient.device, gradient.dtype)
        self.sums[:, place] += gradient.flatten(1).float().sum(dim=1).to(self.sums.device)
        for half, rows in zip(self.values[place], self.halves):
            left, right = gradient[rows].flatten(0, -2), projected[rows].flatten(0, -2)
            half += (left.T @ right).to(half.device)

    def add_weight(self, place: int, gradient: torch.Tensor) -> None:
        """Add the gradient of a parameter, (experts, outputs, inputs), in a batch of one row."""
        self.sums[:, place] += gradient.float().sum().to(self.sums.device)
        for half, rows in zip(self.values[place], self.halves):
            if len(rows):
                half += (gradient @ self.drawn[gradient.shape[-1]].to(gradient.device, gradient.dtype)).to(half.device)


def measure_sketches(
    selection: Selection, samples: list[Sample], modules: list[str], width: int
) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
    """Return the sum of each sample's gradients, (samples, modules), to find numbers that are not finite, and sketches.

    Both are on process 0 only. The sketches are by module name, see ``Sketches``; the halves are samples at even and at
    odd places. The loss is minus the log-likelihood of all labels, so that no number depends on how samples share
    batches. Sketches take 8·width bytes for each output of each module or expert.

    Raises:
        LayerselError: see ``measure_gradients``.
    """
    run = selection.run
    watched = [run.lora_modules[name] for name in modules]
    share = find_share(run, len(samples))
    recorder = Sketches(watched, width, selection.settings.seed, share, run.device)
    measured = measure_gradients(selection, samples, recorder, not run.trainer.args.gradient_checkpointing)
    if run.engine.list_ranks_with_weights() != [0]:
        for sketch in recorder.values:
            collectives.add_up(sketch)
    # Only process 0 reads them: copies on every process would fill a node's memory.
    kept = {name: sketch.cpu() for name, sketch in zip(modules, recorder.values) if collectives.get_rank() == 0}
    return measured, kept
