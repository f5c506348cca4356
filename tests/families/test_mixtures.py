"""l1ra and flexora on mixtures of experts under the usual target modules, which PEFT turns into expert parameters."""

import logging
import shutil

import pytest
import torch
from helpers.experts import make_base as make_without_lora
from helpers.experts import make_experts
from helpers.mixtures import FAMILIES, STAYS, compute, find_ranks, make_base
from helpers.models import make_lora, make_trainer
from peft import LoraConfig, PeftModel, get_peft_model

from axolotl_layersel import L1RAConfig, LayerselConfig, SelectionConfig, prepare_trainer
from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.l1ra.records import RankHistory
from axolotl_layersel.lora.modules import find_lora_modules, list_linear
from axolotl_layersel.lora.run import Run
from axolotl_layersel.selection.gate_history import GateHistory

MOVES = L1RAConfig(update_ratio=0.16, move_ratio=0.3)


def make_mixture(family: str = "Qwen3Moe", **settings):
    """Return it with LoRA on the modules that users name."""
    return make_lora(make_base(family), FAMILIES[family][1], **settings)


def count_parameters(model, names) -> dict[str, int]:
    """Return the parameters of one component of the LoRA modules ``names``."""
    modules = find_lora_modules(model.get_base_model())
    return {name: sum(modules[name].get_base_layer().weight.shape) for name in names}


def move_rank(model, folder, caplog):
    """Train while rank moves, save, and check that the log tells once of experts that keep their rank."""
    trainer = make_trainer(model, folder, max_steps=6, save_strategy="no")
    with caplog.at_level(logging.INFO):
        prepare_trainer(trainer, LayerselConfig(l1ra=MOVES))
        trainer.train()
    assert caplog.text.count(STAYS) == 1
    trainer.save_model()
    return trainer


@pytest.mark.parametrize("family", FAMILIES)
def test_rank_moves_among_linear_modules_and_stock_peft_computes_the_same(family, tmp_path, caplog):
    model = make_mixture(family)
    fixed, linear = find_ranks(model, experts=True), find_ranks(model, experts=False)
    assert fixed and len(set(fixed.values())) == 2, "gate and up, which became one, have twice the rank"
    trainer = move_rank(model, tmp_path, caplog)
    history = RankHistory.read(tmp_path).ranks
    assert list(history[0]) == list(linear) and history[0] == linear
    assert len({tuple(ranks.values()) for ranks in history.values()}) > 1, "no rank moved"
    assert find_ranks(trainer.model, experts=True) == fixed
    costs = count_parameters(trainer.model, linear)
    spent = [sum(rank * costs[name] for name, rank in ranks.items()) for ranks in history.values()]
    assert max(spent) == spent[0]

    expected, plain = compute(trainer.model), compute(make_base(family))
    reloaded = PeftModel.from_pretrained(make_base(family), tmp_path)
    torch.testing.assert_close(compute(reloaded), expected, atol=1e-5, rtol=1e-4)
    assert find_ranks(reloaded, experts=True) == fixed
    assert find_ranks(reloaded, experts=False) == history[6]
    torch.testing.assert_close(compute(reloaded.merge_and_unload()), expected, atol=1e-4, rtol=1e-3)
    # Experts have trained: without them the adapter computes something else.
    assert not torch.allclose(expected, plain, atol=1e-2)
    rebuilt = PeftModel.from_pretrained(make_base(family), tmp_path)
    for name in find_ranks(rebuilt, experts=True):
        rebuilt.get_base_model().get_submodule(name).lora_B["default"].weight.data.zero_()
    assert not torch.allclose(compute(rebuilt), expected, atol=1e-3)


def test_parameters_that_the_user_names_stay_at_their_rank_too(tmp_path, caplog):
    model = make_experts("Mixtral", target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    fixed = find_ranks(model, experts=True)
    trainer = move_rank(model, tmp_path, caplog)
    assert len({tuple(ranks.values()) for ranks in RankHistory.read(tmp_path).ranks.values()}) > 1
    reloaded = PeftModel.from_pretrained(make_without_lora("Mixtral"), tmp_path)
    assert find_ranks(reloaded, experts=True) == fixed
    torch.testing.assert_close(compute(reloaded), compute(trainer.model), atol=1e-5, rtol=1e-4)


def test_the_sum_of_ranks_stays_under_pressure_too(tmp_path):
    trainer = make_trainer(make_mixture(r=4), tmp_path, max_steps=10, save_strategy="no")
    settings = L1RAConfig(rule="pressure", budget_unit="rank", update_ratio=0.1, l1_lambda=0.3, gate_lr=0.2)
    prepare_trainer(trainer, LayerselConfig(l1ra=settings))
    trainer.train()
    trainer.save_model()
    history = RankHistory.read(tmp_path).ranks
    assert len({tuple(ranks.values()) for ranks in history.values()}) > 1
    start = sum(history[0].values())
    assert all(sum(ranks.values()) <= start for ranks in history.values())
    assert any(sum(ranks.values()) == start for step, ranks in history.items() if 0 < step < 10)
    reloaded = PeftModel.from_pretrained(make_base("Qwen3Moe"), tmp_path)
    torch.testing.assert_close(compute(reloaded), compute(trainer.model), atol=1e-5, rtol=1e-4)


def test_a_run_that_resumes_ends_as_one_that_did_not_stop(tmp_path):
    def run(folder, resume_from=None):
        trainer = make_trainer(make_mixture(), folder, max_steps=6, save_steps=2)
        prepare_trainer(trainer, LayerselConfig(l1ra=MOVES), resume_from=resume_from)
        trainer.train(resume_from_checkpoint=resume_from)
        trainer.save_model()
        return trainer

    whole = run(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "again" / "checkpoint-4")
    again = run(tmp_path / "again", str(tmp_path / "again" / "checkpoint-4"))
    assert RankHistory.read(tmp_path / "again").ranks == RankHistory.read(tmp_path / "whole").ranks
    one, other = ({n: p for n, p in t.model.named_parameters() if "lora_" in n} for t in (whole, again))
    assert one.keys() == other.keys() and any("experts" in name for name in one)
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=0, rtol=0)


@pytest.mark.parametrize("exponent", [0.5, None])
def test_an_adapter_that_was_made_so_is_continued_under_its_scaling(tmp_path, exponent):
    moves = LayerselConfig(l1ra=MOVES, scaling_exponent=exponent)
    trainer = make_trainer(make_mixture(), tmp_path, max_steps=6, save_strategy="no")
    prepare_trainer(trainer, moves)
    starts = {m.scaling["default"] for m in find_lora_modules(trainer.model.get_base_model()).values()}
    trainer.train()
    trainer.save_model()
    expected = compute(trainer.model)
    scalings = {n: m.scaling["default"] for n, m in find_lora_modules(trainer.model.get_base_model()).items()}
    model = PeftModel.from_pretrained(make_base("Qwen3Moe"), tmp_path, is_trainable=True)
    again = make_trainer(model, tmp_path / "again", max_steps=6, save_strategy="no")
    (scaling,) = starts
    assert (len(set(scalings.values())) > 1) == (exponent is not None)
    lora_r = next(iter(RankHistory.read(tmp_path).ranks[0].values()))
    prepare_trainer(again, moves, continues_adapter=True, lora_r=lora_r, scaling=scaling)
    modules = find_lora_modules(again.model.get_base_model())
    # Where two experts' weights became one, PEFT doubles the rank, from which the scaling of a continued run follows.
    moved = [name for name in scalings if exponent is None or "experts" not in name]
    for name in moved:
        assert modules[name].scaling["default"] == pytest.approx(scalings[name], rel=1e-12)
    torch.testing.assert_close(compute(again.model), expected, atol=1e-5, rtol=1e-4)
    again.train()
    again.save_model()
    reloaded = PeftModel.from_pretrained(make_base("Qwen3Moe"), tmp_path / "again")
    torch.testing.assert_close(compute(reloaded), compute(again.model), atol=1e-5, rtol=1e-4)


def test_a_plan_gives_experts_their_rank_and_l1ra_moves_that_of_the_others(tmp_path):
    trainer = make_trainer(make_mixture(), tmp_path, max_steps=6, save_strategy="no")
    selection = SelectionConfig(method="gradient", num_samples=9, ratio=0.8, budget=0.7, min_rank=1)
    plan = prepare_trainer(trainer, LayerselConfig(selection=selection, l1ra=MOVES))
    fixed = {name: rank for name, rank in plan.ranks.items() if "experts" in name}
    assert find_ranks(trainer.model, experts=True) == fixed and len(set(fixed.values())) > 1
    trained = {n: p.numel() for n, p in trainer.model.named_parameters() if p.requires_grad and "experts" in n}
    assert sum(trained.values()) > 0
    trainer.train()
    trainer.save_model()
    history = RankHistory.read(tmp_path).ranks
    assert history[0] == {name: rank for name, rank in plan.ranks.items() if name not in fixed}
    reloaded = PeftModel.from_pretrained(make_base("Qwen3Moe"), tmp_path)
    assert find_ranks(reloaded, experts=True) == fixed
    torch.testing.assert_close(compute(reloaded), compute(trainer.model), atol=1e-5, rtol=1e-4)


def search(**settings) -> LayerselConfig:
    settings = {"ratio": 0.5, "flexora": {"steps": 2, "val_samples": 4}, **settings}
    return LayerselConfig(selection=SelectionConfig(method="flexora", **settings))


@pytest.mark.parametrize("unselected", ["remove", "freeze"])
def test_a_search_has_gates_on_linear_modules_and_experts_go_with_their_layer(tmp_path, caplog, unselected):
    model = make_mixture()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = make_trainer(model, tmp_path, max_steps=2, save_strategy="no")
    with caplog.at_level(logging.INFO):
        plan = prepare_trainer(trainer, search(unselected=unselected))
    assert caplog.text.count("LoRA on experts takes no part in the search") == 1
    assert GateHistory.read(tmp_path).names == ["0", "1", "2", "3"]
    assert len(plan.selected) == 2
    modules = Run.of(trainer).lora_modules
    trained = {name for name, m in modules.items() if m.lora_B["default"].weight.requires_grad}
    assert {int(name.split(".")[2]) for name in trained} == set(plan.selected)
    assert {name for name in plan.modules if name not in list_linear(modules)} == {
        f"model.layers.{layer}.mlp.experts{inner}" for layer in plan.selected for inner in ("", ".base_layer")
    }
    assert trained == set(plan.modules)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            assert not parameter.any()
        elif "experts" in name and "lora_" not in name and unselected == "freeze":
            torch.testing.assert_close(parameter, before[name], atol=0, rtol=0)
    trainer.train()
    trainer.save_model()
    reloaded = PeftModel.from_pretrained(make_base("Qwen3Moe"), tmp_path)
    torch.testing.assert_close(compute(reloaded), compute(trainer.model), atol=0, rtol=0)


def test_what_has_experts_only_cannot_be_searched(tmp_path):
    trainer = make_trainer(make_mixture(), tmp_path)
    with pytest.raises(LayerselError, match=r"granularity: 'module' .* model\.layers\.0\.mlp\.experts has LoRA on exp"):
        prepare_trainer(trainer, search(granularity="module"))
    base = make_without_lora("GptOss")  # of Qwen3-MoE, PEFT makes the ends of the names of a regular expression
    model = make_lora(base, r".*\.[01]\.self_attn\.q_proj", target_parameters=["mlp.experts.down_proj"])
    with pytest.raises(LayerselError, match=r"granularity: 'layer' .*, and 2 has LoRA on experts only.*`candidates`"):
        prepare_trainer(make_trainer(model, tmp_path), search())


@pytest.mark.parametrize("settings", [LayerselConfig(l1ra=MOVES), search()])
def test_gates_are_refused_where_all_lora_is_on_experts(tmp_path, settings):
    config = LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    trainer = make_trainer(get_peft_model(make_base("Qwen3Moe"), config), tmp_path)
    with pytest.raises(LayerselError, match="lora_target_parameters: all LoRA is on expert parameters"):
        prepare_trainer(trainer, settings)


# --- Axolotl's engines ------------------------------------------------------------------------------------------------
