"""Gradient: rank pays where the loss's gradient by the frozen weights is large in few directions, and not by chance.

The gradient of the loss by a weight, G (outputs × inputs), says what LoRA there can gain: to first order a component
u·vᵀ changes the loss by uᵀ·G·v, which is largest for the singular vectors of G, where it is the singular value. G is
never formed. It is seen through a random sketch, Y = G·Ω with Ω (inputs × width), which is s⁻¹ times the gradient that
B would have if the rows of A were Ωᵀ (randomized range finder, Halko et al. 2011, arXiv 0909.4061, section 4.1).
"""

import torch
from peft.tuners.lora import ParamWrapper

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.randomness import make_row_generator
from axolotl_layersel.engines import collectives
from axolotl_layersel.lora.modules import count_experts
from axolotl_layersel.selection.choosing import (
    Choice,
    Scores,
    Selection,
    choose_by_score,
    conclude,
    find_highest_by_layer,
)
from axolotl_layersel.selection.data.calibration import Sample
from axolotl_layersel.selection.passes import forward
from axolotl_layersel.selection.passes.backward import find_batch_size, prepare_backward, split_rows, watching_gradients

# Columns of a sketch beyond the ranks that are asked about: the last singular values of a sketch are too small.
OVERSAMPLING = 8


def choose(selection: Selection) -> Choice:
    """Return the units whose first components promise most; every rank must call this."""
    return choose_by_score(selection, lambda samples: score(selection, samples))


def score(selection: Selection, samples: list[Sample]) -> Scores:
    """Return what rank gains in each unit, whose score is what ``lora_r`` of it gain; every rank must call this."""
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
        gains = {name: find_gains(sketch) for name, sketch in sketches.items()}
        units = {unit.name: add_up([gains[name] for name in unit.modules]) for unit in selection.units}
        scores = {name: float(values[: selection.lora_r].sum()) for name, values in units.items()}
        layers = find_highest_by_layer(selection, scores)
        return Scores(
            layers,
            {},
            units={} if selection.settings.granularity == "layer" else scores,
            gains={name: values.tolist() for name, values in units.items()},
        )

    return conclude(measured, modules, samples, score_units)


def add_up(gains: list[torch.Tensor]) -> torch.Tensor:
    """Return what the 1st, 2nd, … rank of several modules gains together; narrow ones have fewer components."""
    return torch.nn.utils.rnn.pad_sequence(gains, batch_first=True).sum(dim=0)


def draw_sketch(inputs: int, width: int, seed: int) -> torch.Tensor:
    """Return Ω, (inputs, width), fp32: orthogonal columns in random directions, of the length √(inputs / width).

    The mean of ΩΩᵀ is the identity, so YYᵀ = GΩΩᵀGᵀ is GGᵀ on average, and just that where ``width`` is ``inputs``.
    """
    gaussian = torch.randn(inputs, width, generator=make_row_generator(seed, "sketch", inputs), dtype=torch.float64)
    return (torch.linalg.qr(gaussian)[0] * (inputs / width) ** 0.5).float()


def find_gains(halves: torch.Tensor) -> torch.Tensor:
    """Return what each component of a module gains, by the part of the gradient that both halves of the rows share.

    Y₁ + Y₂ has signal and noise, Y₁ − Y₂ as much noise and no signal. So with their singular values σ and ν the signal
    of component i is √(σᵢ² − νᵢ²), or nothing where noise alone would have given as much.

    Args:
        halves: Y₁ and Y₂, (2, outputs, width), or of experts (2, experts, outputs, width). A rank of experts is a
            component of each of them, and gains what these do together.

    Returns:
        (min(outputs, width),), descending, float64, in units of the loss summed over the rows' labels.
    """
    first, second = halves.double()
    sigma, noise = torch.linalg.svdvals(first + second), torch.linalg.svdvals(first - second)
    gains = (sigma.square() - noise.square()).clamp(min=0).sqrt()
    falling = torch.cummin(gains, dim=-1).values
    return falling.sum(dim=0) if falling.dim() > 1 else falling


def measure_sketches(
    selection: Selection, samples: list[Sample], modules: list[str], width: int
) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
    """Return each sample's gradients added up, (samples, modules), to find numbers that are not finite, and sketches.

    The sketches are those of ``modules`` by name on rank 0, (2, outputs, width) in fp32, or of experts (2, experts,
    outputs, width): of samples at even and at odd places. The loss is minus the log-likelihood of all labels, so that
    no number depends on how samples share batches. Beside the activations of one micro-batch they take 8·width bytes
    for each output of each module, or of each expert.

    Raises:
        LayerselError: if the rows have no labels of the kind that the model's logits answer.
    """
    run, lora = selection.run, selection.run.lora_modules
    watched = [lora[name] for name in modules]
    sketches: list[torch.Tensor] = []
    drawn: dict[int, torch.Tensor] = {}
    sums = torch.zeros(0)
    halves: list[torch.Tensor] = []  # of a batch: which of its rows are in each half

    for module in watched:
        inputs, outputs = module.in_features, module.out_features
        assert inputs is not None and outputs is not None, "PEFT has made A and B by them"
        columns = min(width, inputs)
        if inputs not in drawn:
            drawn[inputs] = draw_sketch(inputs, columns, selection.settings.seed).to(run.device)
        experts = (count_experts(module),) if isinstance(module, ParamWrapper) else ()
        sketches.append(torch.zeros(2, *experts, outputs, columns, device=run.device))

    def add(place: int, inputs: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
        if isinstance(watched[place], ParamWrapper):
            for gradient in gradients:
                add_weight(place, gradient)
        for given, gradient in zip(inputs, gradients):
            add_call(place, given, gradient)

    def add_call(place: int, given: torch.Tensor, gradient: torch.Tensor) -> None:
        given, gradient = (split_rows(values, len(sums)) for values in (given, gradient))
        projected = given.to(gradient.dtype) @ drawn[given.shape[-1]].to(gradient.device, gradient.dtype)
        sums[:, place] += gradient.flatten(1).float().sum(dim=1).to(sums.device)
        for half, chosen in zip(sketches[place], halves):
            left, right = gradient[chosen].flatten(0, -2), projected[chosen].flatten(0, -2)
            half += (left.T @ right).to(half.device)

    def add_weight(place: int, gradient: torch.Tensor) -> None:
        # Batches are of one row, and each row is in one half or, where another rank counts it, in none.
        sums[:, place] += gradient.float().sum().to(sums.device)
        for half, chosen in zip(sketches[place], halves):
            if len(chosen):
                half += (gradient @ drawn[gradient.shape[-1]].to(gradient.device, gradient.dtype)).to(half.device)

    def measure(indices: list[int]) -> list[torch.Tensor]:
        nonlocal sums
        batch = [samples[i] for i in indices]
        sums = torch.zeros(len(batch), len(modules), dtype=torch.float64)
        halves[:] = [
            torch.tensor([row for row, i in enumerate(indices) if i in share and i % 2 == parity], dtype=torch.int64)
            for parity in (0, 1)
        ]
        backward(batch)
        finish()
        return [row.clone() for row in sums]

    share = forward.find_share(run, len(samples))
    keeps_activations = not run.trainer.args.gradient_checkpointing
    with forward.scoring(selection, keeps_activations):
        backward = prepare_backward(selection, samples, keeps_activations)
        size = find_batch_size(run, samples, watched)
        with watching_gradients(watched, add) as finish:
            measured = forward.over_samples(run, samples, measure, size)
    if run.engine.list_ranks_with_weights() != [0]:
        for sketch in sketches:
            collectives.add_up(sketch)
    # Rank 0 alone looks at them: copies on every process would fill a node's memory.
    kept = {name: sketch.cpu() for name, sketch in zip(modules, sketches) if collectives.get_rank() == 0}
    return measured, kept
