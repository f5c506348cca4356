"""Deciding and applying, with a plain Trainer: the core needs no Axolotl."""

import logging

import pytest
import torch
from helpers.models import make_bart, make_llava, make_lora, make_rows, make_small_llama, make_t5, make_trainer
from helpers.places import SCORING
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import Trainer

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.paths import plan_path
from axolotl_layersel.common.randomness import draw_row
from axolotl_layersel.config.methods import METHODS
from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.config.selection import SelectionConfig
from axolotl_layersel.l1ra.records import RankHistory
from axolotl_layersel.lora.modules import find_lora_modules
from axolotl_layersel.reports.plan_table import print_plan
from axolotl_layersel.selection.candidates import count_kept
from axolotl_layersel.selection.choosing import choose_highest
from axolotl_layersel.selection.gate_history import GateHistory
from axolotl_layersel.selection.plan_file import check_checkpoint, read_plan, write_plan
from axolotl_layersel.training.prepare import prepare_trainer


def select(folder, *, rows=None, continues_adapter: bool = False, **settings):
    model = make_lora(make_small_llama())
    trainer = make_trainer(model, folder, rows)
    scoring = {"num_samples": 12} if METHODS[settings.get("method", "cka")].draws_rows else {}
    settings = SelectionConfig(**{"method": "cka", **scoring, **settings})
    return trainer, prepare_trainer(trainer, LayerselConfig(selection=settings), continues_adapter=continues_adapter)


@pytest.mark.parametrize(
    ("ratio", "candidates", "kept"), [(0.29, 100, 29), (0.5, 7, 3), (1, 5, 5), (0.1, 10, 1), (None, 8, 4)]
)
def test_the_ratio_is_rounded_down_but_not_by_floating_point(ratio, candidates, kept):
    assert count_kept(SelectionConfig(method="cka", ratio=ratio).resolve(1), candidates) == kept


@given(st.lists(st.floats(0, 1), min_size=2, max_size=20, unique=True), st.data())
def test_the_highest_scores_are_kept(scores, data):
    keep = data.draw(st.integers(1, len(scores)))
    chosen = choose_highest(scores, {}, list(range(len(scores))), keep, METHODS["cka"])
    assert sorted(scores[layer] for layer in chosen) == sorted(scores)[-keep:]
    assert chosen == sorted(chosen)


def test_ties_go_to_the_lower_layer():
    assert choose_highest([0.1, 0.5, 0.5, 0.5, 0.0], {}, [0, 1, 2, 3, 4], 2, METHODS["cka"]) == [1, 2]


@pytest.mark.parametrize("method", [method for method in METHODS if method not in ("explicit", "flexora")])
def test_every_method_leaves_lora_in_the_chosen_layers_alone(tmp_path, method):
    trainer, plan = select(tmp_path, method=method, num_layers=2, granularity="layer", rank_allocation="same")
    assert len(plan.selected) == 2
    assert set(find_lora_modules(trainer.model.get_base_model())) == set(plan.modules)
    assert {int(name.split(".")[2]) for name in plan.modules} == set(plan.selected)
    assert (plan.layers[0].score is None) == (method not in SCORING)
    assert read_plan(plan_path(tmp_path)) == plan


def test_the_plan_says_what_was_decided_on_what(tmp_path):
    _trainer, plan = select(tmp_path, seed=9)
    assert plan.seed == 9
    assert plan.method == "cka"
    assert len(set(plan.calibration_rows)) == 12
    assert plan.dataset_fingerprint.startswith("sha256:")
    assert plan.stack == "model.layers"
    assert plan.engine == "single"
    assert plan.processes == 1
    assert plan.seconds > 0
    assert plan.versions["torch"] == torch.__version__
    assert select(tmp_path / "other", seed=10)[1].calibration_rows != plan.calibration_rows


def test_only_candidates_are_chosen_and_the_others_lose_their_adapter(tmp_path):
    _trainer, plan = select(tmp_path, candidates=[1, 2, 3], ratio=0.67)
    assert len(plan.selected) == 2
    assert set(plan.selected) <= {1, 2, 3}
    assert all(choice.score is not None for choice in plan.layers)


@pytest.mark.trains
def test_frozen_layers_keep_their_adapter_untrained(tmp_path):
    trainer, _plan = select(tmp_path, method="explicit", layers=[1, 4], unselected="freeze")
    assert len(find_lora_modules(trainer.model.get_base_model())) == 18
    trained = {name.split(".layers.")[1][0] for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained == {"1", "4"}
    before = {name: value.clone() for name, value in trainer.model.state_dict().items() if "lora" in name}
    trainer.train()
    for name, value in trainer.model.state_dict().items():
        if "lora_B" in name:
            assert torch.equal(before[name], value) == (name.split(".layers.")[1][0] not in trained)


def test_without_an_end_to_differ_in_layer_0_is_unscored_and_not_chosen(tmp_path):
    _, plan = select(tmp_path, token="last", num_layers=5)
    assert plan.layers[0].score is None
    assert plan.selected == [1, 2, 3, 4, 5]
    assert "same for all samples" in plan.unscored[0]
    assert select(tmp_path / "auto", token="auto")[1].layers[0].score is not None


def test_a_row_that_was_cut_changes_no_choice_and_is_named(tmp_path, caplog):
    # What is logged beside warnings names the token too, and a test before this one may have asked for it.
    caplog.set_level(logging.WARNING, logger="axolotl.layersel")
    whole = make_rows(60)
    _, plan = select(tmp_path / "whole", rows=whole, num_samples=50)
    assert "token: auto" not in caplog.text
    cut = plan.calibration_rows[4]
    rows = [{name: values[:-1] for name, values in row.items()} if i == cut else row for i, row in enumerate(whole)]
    _, with_cut = select(tmp_path / "cut", rows=rows, num_samples=50)
    assert with_cut.calibration_rows == [row for row in plan.calibration_rows if row != cut]
    assert with_cut.rows_left_out == [cut] and plan.rows_left_out == []
    assert "token: auto: 1 of the 50 rows drawn lack the ending that the others share" in caplog.text
    assert f"are not scored: {cut}\n" in caplog.text
    assert with_cut.selected == plan.selected
    scores = [choice.score for choice in with_cut.layers]
    assert scores == pytest.approx([choice.score for choice in plan.layers], abs=0.02)


@pytest.mark.parametrize(
    ("token", "way_out"), [("last", "Use `token: auto` or `mean`."), ("auto", "Use `token: mean`.")]
)
def test_a_token_that_nearly_all_rows_share_is_warned_of(tmp_path, caplog, token, way_out):
    rows = make_rows(20)
    for i, row in enumerate(rows):
        # 18 rows end in 1; of these 17 have a 7 before it, too few of the 20 to be a part of the ending.
        row["input_ids"][-2:] = [3 + i, 9 + i] if i < 2 else [8 if i == 2 else 7, 1]
    select(tmp_path, rows=rows, num_samples=20, token=token, num_layers=2)
    assert f"token: {token}: {'18 of 20' if token == 'last' else '17 of 18'} rows have the same token" in caplog.text
    assert way_out in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "explicit", "layers": [2, 6]}, r"layers: \[6\] are out of range.*0 to 5"),
        ({"candidates": [0, 17]}, r"candidates: \[17\] are out of range"),
        ({"num_samples": 128}, r"num_samples: 128 is more than the 24 rows"),
        ({"num_layers": 7}, r"num_layers: 7 is more than the 6 layers"),
        ({"num_units": 13, "granularity": "group"}, r"num_units: 13 is more than the 12 groups"),
        (
            {"token": "last", "num_units": 12, "granularity": "group"},
            r"could score only 11 of 12 groups.*layer 0: model.layers.0.self_attn: its input is the same",
        ),
        ({"ratio": 0.1}, r"ratio: 0.1 of 6 layers keeps none.*at least 0.167"),
        ({"token": "last", "num_layers": 6}, r"could score only 5 of 6 layers.*layer 0: its input is the same"),
    ],
)
def test_what_cannot_be_done_is_an_error_that_says_what_to_do(tmp_path, settings, message):
    with pytest.raises(LayerselError, match=message):
        select(tmp_path, **settings)
    assert not plan_path(tmp_path).exists()


def test_equal_rows_leave_every_score_undefined(tmp_path):
    with pytest.raises(LayerselError, match=r"could score only 0 of 6 layers"):
        select(tmp_path, rows=make_rows(1) * 20)


def test_equal_scores_are_nothing_to_choose_by():
    with pytest.raises(LayerselError, match=r"gives every layer the score 0.25"):
        choose_highest([0.25] * 4, {}, [0, 1, 2, 3], 2, METHODS["cosine"])


def test_a_nan_is_traced_to_its_layer_and_row(tmp_path):
    model = make_lora(make_small_llama())
    with torch.no_grad():
        model.get_base_model().model.layers[3].mlp.up_proj.weight[0, 0] = float("nan")
    trainer = make_trainer(model, tmp_path)
    with pytest.raises(LayerselError, match=r"NaN or infinity in layer 3.* training row \d+"):
        prepare_trainer(trainer, LayerselConfig(selection=SelectionConfig(method="cka", num_samples=12)))


def test_a_continued_adapter_is_not_deleted_by_default(tmp_path):
    with pytest.raises(LayerselError, match=r"unselected: lora_model_dir continues.*freeze"):
        select(tmp_path, continues_adapter=True)
    trainer, _ = select(tmp_path, continues_adapter=True, unselected="remove", method="last")
    assert len(find_lora_modules(trainer.model.get_base_model())) == 9


def test_a_trainer_without_an_adapter_is_refused(tmp_path):
    trainer = make_trainer(make_small_llama(), tmp_path)
    with pytest.raises(LayerselError, match="adapter: the trainer's model is a LlamaForCausalLM"):
        prepare_trainer(trainer, LayerselConfig(selection=SelectionConfig(method="last")))


def select_with_towers(folder, *, make=make_llava, targets=("q_proj", "v_proj"), freeze=None, resume=None, **settings):
    model = make_lora(make(), targets)
    if freeze:
        freeze(model)
    trainer = make_trainer(model, folder, max_steps=2, save_strategy="steps", save_steps=2)
    settings = SelectionConfig(**{"method": "last", **settings})
    return trainer, prepare_trainer(trainer, LayerselConfig(selection=settings), resume)


def test_lora_in_a_vision_tower_is_kept_counted_and_said(tmp_path, capsys):
    trainer, plan = select_with_towers(tmp_path, method="cka", num_samples=12, num_layers=1)
    (tower,) = plan.outside
    assert (tower.place, len(tower.modules), tower.trained) == ("model.vision_tower", 8, 8)
    assert {*plan.modules, *tower.modules} == set(find_lora_modules(trainer.model.get_base_model()))
    assert len(plan.modules) == 2
    line = "model.vision_tower: 8 LoRA modules outside of the layers, kept and trained"
    assert line in capsys.readouterr().out
    print_plan(read_plan(plan_path(tmp_path)))
    assert line in capsys.readouterr().out


def test_lora_that_the_run_itself_freezes_is_not_said_to_train(tmp_path, capsys):
    from axolotl.utils.freeze import freeze_mm_modules

    _, plan = select_with_towers(tmp_path, freeze=freeze_mm_modules)
    assert plan.outside[0].trained == 0
    assert "model.vision_tower: 8 LoRA modules outside of the layers, kept, none of them trained" in (
        capsys.readouterr().out
    )


@pytest.mark.trains
@pytest.mark.parametrize("unselected", ["remove", "freeze"])
def test_towers_can_be_left_without_an_adapter(tmp_path, capsys, unselected):
    trainer, plan = select_with_towers(tmp_path, outside_layers="remove", unselected=unselected, num_layers=1)
    assert "model.vision_tower: 8 LoRA modules outside of the layers, removed" in capsys.readouterr().out
    left = find_lora_modules(trainer.model.get_base_model())
    assert set(left) >= set(plan.modules)
    assert len(left) == (2 if unselected == "remove" else 8)
    assert all(name.startswith("model.language_model.layers.") for name in left)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    rebuilt = PeftModel.from_pretrained(make_llava(), tmp_path / "adapter")
    assert set(find_lora_modules(rebuilt.get_base_model())) == set(left)


@pytest.mark.parametrize("method", SCORING)
def test_a_method_that_scores_refuses_a_model_of_which_one_side_is_not_found(tmp_path, method):
    def make_pruned():
        base = make_t5()
        del base.encoder.block[3]  # and its configuration still says 4
        return base

    message = rf"^base_model: T5ForConditionalGeneration is of a family with an encoder.*method: {method} does not know"
    with pytest.raises(LayerselError, match=message):
        select_with_towers(tmp_path, make=make_pruned, targets=["q", "v"], method=method, num_samples=12)
    assert not plan_path(tmp_path).exists()
    _, plan = select_with_towers(tmp_path, make=make_pruned, targets=["q", "v"], num_layers=1)
    assert (plan.stack, plan.selected, plan.outside[0].place) == ("decoder.block", [3], "encoder")


@pytest.mark.trains
def test_a_search_sees_the_loss_of_an_encoder_decoder_model(tmp_path):
    model = make_lora(make_t5(), ["q", "v"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    rows = make_rows()
    trainer = make_trainer(model, tmp_path, rows, learning_rate=1e-12)
    search = {"steps": 1, "val_samples": 8, "val_batches": 2}
    settings = SelectionConfig(method="flexora", ratio=0.5, unselected="freeze", flexora=search)
    plan = prepare_trainer(trainer, LayerselConfig(selection=settings), continues_adapter=True)
    assert plan.outside == [] and len(plan.selected) == 4
    logits, labels = [], []
    with torch.no_grad():
        for row in plan.calibration_rows:
            batch = {name: torch.tensor([value]) for name, value in rows[row].items()}
            logits.append(model.eval()(**batch).logits[0])
            labels.append(batch["labels"][0])
    expected = torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(labels)).item()
    assert GateHistory.read(tmp_path).validation_losses == [pytest.approx(expected, rel=1e-5)]


@pytest.mark.trains
@pytest.mark.parametrize("unselected", ["remove", "freeze"])
@pytest.mark.parametrize("make", [make_t5, make_bart])
def test_candidates_can_be_those_of_one_side_alone(tmp_path, make, unselected):
    targets = ["q", "v"] if make is make_t5 else ["q_proj", "v_proj"]
    decoder = [f"decoder.{number}" for number in range(4)]
    trainer, plan = select_with_towers(
        tmp_path, make=make, targets=targets, num_layers=1, candidates=decoder, unselected=unselected
    )
    assert (plan.selected, plan.outside) == (["decoder.3"], [])
    assert len(plan.modules) == 4, "attention to itself and to the encoder"
    left = find_lora_modules(trainer.model.get_base_model())
    assert len(left) == (4 if unselected == "remove" else 24)
    before = {name: p.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(before) == 2 * 4
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert all(not torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.trains
def test_a_plan_without_towers_is_applied_again_and_on_resume(tmp_path):
    trainer, plan = select_with_towers(tmp_path, outside_layers="remove", num_layers=1)
    checkpoint = tmp_path / "checkpoint-2"
    trainer.train()
    for resume, settings in ((str(checkpoint), {}), (None, {"plan": str(plan_path(tmp_path))})):
        again, plan_again = select_with_towers(tmp_path / "again", resume=resume, **settings)
        assert set(find_lora_modules(again.model.get_base_model())) == set(plan.modules)
        assert (plan_again.outside_layers, plan_again.outside) == ("remove", plan.outside)
        with pytest.raises(LayerselError, match=r"outside_layers: 'keep' is not the 'remove' that it was made with"):
            select_with_towers(tmp_path / "again", resume=resume, outside_layers="keep", **settings)


@pytest.mark.trains
def test_a_plan_with_towers_needs_them_in_the_model_and_in_the_checkpoint(tmp_path):
    trainer, plan = select_with_towers(tmp_path, num_layers=1)
    given = {"plan": str(plan_path(tmp_path))}
    assert select_with_towers(tmp_path / "again", **given)[1].outside == plan.outside
    language_model = r".*language_model.*\.(q_proj|v_proj)"
    with pytest.raises(LayerselError, match=r"the model has no LoRA on model\.vision_tower.* \(8 such modules\)"):
        select_with_towers(tmp_path / "again", targets=language_model, **given)
    with pytest.raises(LayerselError, match=r"LoRA on model\.multi_modal_projector\.linear_1, unknown to the plan"):
        select_with_towers(tmp_path / "again", targets=["q_proj", "v_proj", "linear_1"], **given)
    other, _ = select_with_towers(tmp_path / "other", outside_layers="remove", num_layers=1)
    for each in (other, trainer):
        each.train()
    checkpoint = tmp_path / "other" / "checkpoint-2"
    write_plan(plan, plan_path(checkpoint))
    with pytest.raises(LayerselError, match=r"they differ in model\.vision_tower.* \(8 such modules\)"):
        check_checkpoint(plan, checkpoint)
    with pytest.raises(LayerselError, match=r"layersel/plan\.json is not the one that the checkpoint was written with"):
        select_with_towers(tmp_path / "again", resume=str(checkpoint))
    select_with_towers(tmp_path / "again", resume=str(tmp_path / "checkpoint-2"))


@pytest.mark.trains
@pytest.mark.parametrize("towers", ["keep", "remove"])
def test_a_search_trains_lora_outside_of_the_layers_without_a_gate_if_the_run_does(tmp_path, towers):
    model = make_lora(make_small_llama(), ["q_proj", "lm_head"])
    trainer = make_trainer(model, tmp_path)
    seen = []

    def training_step(*args, **kwargs):
        seen.append({name: p.abs().sum().item() for name, p in model.named_parameters() if "lm_head.lora_B" in name})
        return Trainer.training_step(trainer, *args, **kwargs)

    trainer.training_step = training_step
    settings = SelectionConfig(
        method="flexora", ratio=0.5, outside_layers=towers, flexora={"steps": 3, "val_samples": 4}
    )
    plan = prepare_trainer(trainer, LayerselConfig(selection=settings))
    assert plan.outside_layers == towers
    assert plan.outside[0].modules == ["lm_head"]
    assert len(seen) == 3
    assert [bool(step and sum(step.values()) > 0) for step in seen] == [False, *[towers == "keep"] * 2]
    assert "lm_head" not in "".join(plan.modules)
    head = model.get_base_model().lm_head
    assert not isinstance(head, LoraLayer) if towers == "remove" else not head.lora_B["default"].weight.any()


@pytest.mark.trains
def test_rank_moves_in_both_sides_of_an_encoder_decoder_model(tmp_path):
    model = make_lora(make_t5(), ["q", "v"])
    trainer = make_trainer(model, tmp_path, max_steps=10)
    prepare_trainer(trainer, LayerselConfig(l1ra={"update_ratio": 0.2}))
    trainer.train()
    ranks = RankHistory.read(tmp_path).ranks
    assert {side: sum(name.startswith(side) for name in ranks[10]) for side in ("encoder", "decoder")} == {
        "encoder": 8,
        "decoder": 16,
    }
    assert sum(ranks[4].values()) <= sum(ranks[0].values()) == 24 * 4
    trainer.save_model(str(tmp_path / "adapter"))
    rebuilt = PeftModel.from_pretrained(make_t5(), tmp_path / "adapter").eval()
    base = {name: p for name, p in model.get_base_model().named_parameters() if "lora" not in name}
    for name, parameter in rebuilt.get_base_model().named_parameters():
        if "lora" not in name:
            parameter.data = base[name].data
    batch = {"input_ids": torch.arange(3, 20)[None], "decoder_input_ids": torch.arange(3, 9)[None]}
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(**batch).logits, model.eval()(**batch).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.trains
@pytest.mark.parametrize("towers", [None, "keep", "remove"])
def test_rank_moves_outside_of_the_layers_too_where_lora_is_kept_there(tmp_path, towers):
    model = make_lora(make_small_llama(), ["q_proj", "lm_head"])
    trainer = make_trainer(model, tmp_path, max_steps=10)
    selection = SelectionConfig(method="last", num_layers=2, outside_layers=towers) if towers else None
    prepare_trainer(trainer, LayerselConfig(selection=selection, l1ra={"update_ratio": 0.2}))
    trainer.train()
    ranks = RankHistory.read(tmp_path).ranks[10]
    assert ("lm_head" in ranks) == (towers != "remove")
    assert len(ranks) == (6 if towers is None else 2) + (towers != "remove")


RANKED = {
    "gradient": {"method": "gradient"},
    "gradient, by group": {"method": "gradient", "granularity": "group", "min_rank": 1},
    "gradient, by layer, half of the budget": {"method": "gradient", "granularity": "layer", "budget": 0.5},
    "gradient, half of the modules": {"method": "gradient", "ratio": 0.5},
    "fisher, by module": {"method": "fisher", "granularity": "module", "rank_allocation": "score", "max_rank": 9},
    "cka, by score": {"method": "cka", "rank_allocation": "score"},
    "cka, matched": {"method": "cka", "rank_allocation": "match"},
    "random groups, matched": {"method": "random", "granularity": "group", "rank_allocation": "match"},
    "last, matched": {"method": "last", "rank_allocation": "match", "budget_parameters": 2500},
}


@pytest.mark.trains
@pytest.mark.parametrize("kind", RANKED)
def test_ranks_spend_the_budget_and_stock_peft_computes_with_them(tmp_path, kind):
    settings = RANKED[kind]
    trainer, plan = select(tmp_path, rows=make_rows(64), **settings)
    lora = find_lora_modules(trainer.model.get_base_model())
    assert {name: module.r["default"] for name, module in lora.items()} == plan.ranks
    assert {module.scaling["default"] for module in lora.values()} == {2.0}
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    assert trained == plan.budget.spent <= plan.budget.allowed
    assert max(plan.ranks.values()) <= settings.get("max_rank", 16)
    if settings.get("rank_allocation") == "match":
        assert max(plan.ranks.values()) - min(plan.ranks.values()) <= 1
        assert plan.budget.allowed - plan.budget.spent < 3 * 96
    trainer.train()
    trainer.save_adapter(tmp_path / "adapter")
    ids = torch.arange(20)[None]
    expected = trainer.model.eval()(input_ids=ids).logits
    stock = PeftModel.from_pretrained(make_small_llama(), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(stock(input_ids=ids).logits, expected, atol=1e-5, rtol=0)
    assert float((expected - make_small_llama().eval()(input_ids=ids).logits).abs().max()) > 1e-3


def test_what_is_not_given_by_gains_above_noise_is_given_evenly_with_a_warning(tmp_path, caplog):
    # Two rows share so little that the noise is soon reached.
    _, plan = select(tmp_path, method="gradient", num_samples=2, granularity="layer", budget=3.5)
    assert plan.budget.even > plan.budget.allowed / 2
    assert plan.budget.allowed - plan.budget.spent < plan.budget.lora / 4 / 4, "less than a rank of a layer"
    assert "is given to all layers alike, because method gradient finds no gain there" in caplog.text


def test_a_module_begins_as_it_would_with_that_rank_from_the_start(tmp_path):
    trainer, plan = select(tmp_path, method="gradient")
    for name, module in find_lora_modules(trainer.model.get_base_model()).items():
        down = module.lora_A["default"].weight
        expected = [draw_row(down[i], True, 3, name, i, plan.ranks[name]) for i in range(plan.ranks[name])]
        torch.testing.assert_close(down, torch.stack(expected), atol=0, rtol=0)
        assert not module.lora_B["default"].weight.any()


def test_a_budget_that_buys_nothing_is_refused(tmp_path):
    with pytest.raises(LayerselError, match="budget: 65 parameters do not pay for rank 1 in all units"):
        select(tmp_path, method="cka", rank_allocation="match", budget_parameters=65)


def test_a_trained_adapter_keeps_its_ranks(tmp_path):
    with pytest.raises(
        LayerselError, match="rank_allocation: 'score' gives modules new ranks, and lora_model_dir continues"
    ):
        select(tmp_path, method="gradient", unselected="freeze", continues_adapter=True)


@pytest.mark.parametrize("granularity", ["group", "module"])
def test_a_choice_without_scores_can_be_used_again(tmp_path, granularity):
    _, plan = select(tmp_path, method="random", granularity=granularity, rank_allocation="match")
    _, again = select(tmp_path, method="random", plan=str(plan_path(tmp_path)))
    assert (again.modules, again.ranks) == (plan.modules, plan.ranks)


def give_plan(folder, model, continues_adapter: bool = False, **blocks):
    """Prepare a trainer of ``model`` with the plan in ``folder``."""
    selection = SelectionConfig(method="gradient", plan=str(plan_path(folder)))
    trainer = make_trainer(model, folder)
    block = LayerselConfig(selection=selection, **blocks)
    return trainer, prepare_trainer(trainer, block, continues_adapter=continues_adapter)


@pytest.mark.parametrize("blocks", [{}, {"l1ra": {"max_rank": 16}}])
def test_a_plan_with_other_ranks_does_not_touch_a_trained_adapter(tmp_path, blocks):
    select(tmp_path, method="gradient")
    model = make_lora(make_small_llama())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    with pytest.raises(LayerselError, match=r"lora_model_dir: the adapter has rank 4 in .*, but the plan says"):
        give_plan(tmp_path, model, continues_adapter=True, **blocks)


def test_a_plan_with_ranks_refuses_what_cannot_be_drawn_again(tmp_path):
    select(tmp_path, method="gradient")
    with pytest.raises(LayerselError, match=r"'orthogonal' cannot be combined with .*selection.rank_allocation: score"):
        give_plan(tmp_path, make_lora(make_small_llama(), init_lora_weights="orthogonal"))


def test_a_module_that_l1ra_grew_begins_with_rows_of_the_usual_size(tmp_path):
    select(tmp_path, method="gradient")
    model = make_lora(make_small_llama(), init_lora_weights="gaussian")
    trainer, plan = give_plan(tmp_path, model, l1ra={"max_rank": 16})
    for name, rank in plan.ranks.items():
        down = trainer.model.get_base_model().get_submodule(name).lora_A["default"].weight
        torch.testing.assert_close(down[0], draw_row(down[0], "gaussian", 3, name, 0, 4), atol=0, rtol=0)
        assert not down[rank:].any()


def test_a_budget_below_the_best_offer_is_named(tmp_path):
    with pytest.raises(LayerselError, match="budget: 65 parameters do not pay for rank 1"):
        select(tmp_path, method="gradient", budget_parameters=65, granularity="layer")


def test_a_floor_above_the_highest_rank_is_refused(tmp_path):
    with pytest.raises(LayerselError, match="min_rank: 20 is more than the highest rank, 16"):
        select(tmp_path, method="gradient", min_rank=20)


@pytest.mark.parametrize("rank", ["same", "score"])
def test_lora_on_a_convolution_is_refused_where_rank_is_given_by_gradients(tmp_path, rank):
    base = make_small_llama()
    base.model.layers[2].mlp.mixer = torch.nn.Conv1d(32, 32, 3)
    settings = LayerselConfig(selection=SelectionConfig(method="gradient", num_samples=8, rank_allocation=rank))
    with pytest.raises(LayerselError, match=r"model.layers.2.mlp.mixer is a Conv1d, whose LoRA layersel.selection"):
        prepare_trainer(make_trainer(make_lora(base, ["q_proj", "mixer"]), tmp_path), settings)


SIZES = {"q_proj": 64, "v_proj": 48, "down_proj": 80}  # parameters of one rank: inputs and outputs
PLAIN = 6 * 4 * sum(SIZES.values())


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "last", "ratio": 0.5},
        {"method": "last", "ratio": 0.5, "unselected": "freeze"},
        {"method": "last", "ratio": 0.5, "candidates": [0, 1, 2, 3]},
        {"method": "random", "num_units": 5, "granularity": "module"},
        {"method": "last", "ratio": 0.5, "rank_allocation": "match", "budget": 0.9},
    ],
    ids=str,
)
def test_the_parameters_that_train_are_counted_next_to_those_of_plain_lora(tmp_path, settings):
    trainer, plan = select(tmp_path, **settings)
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert plan.parameters.model_dump() == {"plain": PLAIN, "trained": trained}
    assert read_plan(plan_path(tmp_path)).parameters == plan.parameters
    if plan.budget:
        assert plan.budget.spent == trained


def test_room_for_rank_and_weights_that_are_not_of_lora_do_not_count(tmp_path):
    from axolotl_layersel.config.l1ra import L1RAConfig

    model = make_lora(make_small_llama(), modules_to_save=["lm_head"])
    trainer = make_trainer(model, tmp_path, max_steps=12)
    settings = SelectionConfig(method="last", ratio=0.5)
    plan = prepare_trainer(trainer, LayerselConfig(selection=settings, l1ra=L1RAConfig(max_rank=16)))
    assert plan.parameters.model_dump() == {"plain": PLAIN, "trained": PLAIN // 2}
