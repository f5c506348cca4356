"""Encoders for rows, for tokens and for masked tokens: every method and l1ra, through the public function."""

import copy
import itertools

import pytest
import torch
import transformers
from helpers.encoders import (
    ALBERT,
    ARCHITECTURES,
    TASKS,
    check_gradients,
    make_encoder,
    make_lora_encoder,
    make_task_rows,
)
from helpers.models import make_bart_decoder, make_gpt2, make_lora, make_small_bert, make_small_llama, make_trainer
from peft import PeftModel

from axolotl_layersel import L1RAConfig, LayerselConfig, LayerselError, SelectionConfig, prepare_trainer
from axolotl_layersel.config.methods import METHODS
from axolotl_layersel.l1ra.records import RankHistory
from axolotl_layersel.lora.backward_end import find_lowest_trained
from axolotl_layersel.lora.layers import find_layer_stack
from axolotl_layersel.lora.modules import find_lora_modules
from axolotl_layersel.lora.run import Run
from axolotl_layersel.selection.backward_cut import TruncatedBackward
from axolotl_layersel.selection.data.calibration import read_samples
from axolotl_layersel.selection.data.row_token import find_token, is_encoder
from axolotl_layersel.selection.methods import cka, fisher, gradient
from axolotl_layersel.selection.types import Selection

CHEAP = [name for name, method in METHODS.items() if method.reads != "batches"]
MODELS = [*itertools.product(ARCHITECTURES, TASKS)]


def train_rows(name: str, task: str, folder, **arguments):
    """Return a trainer of an architecture for a task, and what its classifier starts with."""
    model = make_lora_encoder(name, task)
    trainer = make_trainer(model, folder, make_task_rows(task), **arguments)
    return trainer, {key: value.clone() for key, value in find_saved_whole(model).items()}


def find_saved_whole(model) -> dict[str, torch.Tensor]:
    """Return the parameters of ``modules_to_save`` by name."""
    return {name: value for name, value in model.named_parameters() if ".modules_to_save." in name}


def check_scores(method: str, plan) -> None:
    """Check that every layer has a score, but for the first by cka, whose input is one embedding."""
    scores = [choice.score for choice in plan.layers]
    if METHODS[method].reads == "nothing":
        assert scores == [None] * 4
        return
    unscored = [0] if method == "cka" else []
    assert [layer for layer, score in enumerate(scores) if score is None] == unscored == list(plan.unscored)
    found = torch.tensor(scores[len(unscored) :])
    assert found.isfinite().all()
    if method == "gradient":  # these labels follow from nothing, and it may find so
        assert plan.budget.spent == plan.budget.allowed == plan.budget.lora > 0
    else:
        assert len(set(found.tolist())) == len(found)


@pytest.mark.parametrize(("name", "task"), MODELS)
def test_every_method_without_training_chooses_among_the_layers_of_an_encoder(name, task, tmp_path, capsys, support):
    for method in CHEAP:
        sampled = {"num_samples": 8} if "num_samples" in METHODS[method].keys else {}
        kept = {"layers": [1, 3]} if method == "explicit" else {} if method == "gradient" else {"ratio": 0.5}
        trainer, classifier = train_rows(name, task, tmp_path / method)
        config = LayerselConfig(selection=SelectionConfig(method=method, **sampled, **kept))
        plan = prepare_trainer(trainer, config)
        check_scores(method, plan)
        assert plan.stack == ARCHITECTURES[name][2]
        assert (len(plan.layers), len(plan.selected)) == (4, len(plan.selected) if method == "gradient" else 2)
        assert set(find_lora_modules(Run.of(trainer).base)) == set(plan.modules)
        assert plan.outside == []
        assert plan.token == ("cls" if method == "cka" else None)
        assert ("rows were compared at their first token" in capsys.readouterr().out) == (method == "cka")
        after = find_saved_whole(trainer.model)
        assert len(after) == (0 if task == "MaskedLM" else len(classifier)) and after.keys() == classifier.keys()
        assert all(value.requires_grad and torch.equal(value, classifier[key]) for key, value in after.items())
    support.tested("model", f"{name} ({task})", *CHEAP)


@pytest.mark.parametrize(("name", "task"), MODELS)
def test_what_is_measured_in_an_encoder_is_what_the_model_itself_has(name, task, tmp_path):
    trainer, _ = train_rows(name, task, tmp_path)
    run = Run.of(trainer)
    stack = find_layer_stack(run.model)

    def select(method: str) -> Selection:
        return Selection.of(run, stack, SelectionConfig(method=method, num_samples=3).resolve(0))

    samples = read_samples(trainer.train_dataset, 3, seed=5)
    states = cka.measure_token_states(select("cka"), samples, [0] * 3)
    modules = stack.list_modules(stack.lora_modules)
    squares = fisher.measure_squared_gradients(select("fisher"), samples, modules)
    # As wide as the modules' inputs, a sketch has the norm of the gradient itself.
    _, sketches = gradient.measure_sketches(select("gradient"), samples, modules, 32)
    base, rows = run.base.eval(), make_task_rows(task)
    weights = [run.lora_modules[module].base_layer.weight.requires_grad_() for module in modules]
    found = []
    for i, sample in enumerate(samples):
        row = {key: torch.tensor([value]) for key, value in rows[sample.row].items()}
        output = base(**row, output_hidden_states=True)
        for place, hidden in enumerate(output.hidden_states[:4]):  # the fifth is after the final norm in some only
            torch.testing.assert_close(states[i, place], hidden[0, 0], atol=1e-5, rtol=1e-5)
        terms = 1 if row["labels"].dim() == 1 else int((row["labels"] != -100).sum())
        found.append(torch.autograd.grad(output.loss * terms, weights))
    check_gradients(squares, [sketches[module] for module in modules], found)


@pytest.mark.parametrize(("name", "task"), [*MODELS, *itertools.product(ALBERT, TASKS)])
def test_rank_moves_in_an_encoder_and_stock_peft_loads_it_with_its_classifier(name, task, tmp_path, support):
    trainer, classifier = train_rows(name, task, tmp_path, max_steps=10, save_strategy="no", disable_tqdm=True)
    selection = None if name in ALBERT else SelectionConfig(method="last", ratio=0.5)
    l1ra = L1RAConfig(update_ratio=0.2, last_update_ratio=0.8, move_ratio=0.3)
    prepare_trainer(trainer, LayerselConfig(selection=selection, l1ra=l1ra))
    trainer.train()
    trainer.save_model()
    ranks = RankHistory.read(tmp_path).ranks
    assert len({tuple(each.values()) for each in ranks.values()}) > 1, "no rank moved"
    assert set(ranks[10]) == set(find_lora_modules(Run.of(trainer).base))
    rebuilt = PeftModel.from_pretrained(make_encoder(name, task), tmp_path).eval()
    row = {key: torch.tensor([value]) for key, value in make_task_rows(task)[0].items() if key != "labels"}
    with torch.no_grad():
        logits, plain = trainer.model.eval()(**row).logits, make_encoder(name, task).eval()(**row).logits
        # l1ra folds its gates and the scaling into B, so that sums are rounded in another place.
        torch.testing.assert_close(rebuilt(**row).logits, logits, atol=1e-5, rtol=1e-5)
    assert (logits - plain).abs().max() > 1e-3
    after, loaded = find_saved_whole(trainer.model), find_saved_whole(rebuilt)
    assert after.keys() == classifier.keys() == loaded.keys()
    assert bool(after) == (task != "MaskedLM")
    for key, value in after.items():
        assert torch.equal(value, loaded[key])
        assert not torch.equal(value, classifier[key])
    support.tested("model", f"{name} ({task})", "l1ra")


@pytest.mark.parametrize(("name", "task"), MODELS)
def test_a_search_puts_gates_on_an_encoder(name, task, tmp_path, support):
    trainer, classifier = train_rows(name, task, tmp_path, disable_tqdm=True)
    search = SelectionConfig(method="flexora", ratio=0.5, flexora={"steps": 3, "val_samples": 4})
    plan = prepare_trainer(trainer, LayerselConfig(selection=search))
    check_scores("flexora", plan)
    assert len(plan.selected) == 2
    assert set(find_lora_modules(Run.of(trainer).base)) == set(plan.modules)
    after = find_saved_whole(trainer.model)
    assert (after and all(torch.equal(value, classifier[key]) for key, value in after.items())) or task == "MaskedLM"
    support.tested("model", f"{name} ({task})", "flexora")


@pytest.mark.parametrize(("name", "task"), MODELS)
def test_the_backward_pass_of_an_encoder_is_cut_below_its_lowest_layer_that_trains(name, task, tmp_path):
    trainer, _ = train_rows(name, task, tmp_path)
    prepare_trainer(trainer, LayerselConfig(selection=SelectionConfig(method="last", ratio=0.5)))
    model = trainer.model.eval()
    stack = find_layer_stack(model)
    assert find_lowest_trained(model, stack) == 2, "a classifier comes after the layers"
    batch = trainer.data_collator(make_task_rows(task)[:4])

    def differentiate() -> dict[str, torch.Tensor]:
        model.zero_grad()
        hidden = []
        with torch.enable_grad(), catch_output(stack.layers[0], hidden):
            model(**batch).loss.backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.requires_grad}, hidden[0].requires_grad

    cut = TruncatedBackward(model, stack)
    model.enable_input_require_grads()
    whole, reaches = differentiate()
    assert reaches
    cut.install()
    truncated, reaches = differentiate()
    assert not reaches
    assert whole.keys() == truncated.keys() and any(".modules_to_save." in key for key in whole) == (task != "MaskedLM")
    assert all(torch.equal(value, truncated[key]) for key, value in whole.items())


class catch_output:
    """Keeps what a layer returns within the block."""

    def __init__(self, layer, kept: list):
        self.handle = layer.register_forward_hook(
            lambda module, args, output: kept.append(output if isinstance(output, torch.Tensor) else output[0])
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handle.remove()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", [*METHODS])
def test_albert_is_refused_by_name_because_its_layers_share_their_weights(method, task, tmp_path, support):
    layers = {"layers": [1]} if method == "explicit" else {}
    trainer, _ = train_rows("Albert", task, tmp_path)
    message = rf"^base_model: the 4 layers of AlbertFor{task} share one set of weights, so LoRA there is in all of them"
    with pytest.raises(LayerselError, match=message) as caught:
        prepare_trainer(trainer, LayerselConfig(selection=SelectionConfig(method=method, **layers)))
    support.refused("model", f"Albert ({task})", method, str(caught.value))


def make_modern(pooling: str):
    base = make_encoder("ModernBert", "SequenceClassification")
    base.config.classifier_pooling = pooling
    return base


def make_eurobert(pooling: str):
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = transformers.EuroBertConfig(vocab_size=97, classifier_pooling=pooling, pad_token_id=0, **size)
    return transformers.EuroBertForSequenceClassification(config)


CLASSIFIERS = {
    **{name: (lambda name=name: make_encoder(name, "SequenceClassification"), "cls") for name in ARCHITECTURES},
    "ModernBert mean": (lambda: make_modern("mean"), "mean"),
    "EuroBert bos": (lambda: make_eurobert("bos"), "cls"),
    "EuroBert mean": (lambda: make_eurobert("mean"), "mean"),
    "EuroBert late": (lambda: make_eurobert("late"), "mean"),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_token_of_a_classifier_is_what_its_head_looks_at(name):
    make, token = CLASSIFIERS[name]
    base = make().eval()
    assert find_token(base, "auto") == token
    assert [find_token(base, other) for other in ("cls", "mean", "last")] == ["cls", "mean", "last"]
    ids = torch.tensor([[2, 7, 8, 9, 3]])
    with torch.no_grad():
        expected = base(ids).logits

        def change(module, args, output):
            output.last_hidden_state[:, 1:] += 1
            return output

        base.base_model.register_forward_hook(change)
        assert torch.equal(base(ids).logits, expected) == (token == "cls")


READERS = {
    **{name: (lambda name=name: make_encoder(name, "MaskedLM"), True) for name in ARCHITECTURES},
    "Bert as a decoder": (lambda: make_small_bert("BertLMHeadModel", is_decoder=True), False),
    "the decoder of BART": (make_bart_decoder, False),
    "GPT-2": (make_gpt2, False),
    "Llama": (make_small_llama, False),
}


@pytest.mark.parametrize("name", READERS)
def test_an_encoder_is_a_model_whose_first_token_sees_the_others(name):
    make, reads_both_ways = READERS[name]
    base = make().eval()
    with torch.no_grad():
        one, other = (base(torch.tensor([[2, 7, 8, token, 3]])).logits[0, 0] for token in (9, 50))
    assert (not torch.equal(one, other)) == reads_both_ways == is_encoder(base)
    assert find_token(base, "auto") == ("cls" if reads_both_ways else "ending")


def test_a_mean_is_the_token_of_a_model_that_pools_by_it(tmp_path, capsys):
    model = make_lora(make_modern("mean"), ARCHITECTURES["ModernBert"][1], task_type="SEQ_CLS")
    trainer = make_trainer(model, tmp_path, make_task_rows("SequenceClassification"))
    plan = prepare_trainer(trainer, LayerselConfig(selection=SelectionConfig(method="cka", num_samples=8)))
    assert plan.token == "mean"
    assert plan.unscored == {}
    assert capsys.readouterr().out.count("rows were compared at the mean of their tokens") == 1


def test_rows_of_a_classifier_are_compared_where_their_tokens_differ_if_asked(tmp_path):
    plans = {}
    for token in ("auto", "cls", "mean", "last"):
        trainer, _ = train_rows("Bert", "SequenceClassification", tmp_path / token)
        selection = SelectionConfig(method="cka", num_samples=8, token=token)
        plans[token] = prepare_trainer(trainer, LayerselConfig(selection=selection))
    assert {token: plan.token for token, plan in plans.items()} == {
        "auto": "cls",
        "cls": "cls",
        "mean": "mean",
        "last": "last",
    }
    assert plans["auto"].layers == plans["cls"].layers != plans["mean"].layers
    again = copy.deepcopy(plans["auto"])
    again.token = None
    assert type(again).model_validate_json(again.model_dump_json()) == again, "plans made before have no token"
