"""Fisher: a layer is important if the log-likelihood depends on its weights."""

import torch
from peft.tuners.lora import LoraLayer, ParamWrapper

from axolotl_layersel.lora.modules import count_experts
from axolotl_layersel.selection.choosing import choose_by_score
from axolotl_layersel.selection.data.calibration import Sample
from axolotl_layersel.selection.passes.backward import GradientRecorder, measure_gradients, split_rows
from axolotl_layersel.selection.passes.forward import conclude
from axolotl_layersel.selection.types import Choice, Scores, Selection


def choose(selection: Selection) -> Choice:
    """Return the units whose weights the likelihood depends on most. Every process must call this."""
    return choose_by_score(selection, score)


def score(selection: Selection, samples: list[Sample]) -> Scores:
    """Return each unit's mean squared gradient of the log-likelihood. Every process must call this."""
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
        if selection.by_layer:
            return Scores(values, unscored)
        found, _ = score_layers(*add_up([unit.modules for unit in selection.units]))
        units = {unit.name: value for unit, value in zip(selection.units, found) if value is not None}
        return Scores(selection.find_highest_by_layer(units), unscored, units=units)

    return conclude(squares, modules, samples, score_units)


def ghost_norm(inputs: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """Return the squared Frobenius norm of a linear layer's weight gradient, usually without forming the gradient.

    For one sample with inputs x_t and output gradients g_t the gradient is Σ_t g_t x_tᵀ, and its squared norm
    is Σ (XXᵀ ∘ GGᵀ) over pairs of tokens (ghost clipping, Li et al. 2022, eq. 3 of arXiv 2110.05679).
    If the weight has fewer elements than there are pairs, the gradient is formed: the same number for less work.

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
    """Return each layer's mean squared gradient, over samples and over its weights under LoRA, and why it has none.

    Args:
        squares: (samples, layers), squared norms of the gradient, summed over the layer's target modules.
        weights: (layers,), the number of those weights; a layer with 0 is not scored.
    """
    reasons = {layer: "it carries no LoRA" for layer, count in enumerate(weights.tolist()) if not count}
    means = squares.mean(dim=0) / weights.clamp(min=1)
    return [None if layer in reasons else value for layer, value in enumerate(means.tolist())], reasons


class SquaredGradients(GradientRecorder):
    """The squared norm of each sample's gradient by the weight under each LoRA module."""

    def record(self, place: int, given: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
        if isinstance(self.modules[place], ParamWrapper):
            squares = sum(gradient.double().square().sum().to(self.sums.device) for gradient in gradients)
            self.sums[:, place] += squares
            return
        rows = len(self.sums)
        inputs, outputs = ([split_rows(value, rows) for value in values] for values in (given, gradients))
        # Padding has no gradient. The gradients of several calls add up before they are squared.
        for row in range(rows):
            x, g = (torch.cat([value[row].flatten(0, -2) for value in values]) for values in (inputs, outputs))
            self.sums[row, place] += ghost_norm(x, g).to(self.sums.device)


def measure_squared_gradients(selection: Selection, samples: list[Sample], modules: list[str]) -> torch.Tensor | None:
    """Return the squared norm of each sample's gradient of the log-likelihood by the weight under each LoRA module.

    Each layer is computed again in the backward pass, so the activations of only one layer are held. Logits are
    computed for a few tokens at a time.

    Returns:
        (samples, modules), float64, on process 0; None on the others.

    Raises:
        LayerselError: see ``measure_gradients``.
    """
    return measure_gradients(
        selection, samples, SquaredGradients([selection.run.lora_modules[name] for name in modules])
    )


def count_weights(module: LoraLayer) -> int:
    """Return the number of weights under a LoRA module."""
    assert module.in_features is not None and module.out_features is not None, "PEFT has made A and B by them"
    return module.in_features * module.out_features * count_experts(module)
