import pytest
import torch
import transformers
from helpers.models import make_lora, make_small_bert, make_small_llama

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.selection.data.label_alignment import (
    NEXT_TOKEN,
    ROW,
    SAME_TOKEN,
    align,
    count_answered,
    find_kind,
    get_labels,
    log_likelihood,
    row_log_likelihood,
)


def make_gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=4))


def make_t5():
    size = {"d_model": 32, "d_ff": 48, "num_heads": 4, "d_kv": 8, "num_layers": 1}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=97, decoder_start_token_id=0, **size)
    )


KINDS = {
    "LlamaForCausalLM": (make_small_llama, NEXT_TOKEN),
    "GPT2LMHeadModel": (make_gpt2, NEXT_TOKEN),
    "BertLMHeadModel": (lambda: make_small_bert("BertLMHeadModel", is_decoder=True), NEXT_TOKEN),
    "BertForMaskedLM": (make_small_bert, SAME_TOKEN),
    "BertForTokenClassification": (lambda: make_small_bert("BertForTokenClassification"), SAME_TOKEN),
    "T5ForConditionalGeneration": (make_t5, SAME_TOKEN),
    "BertForSequenceClassification": (lambda: make_small_bert("BertForSequenceClassification"), ROW),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_loss_of_a_model_is_that_of_its_kind(name):
    make, kind = KINDS[name]
    model = make().eval()
    assert find_kind(model) == kind
    ids = torch.randint(3, 97, (2, 7), generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([1, 0]) if kind == ROW else ids % (2 if "Token" in name else 97)
    if kind != ROW:
        labels[:, :3] = -100
    output = model(input_ids=ids, labels=labels)
    logits = output.logits.flatten(0, -2)
    mean = -log_likelihood(logits, align(labels, kind).flatten()) / count_answered(labels, kind)
    assert mean.item() == pytest.approx(output.loss.item(), rel=1e-5)


def test_a_model_under_an_adapter_is_of_its_own_kind():
    assert find_kind(make_lora(make_small_llama(layers=1))) == NEXT_TOKEN
    assert find_kind(make_lora(make_small_bert(), ["query"])) == SAME_TOKEN


def test_a_model_of_no_known_kind_is_an_error_that_names_its_class():
    with pytest.raises(LayerselError, match=r"base_model: BertForQuestionAnswering is not known to be .*Use"):
        find_kind(make_small_bert("BertForQuestionAnswering"))


def test_labels_are_where_the_logits_are_that_answer_them():
    labels = torch.tensor([[7, -100, 3, 6], [-100, -100, -100, 5]])
    assert align(labels, NEXT_TOKEN).tolist() == [[-100, 3, 6, -100], [-100, -100, 5, -100]]
    assert align(labels, SAME_TOKEN).tolist() == labels.tolist()
    assert count_answered(labels, NEXT_TOKEN) == 3
    assert count_answered(labels, SAME_TOKEN) == 4
    assert count_answered(torch.tensor([1, -100, 0]), ROW) == 2
    assert count_answered(torch.tensor([0.5, -100.0]), ROW) == 2


def test_labels_may_lie_in_columns_of_other_names():
    assert get_labels({"labels": [1], "label": 0}) == [1]
    assert get_labels({"label": 0}) == 0
    assert get_labels({"labels": None, "label_ids": 2}) == 2
    assert get_labels({"label": "good", "input_ids": [1]}) is None


def test_the_log_likelihood_is_that_of_the_response():
    logits = torch.randn(5, 7)
    targets = torch.tensor([-100, 3, 6, -100, -100])
    expected = logits[1].log_softmax(-1)[3] + logits[2].log_softmax(-1)[6]
    assert log_likelihood(logits, targets).item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_row_may_be_scored_by_class_by_classes_or_by_number():
    logits = torch.tensor([0.5, -1.0, 2.0])
    chosen = row_log_likelihood(logits, torch.tensor(2), None)
    assert chosen.item() == pytest.approx(logits.log_softmax(-1)[2].item())
    several = row_log_likelihood(logits, torch.tensor([1.0, 0.0, 1.0]), None)
    signs = torch.tensor([1.0, -1.0, 1.0])
    assert several.item() == pytest.approx(torch.nn.functional.logsigmoid(signs * logits).sum().item())
    number = row_log_likelihood(logits[:1], torch.tensor(2.0), None)
    assert number.item() == pytest.approx(-((2 - 0.5) ** 2))
    numbers = row_log_likelihood(logits, torch.tensor([1.0, 0.0, 1.0]), "regression")
    assert numbers.item() == pytest.approx(-(0.25 + 1 + 1))
