"""Hidden states of other shapes than rows × tokens × width: compared where it is known what of them is read."""

import itertools

import pytest
import torch
import transformers
from helpers.families import make_family, make_lora_family
from helpers.models import make_lora, make_rows, make_selection, make_trainer

from axolotl_layersel import LayerselConfig, LayerselError, SelectionConfig, prepare_trainer
from axolotl_layersel.selection.data.calibration import read_samples
from axolotl_layersel.selection.methods import cka, cosine, relative
from axolotl_layersel.selection.passes import forward


def run_plainly(row: dict) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return the four predictions around each layer of a model without LoRA, and its last hidden states."""
    model, states = make_family("Gemma3n").eval(), []
    assert model.config.altup_active_idx == 0
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, args: states.append(args[0]))
    model.model.layers[-1].register_forward_hook(lambda module, args, output: states.append(output))
    with torch.no_grad():
        last = model.model(input_ids=torch.tensor([row["input_ids"]])).last_hidden_state
    assert [tuple(state.shape[:2]) for state in states] == [(4, 1)] * 5
    return [state[0] for state in states], last


@pytest.mark.parametrize("size", [1, 4])
def test_of_several_predictions_the_active_one_is_compared(size, tmp_path):
    rows = make_rows()
    trainer = make_trainer(make_lora_family("Gemma3n"), tmp_path, rows, per_device_train_batch_size=size)
    samples = read_samples(trainer.train_dataset, 6, seed=5)
    turns, changes = (
        forward.measure_token_sums(make_selection(trainer, name), samples, compare)[..., 0]
        for name, compare in (("cosine", cosine.sum_turns), ("relative", relative.sum_changes))
    )
    means = cka.measure_token_states(make_selection(trainer), samples, None)
    ends = cka.measure_token_states(make_selection(trainer), samples, [2] * 6)
    assert means.shape == ends.shape == (6, 5, 32)
    for i, sample in enumerate(samples):
        states, last = run_plainly(rows[sample.row])
        for layer, (before, after) in enumerate(itertools.pairwise(states)):
            turn = 1 - torch.cosine_similarity(before[0].double(), after[0].double(), dim=-1)
            change = (after - before)[0].double().norm(dim=-1) / before[0].double().norm(dim=-1)
            assert float(turns[i, layer]) == pytest.approx(float(turn.sum()), rel=1e-4)
            assert float(changes[i, layer]) == pytest.approx(float(change.sum()), rel=1e-4)
        for place, hidden in enumerate([*states[:4], last]):
            torch.testing.assert_close(means[i, place], hidden[0].mean(dim=0), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(ends[i, place], hidden[0, 2], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["cka", "cosine", "relative"])
def test_groups_are_refused_where_no_hidden_states_lie_between_them(method, tmp_path):
    settings = SelectionConfig(method=method, num_samples=6, granularity="group", ratio=0.5)
    with pytest.raises(LayerselError, match=r"granularity: 'group' needs .* in Gemma3nTextDecoderLayer they were not"):
        prepare_trainer(make_trainer(make_lora_family("Gemma3n"), tmp_path), LayerselConfig(selection=settings))


def make_xlnet():
    """Return a model whose layers are given tokens × rows × width."""
    torch.manual_seed(0)
    size = {"d_model": 32, "n_head": 4, "d_inner": 48, "n_layer": 4, "vocab_size": 97}
    return make_lora(transformers.XLNetLMHeadModel(transformers.XLNetConfig(**size)), ["layer_1", "layer_2"])


@pytest.mark.parametrize("method", ["cka", "cosine", "relative"])
def test_hidden_states_in_another_order_are_refused_by_name(method, tmp_path):
    trainer = make_trainer(make_xlnet(), tmp_path, per_device_train_batch_size=3)
    settings = SelectionConfig(method=method, num_samples=6, ratio=0.5)
    with pytest.raises(LayerselError, match=rf"{method} compares hidden states of rows × tokens × .* in XLNetModel"):
        prepare_trainer(trainer, LayerselConfig(selection=settings))
