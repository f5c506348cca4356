"""Searches with a plain Trainer on one process."""

import pytest
import torch
from datasets import Dataset
from helpers.models import make_lora, make_rows, make_small_llama, make_trainer

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.paths import gates_path, plan_path
from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.config.selection import SelectionConfig
from axolotl_layersel.lora.modules import find_lora_modules
from axolotl_layersel.selection.gate_history import GateHistory
from axolotl_layersel.selection.methods.flexora.search import GateSearch
from axolotl_layersel.selection.methods.flexora.unrolled import InnerSteps
from axolotl_layersel.selection.plan_file import read_plan
from axolotl_layersel.training.prepare import prepare_trainer

pytestmark = pytest.mark.trains

SEARCH = {"steps": 6, "inner_steps": 2, "val_samples": 9, "gate_lr": 0.05}


def make(folder, model=None, **arguments):
    model = model or make_lora(make_small_llama())
    return make_trainer(model, folder, make_rows(40), logging_steps=1, save_strategy="no", **arguments)


def search(folder, *, trainer=None, search=None, **settings):
    """Return the trainer and the plan after a search of six steps on six layers."""
    trainer = trainer or make(folder)
    sized = {} if {"keep", "num_layers", "ratio"} & settings.keys() else {"ratio": 0.5}
    settings = SelectionConfig(method="flexora", flexora={**SEARCH, **(search or {})}, **sized, **settings)
    return trainer, prepare_trainer(trainer, LayerselConfig(selection=settings))


def train(trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def watched(monkeypatch):
    """What each gate step of a search left behind: gradients, LoRA weights before and after."""
    steps, upstream = [], GateSearch.step_gates

    def step_gates(self, step):
        lora = [parameter for parameter in self.trainer.model.parameters() if parameter.requires_grad]
        before = [parameter.detach().clone() for parameter in lora]
        loss = upstream(self, step)
        steps.append(
            {
                "moved": max(float((p - value).abs().max()) for p, value in zip(lora, before)),
                "gradients": [p.grad for p in self.trainer.model.parameters() if p.grad is not None],
                "trained": all(p.requires_grad for p in lora),
                "held": not any(gate.requires_grad for gate in self.gates.leaves.values()),
                "multipliers": self.gates.values.clone(),
            }
        )
        return loss

    monkeypatch.setattr(GateSearch, "step_gates", step_gates)
    return steps


@pytest.mark.parametrize("hypergradient", ["first_order", "unrolled"])
def test_gate_steps_move_gates_alone(tmp_path, watched, hypergradient):
    search(tmp_path, search={"hypergradient": hypergradient, "val_batches": 2})
    assert len(watched) == 3
    for step in watched:
        assert step["moved"] == 0 and not step["gradients"]
        assert step["trained"] and step["held"]
    assert not torch.equal(watched[0]["multipliers"], watched[1]["multipliers"])
    assert watched[2]["multipliers"].sum().item() == pytest.approx(6, abs=1e-5)


@pytest.mark.parametrize("hypergradient", ["first_order", "unrolled"])
def test_a_run_given_the_plan_is_the_run_that_searched(tmp_path, hypergradient):
    trainer, plan = search(tmp_path / "searched", search={"hypergradient": hypergradient})
    given = make(tmp_path / "given")
    path = plan_path(tmp_path / "searched")
    prepare_trainer(given, LayerselConfig(selection=SelectionConfig(method="flexora", plan=str(path))))
    assert read_plan(plan_path(tmp_path / "given")) == plan
    assert train(trainer) == train(given)
    for one, other in zip(trainer.model.parameters(), given.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not any(hasattr(module, "layersel_gate") for module in trainer.model.modules())


@pytest.mark.parametrize("hypergradient", ["first_order", "unrolled"])
def test_gates_do_not_depend_on_how_activations_are_kept(tmp_path, hypergradient):
    histories = []
    for kind in (None, {"use_reentrant": True}, {"use_reentrant": False}):
        folder = tmp_path / str(len(histories))
        trainer = make(folder, gradient_checkpointing=kind is not None, gradient_checkpointing_kwargs=kind)
        search(folder, trainer=trainer, search={"hypergradient": hypergradient})
        histories.append(GateHistory.read(folder))
    for history in histories[1:]:
        assert history.validation_losses == histories[0].validation_losses
        assert history.final == pytest.approx(histories[0].final, abs=1e-6)


def test_activations_are_recomputed_in_gate_steps_too(tmp_path, monkeypatch):
    trainer = make(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False})
    layer = trainer.model.get_base_model().model.layers[2]
    forwards = []
    layer.self_attn.register_forward_hook(lambda *_: forwards.append(None))
    upstream, counts = GateSearch.step_gates, []

    def step_gates(self, step):
        forwards.clear()
        loss = upstream(self, step)
        counts.append(len(forwards))
        return loss

    monkeypatch.setattr(GateSearch, "step_gates", step_gates)
    search(tmp_path, trainer=trainer)
    assert counts == [2, 2, 2]


def test_keeping_nothing_is_an_error_after_the_search(tmp_path, monkeypatch):
    # Gates that do not move; the block refuses that.
    monkeypatch.setattr(GateSearch, "step_gates", lambda self, step: self.largest_gradient.fill_(1).sum().item())
    with pytest.raises(LayerselError, match="keep: 'positive' keeps nothing: the gates ended at 0: 0, 1: 0, 2: 0"):
        search(tmp_path, keep="positive")
    assert not plan_path(tmp_path).exists() and not gates_path(tmp_path).exists()


@pytest.mark.nightly
def test_the_history_of_another_search_does_not_stay_beside_a_plan(tmp_path):
    search(tmp_path / "one", seed=1)
    search(tmp_path / "other", seed=2)
    first = gates_path(tmp_path / "one").read_text()
    assert gates_path(tmp_path / "other").read_text() != first

    def apply(**settings) -> None:
        settings = SelectionConfig(**{"method": "flexora", **settings})
        prepare_trainer(make(tmp_path / "other"), LayerselConfig(selection=settings))

    apply(plan=str(plan_path(tmp_path / "one")))
    assert gates_path(tmp_path / "other").read_text() == first
    apply(plan=str(plan_path(tmp_path / "other")))
    assert gates_path(tmp_path / "other").read_text() == first
    apply(method="first")
    assert not gates_path(tmp_path / "other").exists()


def test_the_adapter_can_be_switched_off_within_a_loss(tmp_path, watched, monkeypatch):
    """As preference training does for its reference; PEFT then makes all LoRA weights train."""
    model = make_lora(make_small_llama(), ["q_proj", "v_proj"])
    kind = {"use_reentrant": False}
    trainer = make(tmp_path, model, gradient_checkpointing=True, gradient_checkpointing_kwargs=kind)
    upstream, seen = trainer.compute_loss, []

    def compute_loss(model, inputs, *args, **kwargs):
        inner = trainer.accelerator.unwrap_model(model)
        loss = upstream(model, dict(inputs), *args, **kwargs)
        with torch.no_grad(), inner.disable_adapter():
            reference = upstream(model, dict(inputs), *args, **kwargs)
        seen.append({name for name, parameter in inner.named_parameters() if parameter.requires_grad})
        return loss - reference

    trainer.compute_loss = compute_loss
    search(tmp_path, trainer=trainer, candidates=[1, 3, 4], num_layers=2, search={"val_batches": 2})
    assert len(watched) == 3 and not any(step["gradients"] for step in watched)
    trained = {len(names) for names in seen}
    assert trained == {0, 3 * 2 * 2}, "nothing in gate steps, the candidates' LoRA in LoRA steps"


def test_dropout_is_off_where_gates_are_measured_and_on_where_lora_trains(tmp_path, monkeypatch):
    model = make_lora(make_small_llama(), lora_dropout=0.5)
    trainer = make(tmp_path, model, gradient_checkpointing=True)
    dropout = find_lora_modules(model.get_base_model())["model.layers.0.self_attn.q_proj"].lora_dropout["default"]
    modes, upstream = [], GateSearch.compute_loss

    def compute_loss(self, inputs):
        layer = model.get_base_model().model.layers[0]
        modes.append((dropout.training, layer.self_attn.training, layer.training))
        return upstream(self, inputs)

    monkeypatch.setattr(GateSearch, "compute_loss", compute_loss)
    search(tmp_path, trainer=trainer)
    assert modes == [(False, False, True)] * 3, "the layer itself checkpoints in training mode alone"
    assert dropout.training


def test_an_unrolled_search_sees_the_weights_that_sgd_reaches(tmp_path, monkeypatch):
    """With SGD as the run's optimizer the virtual steps are the real ones."""
    trainer = make(tmp_path, optim="sgd", max_grad_norm=0, learning_rate=0.5, gradient_accumulation_steps=2)
    losses, upstream = [], InnerSteps.measure

    def measure(self, batches, compute_loss):
        loss, labels = upstream(self, batches, compute_loss)
        now = sum(compute_loss(dict(batch))[0].detach() for batch in batches)
        losses.append((float(loss / labels), float(now / labels)))
        return loss, labels

    monkeypatch.setattr(InnerSteps, "measure", measure)
    search(tmp_path, trainer=trainer, search={"hypergradient": "unrolled"})
    assert len(losses) == 3
    for unrolled, reached in losses:
        assert unrolled == pytest.approx(reached, abs=1e-5)
    assert abs(losses[0][0] - losses[-1][0]) > 1e-3


def test_rows_that_are_held_out_come_back_and_the_eval_set_is_not_touched(tmp_path, monkeypatch):
    trainer = make(tmp_path)

    class Forbidden:
        def __getattr__(self, name):
            raise AssertionError("the eval set was looked at")

    trainer.eval_dataset = Forbidden()
    sizes, upstream = [], GateSearch.start

    def start(self, train_dataloader):
        sizes.append(len(train_dataloader.dataset))
        return upstream(self, train_dataloader)

    monkeypatch.setattr(GateSearch, "start", start)
    _, plan = search(tmp_path, trainer=trainer)
    assert sizes == [31] and len(trainer.train_dataset) == 40
    assert len(set(plan.calibration_rows)) == 9
    assert plan.dataset_fingerprint.startswith("sha256:")


def test_validation_rows_can_be_of_the_eval_set(tmp_path):
    trainer = make(tmp_path)
    trainer.eval_dataset = Dataset.from_list(make_rows(5, seed=8))
    _, plan = search(tmp_path, trainer=trainer, search={"val_source": "eval"})
    assert sorted(plan.calibration_rows) == [0, 1, 2, 3, 4]


def test_only_candidates_take_part(tmp_path, monkeypatch):
    trainer = make(tmp_path)
    seen, upstream = {}, GateSearch.finish_step

    def finish_step(self, step):
        for layer in range(6):
            module = self.trainer.model.get_base_model().model.layers[layer].self_attn.q_proj
            seen[layer] = float(module.lora_B["default"].weight.norm())
        return upstream(self, step)

    monkeypatch.setattr(GateSearch, "finish_step", finish_step)
    _, plan = search(tmp_path, trainer=trainer, candidates=[1, 3, 4], num_layers=2, unselected="freeze")
    assert [layer for layer, norm in seen.items() if norm > 0] == [1, 3, 4]
    assert set(plan.selected) < {1, 3, 4} and len(plan.selected) == 2
    assert [choice.layer for choice in plan.layers if choice.score is not None] == [1, 3, 4]
    assert GateHistory.read(tmp_path).names == ["1", "3", "4"]


def test_modules_can_be_chosen_one_by_one(tmp_path):
    trainer, plan = search(tmp_path / "run", granularity="module", ratio=0.3)
    assert len(plan.module_scores) == 18 and len(plan.modules) == 5
    assert set(find_lora_modules(trainer.model.get_base_model())) == set(plan.modules)
    lowest = min(plan.module_scores[name] for name in plan.modules)
    assert all(score <= lowest for name, score in plan.module_scores.items() if name not in plan.modules)
    for choice in plan.layers:
        scores = [score for name, score in plan.module_scores.items() if f"layers.{choice.layer}." in name]
        assert choice.score == max(scores)
    assert len(train(trainer)) == 4

    path = str(plan_path(tmp_path / "run"))
    given = make(tmp_path / "given")
    prepare_trainer(given, LayerselConfig(selection=SelectionConfig(method="flexora", plan=path)))
    assert train(given) == [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    fewer = make(tmp_path / "fewer", make_lora(make_small_llama(), ["q_proj", "v_proj"]))
    with pytest.raises(LayerselError, match=r"does not fit this run: the model has no LoRA on .*down_proj"):
        prepare_trainer(fewer, LayerselConfig(selection=SelectionConfig(method="flexora", plan=path)))
    more = make(tmp_path / "more", make_lora(make_small_llama(), ["q_proj", "v_proj", "down_proj", "up_proj"]))
    with pytest.raises(LayerselError, match=r"does not fit this run: the model has LoRA on .*up_proj, unknown"):
        prepare_trainer(more, LayerselConfig(selection=SelectionConfig(method="flexora", plan=path)))


def test_a_search_stops_when_its_choice_has_settled(tmp_path):
    search(tmp_path, search={"steps": 40, "inner_steps": 1, "patience": 2, "gate_lr": 0.001}, num_layers=6)
    assert len(GateHistory.read(tmp_path).gates) == 3, "all six layers are kept from the first gate step on"


def test_the_seed_says_what_is_validated_on(tmp_path):
    plans = [search(tmp_path / str(seed), seed=seed)[1] for seed in (1, 2)]
    again = search(tmp_path / "again", seed=1)[1]
    assert plans[0].calibration_rows == again.calibration_rows != plans[1].calibration_rows
    assert plans[0].layers == again.layers
    assert plans[0].layers != plans[1].layers


@pytest.mark.nightly
def test_choices_with_several_seeds_are_compared(tmp_path, capsys):
    trainer = make(tmp_path / "run")
    settings = SelectionConfig(method="flexora", ratio=0.5, flexora=SEARCH, seed=1)
    plan = prepare_trainer(trainer, LayerselConfig(selection=settings), repeat=3)
    single = {seed: search(tmp_path / str(seed), seed=seed)[1].selected for seed in (1, 2, 3)}
    assert plan.stability.selected == single, "each as if it had been the only one"
    pairs = [(single[1], single[2]), (single[1], single[3]), (single[2], single[3])]
    overlaps = [len(set(a) & set(b)) / len(set(a) | set(b)) for a, b in pairs]
    assert plan.stability.overlap == pytest.approx(sum(overlaps) / 3)
    assert plan.selected == single[1]
    printed = capsys.readouterr().out
    assert "3 seeds agree with a mean overlap" in printed
    assert ("WARNING: the choice depends on the seed" in printed) == (plan.stability.overlap < 0.6)
    assert read_plan(plan_path(tmp_path / "run")) == plan


def test_a_plan_that_is_given_cannot_be_repeated(tmp_path):
    search(tmp_path)
    settings = SelectionConfig(method="flexora", plan=str(plan_path(tmp_path)))
    with pytest.raises(LayerselError, match=r"--repeat has no effect with the plan of .*plan.json, because"):
        prepare_trainer(make(tmp_path), LayerselConfig(selection=settings), repeat=2)


def test_a_method_that_draws_nothing_cannot_be_repeated(tmp_path):
    with pytest.raises(LayerselError, match="--repeat: 2 choices by method first would say nothing"):
        prepare_trainer(make(tmp_path), LayerselConfig(selection=SelectionConfig(method="first")), repeat=2)


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({}, {"search": {"val_samples": 38}}, "val_samples: 38 of the 40 training rows leaves 2 to train on"),
        ({}, {"search": {"val_source": "eval"}}, "val_source: 'eval' needs an eval set, but this run has none"),
        ({}, {"keep": "positive", "candidates": [3]}, "keep: 'positive' needs two or more gates to compare, and there"),
        ({}, {"ratio": 0.01}, "ratio: 0.01 of 6 layers keeps none. Set at least 0.167, or `num_layers: 1`"),
        (
            {},
            {"ratio": 0.01, "granularity": "module"},
            r"ratio: 0.01 of 18 modules keeps none. Set at least 0.056, or `num_units: 1`\.",
        ),
        ({"learning_rate": 0.0}, {}, "no gradient reached the gate of 0, 1, 2, 3, 4, 5: the LoRA there did not train"),
    ],
)
def test_a_search_that_comes_to_nothing_says_why_and_leaves_no_plan(tmp_path, change, settings, message):
    with pytest.raises(LayerselError, match=message):
        search(tmp_path, trainer=make(tmp_path, **change), **settings)
    assert not plan_path(tmp_path).exists() and not gates_path(tmp_path).exists()


def test_a_number_that_is_none_ends_the_search(tmp_path):
    trainer = make(tmp_path)
    trainer.model.get_base_model().model.layers[1].self_attn.q_proj.base_layer.weight.data[0, 0] = float("nan")
    with pytest.raises(LayerselError, match="NaN or infinity in the gradient of gate 0 after step 2 of the search"):
        search(tmp_path, trainer=trainer)
    assert not plan_path(tmp_path).exists()


def test_lora_that_is_computed_past_its_modules_is_found(tmp_path):
    trainer = make(tmp_path)
    for module in trainer.model.get_base_model().model.layers[2].modules():
        if hasattr(module, "lora_A"):
            a, b = (getattr(module, side)["default"].weight for side in ("lora_A", "lora_B"))
            module.forward = lambda x, m=module, a=a, b=b: m.base_layer(x) + x @ a.T @ b.T * m.scaling["default"]
    with pytest.raises(LayerselError, match="no gradient reached the gate of 2: the LoRA there did not train, or is"):
        search(tmp_path, trainer=trainer)


def test_what_cannot_be_searched_is_refused(tmp_path):
    trainer = make(tmp_path)
    trainer.create_optimizer()
    with pytest.raises(LayerselError, match="optimizer: it was made before the trainer was prepared"):
        search(tmp_path, trainer=trainer)
    trainer = make(tmp_path, auto_find_batch_size=True)
    with pytest.raises(LayerselError, match="auto_find_batch_size: true restarts training"):
        search(tmp_path, trainer=trainer)
    with pytest.raises(LayerselError, match=r"peft_use_dora: true cannot be combined with layersel.*: flexora"):
        search(tmp_path, trainer=make(tmp_path, make_lora(make_small_llama(), use_dora=True)))
    trainer = make(tmp_path)
    trainer.model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(LayerselError, match="'unrolled' differentiates twice, which flash_attention_2 does not"):
        search(tmp_path, trainer=trainer, search={"hypergradient": "unrolled"})
