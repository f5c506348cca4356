import pytest
import torch
from helpers.models import make_lora, make_selection, make_small_llama, make_trainer

from axolotl_layersel.selection.data.calibration import read_samples
from axolotl_layersel.selection.methods.relative import sum_changes
from axolotl_layersel.selection.passes.forward import measure_token_sums


def test_changes_are_measured_by_the_size_of_what_is_changed_at_real_tokens_only():
    inputs = torch.tensor([[[3.0, 4], [0, 0], [1, 0], [5, 5]]])
    outputs = torch.tensor([[[3.0, 9], [2, 0], [0.5, 0], [-5, -5]]])
    assert sum_changes(inputs, outputs, torch.tensor([[1, 1, 1, 0]])).tolist() == pytest.approx([5 / 5 + 0 + 0.5])


def test_the_size_of_all_hidden_states_does_not_matter():
    inputs, outputs = torch.randn(2, 3, 5, 7).unbind()
    mask = torch.ones(3, 5)
    assert torch.equal(sum_changes(8 * inputs, 8 * outputs, mask), sum_changes(inputs, outputs, mask))


def test_a_layer_is_scored_by_its_own_input_and_output(tmp_path):
    model = make_lora(make_small_llama()).eval()
    trainer = make_trainer(model, tmp_path)
    samples = read_samples(trainer.train_dataset, 5, seed=1)
    measured = measure_token_sums(make_selection(trainer, "relative"), samples, sum_changes)
    sums, tokens = measured.unbind(dim=-1)
    assert tokens.tolist() == [[len(sample.input_ids)] * 6 for sample in samples]
    for i, sample in enumerate(samples):
        with torch.no_grad():
            hidden = model(torch.tensor([sample.input_ids]), output_hidden_states=True).hidden_states
        for layer in range(5):  # the last one's output is seen behind the final norm alone
            before, after = hidden[layer][0].double(), hidden[layer + 1][0].double()
            expected = ((after - before).norm(dim=-1) / before.norm(dim=-1)).sum()
            assert sums[i, layer].item() == pytest.approx(expected.item(), rel=1e-5)
