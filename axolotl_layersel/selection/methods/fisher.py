"""Fisher: a layer whose weights the log-likelihood depends on is important."""

import torch
from peft.tuners.lora import LoraLayer, ParamWrapper

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


def choose(selection: Selection) -> Choice:
    """Return the layers whose weights the likelihood depends on most; every rank must call this."""
    return choose_by_score(selection, lambda samples: score(selection, samples))


def score(selection: Selection, samples: list[Sample]) -> Scores:
    """Return each unit's mean squared gradient of the log-likelihood; every rank must call this."""
    lora, modules = selection.run.lora_modules, selection.stack.list_modules(selection.stack.lora_modules)
    weights = torch.tensor([count_weights(lora[name]) for name in modules], dtype=torch.float64)
    squares = measure_squared_gradients(selection, samples, modules)

    def score_units(squares: torch.Tensor) -> Scores:
        def add_up(groups: list[list[str]]) -> tuple[torch.Tensor, torch.Tensor]:
            places = [torch.tensor([modules.index(name) for name in group], dtype=torch.int64) for group in groups]
            sums = torch.stack([squares[:, place].sum(dim=1) for place in places], dim=1)
            return sums, torch.stack([weights[place].sum() for place in places])

        layers = [selection.stack.lora_modules.get(layer, []) for layer in range(len(selection.stack.layers))]
        values, bare = score_layers(*add_up(layers))
        unscored = {selection.stack.names[layer]: why for layer, why in bare.items()}
        if selection.settings.granularity == "layer":
            return Scores(values, unscored)
        found, _ = score_layers(*add_up([unit.modules for unit in selection.units]))
        units = {unit.name: value for unit, value in zip(selection.units, found) if value is not None}
        return Scores(find_highest_by_layer(selection, units), unscored, units=units)

    return conclude(squares, modules, samples, score_units)


def ghost_norm(inputs: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """Return the squared Frobenius norm of a linear layer's weight gradient, which is never formed whole.

    For one sample with inputs x_t and output gradients g_t the gradient is Σ_t g_t x_tᵀ, and its squared norm
    is Σ (XXᵀ ∘ GGᵀ) over pairs of tokens (ghost clipping, Li et al. 2022, eq. 3 of arXiv 2110.05679).
    Where the weight is smaller than the tokens' pairs, its gradient is formed after all: same number, less work.

    Args:
        inputs: X, (tokens, in), any floating dtype.
        gradients: G, (tokens, out), any floating dtype.

    Returns:
        A scalar, float64.
    """
    x, g = inputs.float(), gradients.float()
    tokens, wide, high = x.shape[0], x.shape[1], g.shape[1]
    if tokens * (wide + high) <= wide * high:
        return ((x @ x.T).double() * (g @ g.T).double()).sum()
    return (g.T @ x).double().square().sum()


def score_layers(squares: torch.Tensor, weights: torch.Tensor) -> tuple[list[float | None], dict[int, str]]:
    """Return each layer's mean squared gradient, over samples and over its own LoRA-target weights.

    Args:
        squares: (samples, layers), squared norms of the gradient, summed over the layer's target modules.
        weights: (layers,), number of those weights; 0 where the layer has none, which leaves it unscored.
    """
    reasons = {layer: "it carries no LoRA" for layer, count in enumerate(weights.tolist()) if not count}
    means = squares.mean(dim=0) / weights.clamp(min=1)
    return [None if layer in reasons else value for layer, value in enumerate(means.tolist())], reasons


def measure_squared_gradients(selection: Selection, samples: list[Sample], modules: list[str]) -> torch.Tensor | None:
    """Return the squared norm of each sample's gradient of the response log-likelihood: (samples, modules), float64.

    The gradient is that of the weights under the LoRA ``modules``. It is never formed for a whole layer, and each
    layer is computed again in the backward pass, so no more than one layer's activations are held; logits are
    computed for a few tokens at a time.

    Raises:
        LayerselError: if the rows have no labels of the kind that the model's logits answer.
    """
    run = selection.run
    watched = [run.lora_modules[name] for name in modules]
    squares = torch.zeros(0)

    def add(place: int, given: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
        if isinstance(watched[place], ParamWrapper):
            squares[:, place] += sum(gradient.double().square().sum().to(squares.device) for gradient in gradients)
            return
        inputs, outputs = ([split_rows(value, len(squares)) for value in values] for values in (given, gradients))
        # Rows are filled up with tokens of no gradient. The gradients of several calls add up before they are squared.
        for row in range(len(squares)):
            x, g = (torch.cat([value[row].flatten(0, -2) for value in values]) for values in (inputs, outputs))
            squares[row, place] += ghost_norm(x, g).to(squares.device)

    def measure(indices: list[int]) -> list[torch.Tensor]:
        nonlocal squares
        batch = [samples[i] for i in indices]
        squares = torch.zeros(len(batch), len(modules), dtype=torch.float64)
        backward(batch)
        finish()
        return [row.clone() for row in squares]

    with forward.scoring(selection):
        backward = prepare_backward(selection, samples)
        size = find_batch_size(run, samples, watched)
        with watching_gradients(watched, add) as finish:
            return forward.over_samples(run, samples, measure, size)


def count_weights(module: LoraLayer) -> int:
    """Return how many weights lie under a LoRA module."""
    assert module.in_features is not None and module.out_features is not None, "PEFT has made A and B by them"
    return module.in_features * module.out_features * count_experts(module)
