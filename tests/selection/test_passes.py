"""The measurements of a real model, against Hugging Face's own hidden states and autograd's gradients."""

import random

import numpy
import pytest
import torch
from conftest import make_lora, make_rows, make_selection, make_small_bert, make_small_llama, make_trainer

from axolotl_layersel.errors import LayerselError
from axolotl_layersel.layers import find_layer_stack
from axolotl_layersel.run import Run
from axolotl_layersel.selection import passes
from axolotl_layersel.selection.calibration import place_token, read_samples
from axolotl_layersel.selection.methods import cka, cosine, fisher


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
    return passes.measure_token_sums(make_selection(trainer, "cosine"), samples, cosine.sum_turns)


def measure_squared_gradients(trainer, samples) -> torch.Tensor:
    return fisher.measure_squared_gradients(make_selection(trainer, "fisher"), samples)


def plain_hidden_states(model, samples) -> list[list[torch.Tensor]]:
    """Return Hugging Face's hidden states of each sample alone, without padding."""
    model.eval()
    with torch.no_grad():
        return [
            list(model(torch.tensor([sample.input_ids]), output_hidden_states=True).hidden_states) for sample in samples
        ]


@pytest.mark.parametrize("token", ["auto", "last", "mean", "cls"])
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
        states = cka.measure_token_states(make_selection(trainer), *place_token(samples, "auto"))
        scores.append(cka.score_layers(states)[0])
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


def make_rows_of(kind: str) -> list[dict]:
    """Return rows with the labels that models of ``kind`` learn, and with two segments where BERT sees them."""
    rows = make_rows()
    for number, row in enumerate(rows):
        length = len(row["input_ids"])
        if "Bert" in kind:
            row["token_type_ids"] = [0] * 3 + [1] * (length - 3)
        if kind == "BertForMaskedLM":
            row["labels"] = [token if i % 3 == 1 else -100 for i, token in enumerate(row["input_ids"])]
        elif kind == "BertForTokenClassification":
            row["labels"] = [token % 3 if i % 2 else -100 for i, token in enumerate(row["input_ids"])]
        elif kind.endswith("several classes"):
            row["labels"] = [float(number % 2), 1.0, 0.0]
        elif kind.endswith("a number"):
            row["labels"] = number / 10
        elif "Sequence" in kind:
            row["labels"] = number % 3
    return rows


def make_labelled(kind: str):
    """Return a small model of ``kind`` under LoRA."""
    name = kind.split(":")[0]
    if name == "LlamaForSequenceClassification":
        from transformers import LlamaConfig, LlamaForSequenceClassification

        torch.manual_seed(0)
        size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 4}
        base = LlamaForSequenceClassification(
            LlamaConfig(vocab_size=97, num_labels=3, pad_token_id=0, num_key_value_heads=2, **size)
        )
    elif "Bert" in name:
        base = make_small_bert(name, num_labels=1 if kind.endswith("a number") else 3)
    else:
        base = make_small_llama()
    return make_lora(base, ["query", "value"] if "Bert" in name else ["q_proj", "v_proj", "down_proj"])


# What the mean of a model's own loss is taken over, for one row.
TERMS = {
    "LlamaForCausalLM": lambda labels: (labels[:, 1:] != -100).sum(),
    "BertForMaskedLM": lambda labels: (labels != -100).sum(),
    "BertForTokenClassification": lambda labels: (labels != -100).sum(),
    "LlamaForSequenceClassification": lambda labels: 1,
    "BertForSequenceClassification: a class": lambda labels: 1,
    "BertForSequenceClassification: several classes": lambda labels: 3,
    "BertForSequenceClassification: a number": lambda labels: 1,
}


@pytest.mark.parametrize("kind", TERMS)
def test_squared_gradients_are_those_of_the_models_own_loss(tmp_path, kind):
    model = make_labelled(kind)
    rows = make_rows_of(kind)
    trainer = make_trainer(model, tmp_path, rows)
    samples = read(trainer)
    squares, stack = measure_squared_gradients(trainer, samples), find_layer_stack(model)

    model.eval()
    base = model.get_base_model()
    weights = {
        layer: [base.get_submodule(name).base_layer.weight for name in names]
        for layer, names in stack.lora_modules.items()
    }
    for i, sample in enumerate(samples):
        for weight in (weight for group in weights.values() for weight in group):
            weight.requires_grad_(True).grad = None
        row = {key: torch.tensor([value]) for key, value in rows[sample.row].items()}
        (base(**row).loss * TERMS[kind](row["labels"])).backward()
        for layer, group in weights.items():
            expected = sum(weight.grad.double().square().sum().item() for weight in group)
            assert squares[i, layer].item() == pytest.approx(expected, rel=1e-4)
            assert expected > 0
    counts = fisher.count_target_weights(make_selection(trainer, "fisher"))
    assert counts.tolist() == [sum(weight.numel() for weight in weights[layer]) for layer in range(len(stack.layers))]


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
    assert passes.count_fitting(Run.of(trainer), samples) == 2
    trainer.args.sample_packing, trainer.args.max_seq_length = True, 100
    longest = max(len(sample.input_ids) for sample in samples)
    assert passes.count_fitting(Run.of(trainer), samples) == 2 * (100 // longest)
