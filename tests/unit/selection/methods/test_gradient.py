"""The gradient through a sketch: against the gradient itself, and what follows for ranks."""

import pytest
import torch
from helpers.labelled import TERMS, make_labelled, make_rows_of
from helpers.models import make_lora, make_rows, make_selection, make_small_llama, make_trainer

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.lora.modules import find_lora_modules
from axolotl_layersel.selection.data.calibration import read_samples
from axolotl_layersel.selection.methods import fisher, gradient

WHOLE = 48  # the widest input of the small models: a sketch of that width loses nothing


def measure(trainer, samples, width: int = WHOLE) -> dict[str, torch.Tensor]:
    selection = make_selection(trainer, "gradient")
    modules = selection.stack.list_modules(selection.candidates)
    return gradient.measure_sketches(selection, samples, modules, width)[1]


def differentiate(model, rows, samples, terms) -> list[dict[str, torch.Tensor]]:
    """Return the gradient of each sample's own loss by the weights under LoRA."""
    model.eval()
    base = model.get_base_model()
    gradients = []
    for sample in samples:
        weights = {name: module.base_layer.weight for name, module in find_lora_modules(base).items()}
        for weight in weights.values():
            weight.requires_grad_(True).grad = None
        row = {key: torch.tensor([value]) for key, value in rows[sample.row].items()}
        (base(**row).loss * terms(row["labels"])).backward()
        gradients.append({name: weight.grad.clone() for name, weight in weights.items()})
    return gradients


@pytest.mark.parametrize("kind", TERMS)
def test_a_sketch_as_wide_as_the_weight_has_the_singular_values_of_the_gradient(tmp_path, kind):
    model, rows = make_labelled(kind), make_rows_of(kind)
    trainer = make_trainer(model, tmp_path, rows)
    samples = read_samples(trainer.train_dataset, 7, seed=5)
    sketches = measure(trainer, samples)
    gradients = differentiate(model, rows, samples, TERMS[kind])
    for name, halves in sketches.items():
        for parity in (0, 1):
            expected = sum(each[name] for each in gradients[parity::2])
            found = torch.linalg.svdvals(halves[parity])
            torch.testing.assert_close(found, torch.linalg.svdvals(expected)[: len(found)], atol=1e-4, rtol=1e-3)
            assert found[0] > 0


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("size", [1, 5])
def test_neither_micro_batches_nor_checkpointing_change_a_sketch(tmp_path, size, checkpointing):
    def run(**arguments):
        trainer = make_trainer(make_lora(make_small_llama()), tmp_path, **arguments)
        return measure(trainer, read_samples(trainer.train_dataset, 11, seed=5), 12)

    expected = run(per_device_train_batch_size=3)
    found = run(per_device_train_batch_size=size, gradient_checkpointing=checkpointing)
    for name, halves in found.items():
        torch.testing.assert_close(halves, expected[name], atol=1e-5, rtol=1e-4)


def flatten_tokens(model) -> None:
    """Let every MLP put the tokens of all rows into one row, as OPT's does."""
    for layer in model.model.layers:
        forward = layer.mlp.forward
        layer.mlp.forward = lambda x, forward=forward: forward(x.flatten(0, 1)).view(x.shape)


def route_tokens(model) -> None:
    """Let every MLP see some tokens only, whichever row they are in, as an expert does."""
    for layer in model.model.layers:
        forward = layer.mlp.forward

        def route(x: torch.Tensor, forward=forward) -> torch.Tensor:
            flat, output = x.flatten(0, 1), torch.zeros_like(x).flatten(0, 1)
            chosen = flat[:, 0] > 0
            output[chosen] = forward(flat[chosen])
            return output.view(x.shape)

        layer.mlp.forward = route


@pytest.mark.parametrize("change", [flatten_tokens, route_tokens])
def test_tokens_that_are_no_longer_in_rows_are_told_apart(tmp_path, change):
    found = []
    for size in (1, 5):
        model = make_lora(make_small_llama())
        change(model.get_base_model())
        trainer = make_trainer(model, tmp_path, per_device_train_batch_size=size)
        found.append(measure(trainer, read_samples(trainer.train_dataset, 11, seed=5), 12))
    for name, halves in found[0].items():
        assert not torch.equal(halves[0], halves[1])
        torch.testing.assert_close(halves, found[1][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("change", [lambda model: None, flatten_tokens, route_tokens])
def test_squared_gradients_of_rows_are_the_same_whatever_they_share_a_pass_with(tmp_path, change):
    found = []
    for size in (1, 5):
        model = make_lora(make_small_llama())
        change(model.get_base_model())
        trainer = make_trainer(model, tmp_path, per_device_train_batch_size=size)
        selection = make_selection(trainer, "fisher")
        modules = selection.stack.list_modules(selection.candidates)
        samples = read_samples(trainer.train_dataset, 11, seed=5)
        found.append(fisher.measure_squared_gradients(selection, samples, modules))
    assert found[0].shape == (11, len(modules)) and len(found[0].sum(dim=1).unique()) == 11
    # Numbers of fp32, added up in another order.
    torch.testing.assert_close(found[0], found[1], atol=0, rtol=1e-4)


# Seen over 20 seeds: 0.35, 0.13 and 0.06 at most. A narrow sketch mixes the tail into the first singular values.
@pytest.mark.parametrize(("width", "error"), [(16, 0.45), (40, 0.2), (104, 0.1)])
def test_the_first_singular_values_of_a_sketch_are_near_those_of_the_matrix(width, error):
    generator = torch.Generator().manual_seed(width)
    left, right = (torch.linalg.qr(torch.randn(256, 64, generator=generator))[0] for _ in range(2))
    values = 1 / torch.arange(1, 65)
    sketch = (left * values) @ right.T @ gradient.draw_sketch(256, width, seed=3)
    found = torch.linalg.svdvals(sketch)[:8]
    assert ((found / values[:8]) - 1).abs().max() < error


def test_a_sketch_is_drawn_from_the_seed_alone_and_exact_at_full_width():
    sketch = gradient.draw_sketch(24, 24, seed=3)
    torch.testing.assert_close(sketch @ sketch.T, torch.eye(24), atol=1e-5, rtol=0)
    torch.rand(1)
    assert torch.equal(sketch, gradient.draw_sketch(24, 24, seed=3))
    assert not torch.equal(sketch, gradient.draw_sketch(24, 24, seed=4))


def test_what_two_halves_do_not_share_gains_nothing():
    generator = torch.Generator().manual_seed(0)
    signal = 40 * torch.randn(64, 1, generator=generator) @ torch.randn(1, 16, generator=generator) / 32
    noise = torch.randn(2, 64, 16, generator=generator)
    gains = gradient.find_gains(signal + noise)
    assert gains[0] == pytest.approx(2 * torch.linalg.svdvals(signal)[0].item(), rel=0.1)
    # Of noise itself the first singular value is about 17; chance leaves a part of the difference of two such numbers.
    assert gains[1:].max() < 8
    assert gradient.find_gains(torch.stack([signal, -signal])).max() == 0
    assert (gains.diff() <= 0).all()


def test_a_number_that_is_none_is_named_with_its_row(tmp_path):
    trainer = make_trainer(make_lora(make_small_llama()), tmp_path, make_rows())
    selection = make_selection(trainer, "gradient", num_samples=9)
    weight = trainer.model.get_base_model().model.layers[5].mlp.down_proj.base_layer.weight
    weight.data[0, 0] = float("nan")
    with pytest.raises(LayerselError, match=r"NaN or infinity in model.layers.0.* for training row \d+"):
        gradient.choose(selection)
