"""The measurements of a real model, against Hugging Face's own hidden states and autograd's gradients."""

import dataclasses
import random

import numpy
import pytest
import torch
from helpers.labelled import TERMS, make_labelled, make_rows_of
from helpers.models import make_lora, make_rows, make_selection, make_small_llama, make_trainer

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.engines.fsdp2 import ShardedEngine
from axolotl_layersel.lora.layers import find_layer_stack
from axolotl_layersel.lora.modules import find_lora_modules
from axolotl_layersel.lora.run import Run
from axolotl_layersel.selection.data.calibration import Sample, place_token, read_samples
from axolotl_layersel.selection.methods import cka, cosine, fisher
from axolotl_layersel.selection.passes import forward


@pytest.fixture
def model():
    model = make_lora(make_small_llama(), lora_dropout=0.5)
    # An adapter that computes something, as one that is continued does.
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def read(trainer, count: int = 11):
    return read_samples(trainer.train_dataset, count, seed=5)


def measure_turns(trainer, samples) -> torch.Tensor:
    return forward.measure_token_sums(make_selection(trainer, "cosine"), samples, cosine.sum_turns)[..., 0]


def measure_squared_gradients(trainer, samples) -> torch.Tensor:
    selection = make_selection(trainer, "fisher")
    modules = selection.stack.list_modules(selection.stack.lora_modules)
    return fisher.measure_squared_gradients(selection, samples, modules)


def plain_hidden_states(model, samples) -> list[list[torch.Tensor]]:
    """Return Hugging Face's hidden states of each sample alone, without padding."""
    model.eval()
    with torch.no_grad():
        return [
            list(model(torch.tensor([sample.input_ids]), output_hidden_states=True).hidden_states) for sample in samples
        ]


@pytest.mark.parametrize("token", ["ending", "last", "mean", "cls"])
def test_token_states_are_hugging_faces_hidden_states(model, tmp_path, token):
    trainer = make_trainer(model, tmp_path)
    samples = read(trainer)
    samples, positions = place_token(samples, token)
    states = cka.measure_token_states(make_selection(trainer), samples, positions)
    assert states.shape == (11, 7, 32)
    for i, hidden in enumerate(plain_hidden_states(model, samples)):
        for place, tokens in enumerate(hidden):
            expected = tokens[0].mean(dim=0) if positions is None else tokens[0, positions[i]]
            torch.testing.assert_close(states[i, place], expected, atol=1e-5, rtol=1e-5)


def test_padded_and_unpadded_batches_give_the_same_scores(model, tmp_path):
    scores = []
    for size in (1, 5):
        trainer = make_trainer(model, tmp_path, per_device_train_batch_size=size)
        samples = read(trainer)
        states = cka.measure_token_states(make_selection(trainer), *place_token(samples, "ending"))
        scores.append(cka.score_pairs(states, [(i, i + 1) for i in range(6)])[0])
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


def test_turns_are_those_of_each_layers_own_input_and_output(model, tmp_path):
    trainer = make_trainer(model, tmp_path)
    samples = read(trainer)
    turns = measure_turns(trainer, samples)
    for i, hidden in enumerate(plain_hidden_states(model, samples)):
        # The last of Hugging Face's hidden states is after the final norm, which is not the layer's.
        for layer in range(5):
            cosine = torch.cosine_similarity(hidden[layer][0].double(), hidden[layer + 1][0].double(), dim=-1)
            assert turns[i, layer].item() == pytest.approx((1 - cosine).sum().item(), abs=1e-5)
    assert (turns[:, 5] > 0).all()


@pytest.mark.parametrize("kind", TERMS)
def test_squared_gradients_are_those_of_the_models_own_loss(tmp_path, kind):
    model = make_labelled(kind)
    rows = make_rows_of(kind)
    trainer = make_trainer(model, tmp_path, rows)
    samples = read(trainer)
    squares, stack = measure_squared_gradients(trainer, samples), find_layer_stack(model)

    model.eval()
    base, lora = model.get_base_model(), find_lora_modules(model.get_base_model())
    names = stack.list_modules(stack.lora_modules)
    weights = [lora[name].base_layer.weight for name in names]
    for i, sample in enumerate(samples):
        for weight in weights:
            weight.requires_grad_(True).grad = None
        row = {key: torch.tensor([value]) for key, value in rows[sample.row].items()}
        (base(**row).loss * TERMS[kind](row["labels"])).backward()
        for place, weight in enumerate(weights):
            expected = weight.grad.double().square().sum().item()
            assert squares[i, place].item() == pytest.approx(expected, rel=1e-4)
            assert expected > 0
    assert [fisher.count_weights(lora[name]) for name in names] == [weight.numel() for weight in weights]


def test_segments_are_what_the_data_set_says(tmp_path):
    model = make_labelled("BertForMaskedLM")
    rows = make_rows_of("BertForMaskedLM")
    trainer = make_trainer(model, tmp_path, rows)
    samples = read(trainer)
    states = cka.measure_token_states(make_selection(trainer), samples, None)
    model.eval()
    for i, sample in enumerate(samples):
        row = {key: torch.tensor([rows[sample.row][key]]) for key in ("input_ids", "token_type_ids")}
        hidden = model.get_base_model()(**row, output_hidden_states=True).hidden_states
        for place, tokens in enumerate(hidden):
            torch.testing.assert_close(states[i, place], tokens[0].mean(dim=0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "labels", "message"),
    [
        ("BertForSequenceClassification", None, r"fisher needs a label of each row, training row \d+ has none"),
        ("BertForMaskedLM", 1, r"fisher needs labels of tokens, training row \d+ has none"),
    ],
)
def test_labels_of_another_kind_are_an_error(tmp_path, kind, labels, message):
    model = make_labelled(kind)
    rows = [{**row, "labels": labels} for row in make_rows_of(kind)]
    trainer = make_trainer(model, tmp_path, rows)
    with pytest.raises(LayerselError, match=message):
        measure_squared_gradients(trainer, read(trainer))


@pytest.mark.parametrize("measure", [measure_turns, measure_squared_gradients])
def test_a_pass_leaves_model_and_random_streams_as_they_were(model, tmp_path, measure):
    trainer = make_trainer(model, tmp_path)
    model.train()
    model.get_base_model().model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    random.seed(1)
    numpy.random.seed(1)
    torch.manual_seed(1)
    expected = (random.random(), numpy.random.random(), torch.rand(1).item())
    random.seed(1)
    numpy.random.seed(1)
    torch.manual_seed(1)

    measure(trainer, read(trainer))

    assert (random.random(), numpy.random.random(), torch.rand(1).item()) == expected
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trainable
    assert [module.training for module in model.modules()] == modes
    after = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert after == hooks
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_error_within_a_pass_leaves_the_model_as_it_was(model, tmp_path):
    rows = [{**row, "labels": [-100] * len(row["labels"])} for row in make_rows()]
    trainer = make_trainer(model, tmp_path, rows)
    model.train()
    samples = read(trainer)
    broken = [type(sample)(row=sample.row, input_ids=[10**6], labels=None) for sample in samples]
    with pytest.raises(IndexError):
        measure_turns(trainer, broken)
    assert model.training
    assert any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(LayerselError, match=r"fisher needs labels.*row \d+ has none"):
        measure_squared_gradients(trainer, broken)


def test_a_packed_micro_batch_holds_as_many_samples_as_fit(model, tmp_path):
    trainer = make_trainer(model, tmp_path, per_device_train_batch_size=2)
    samples = read(trainer)
    assert forward.count_fitting(Run.of(trainer), samples) == 2
    trainer.args.sample_packing, trainer.args.max_seq_length = True, 100
    longest = max(len(sample.input_ids) for sample in samples)
    assert forward.count_fitting(Run.of(trainer), samples) == 2 * (100 // longest)


def test_passes_that_stream_weights_take_as_many_tokens_as_hide_that(model, tmp_path):
    trainer = make_trainer(model, tmp_path, per_device_train_batch_size=2)
    run = dataclasses.replace(Run.of(trainer), engine=ShardedEngine(trainer, "fsdp2"))
    samples = [Sample(row=0, input_ids=[3] * 512, labels=None)]
    assert forward.count_fitting(run, samples) == 16384 // 512
    assert forward.count_fitting(run, samples, with_graph=True) == 4096 // 512
