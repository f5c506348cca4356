"""The lowest layer that trains if a step has a limit of time."""

import pytest
import torch
from helpers.models import make_lora, make_rows, make_small_llama, make_t5, make_trainer
from hypothesis import given
from hypothesis import strategies as st

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.paths import plan_path
from axolotl_layersel.config.l1ra import L1RAConfig
from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.config.selection import SelectionConfig
from axolotl_layersel.lora.backward_end import check_limit
from axolotl_layersel.lora.layers import find_layer_stack
from axolotl_layersel.lora.step_time import count_work, find_relative
from axolotl_layersel.selection.plan import Plan
from axolotl_layersel.selection.plan_file import read_plan
from axolotl_layersel.selection.time_limit import choose_start, find_promise
from axolotl_layersel.training.prepare import prepare_trainer

SHARES = {0: 1.0, 1: 0.9, 2: 0.8, 3: 0.7, 4: 0.6}


@pytest.mark.parametrize(
    ("promises", "time", "start"),
    [
        ([10, 10, 10, 10, 10], 0.85, 4),  # the same gain in the shortest time
        ([10, 9, 8, 7, 6], 0.85, 2),  # a tie, which the lowest layer wins
        ([10, 9, 8, 6, 6], 0.75, 4),
        ([10, 9, 8, 7, 1], 0.75, 3),
        ([10, 9, 1, 2, 1], 0.95, 1),
        ([0, 0, 0, 0, 0], 0.75, 3),  # nothing is promised anywhere
    ],
)
def test_the_layer_with_the_highest_gain_a_second_is_chosen(promises, time, start):
    assert choose_start(SHARES, dict(enumerate(promises)), time, range(5)) == start


@given(st.lists(st.tuples(st.integers(1, 99), st.integers(0, 50)), min_size=1, max_size=9), st.integers(1, 99))
def test_no_other_layer_within_the_limit_gains_more_a_second(values, limit):
    shares = {place: share / 100 for place, (share, _) in enumerate(values)}
    promises = {place: float(promise) for place, (_, promise) in enumerate(values)}
    within = [place for place in shares if shares[place] <= limit / 100]
    if not within:
        with pytest.raises(LayerselError, match=f"takes {min(shares.values()):.3f} of plain LoRA's time"):
            choose_start(shares, promises, limit / 100, range(9))
        return
    start = choose_start(shares, promises, limit / 100, range(9))
    assert start in within
    for other in within:
        gain, found = promises[other] / shares[other], promises[start] / shares[start]
        assert gain < found or (gain == found and other >= start)


def test_a_limit_that_no_layer_reaches_is_refused_with_one_that_a_layer_reaches():
    shares = {0: 1.0, 1: 0.7321}
    with pytest.raises(LayerselError, match=r"time: 0.1 is less .* from layer 1 upwards it takes 0.732 .* Set 0.74 or"):
        choose_start(shares, {0: 1.0, 1: 1.0}, 0.1, [0, 1])
    assert choose_start(shares, {0: 1.0, 1: 1.0}, 0.74, [0, 1]) == 1
    with pytest.raises(LayerselError, match="Remove the key"):
        choose_start({0: 1.2}, {0: 1.0}, 0.9, [0])


def test_a_promise_is_the_sum_of_the_gains_that_are_bought():
    gains = {"a": [3.0, 1.0, 2.0], "b": [5.0], "c": [4.0, 4.0]}
    assert find_promise(gains, {"a": 3, "b": 2, "c": 0}) == 3 + 1 + 1 + 5


def choose(folder, layers: int = 6, model=None, **settings) -> tuple[Plan, torch.nn.Module]:
    """Choose by ``gradient`` with a limit, and return the plan and the model."""
    model = model or make_lora(make_small_llama(layers, vocab_size=97))
    trainer = make_trainer(model, folder, make_rows(16))
    block = SelectionConfig(method="gradient", **{"num_samples": 16, "time": 0.75, **settings})
    plan = prepare_trainer(trainer, LayerselConfig(selection=block))
    return plan, model


@pytest.mark.trains
@pytest.mark.parametrize("granularity", ["module", "group", "layer"])
def test_ranks_are_in_the_layers_within_the_limit_and_have_the_whole_budget(tmp_path, granularity):
    plan, model = choose(tmp_path, granularity=granularity)
    end, step = plan.backward_end, plan.step_time
    assert end == plan.selected[0] > 0
    assert 0 < step.share <= 0.75 and 0 < step.gain <= 1 and not step.checkpointing
    assert step.tokens == pytest.approx(sum(len(row["input_ids"]) for row in make_rows(16)) / 16)
    assert plan.budget.spent > 0.8 * plan.budget.lora, "the budget is that of LoRA in all layers"
    lowest = min(int(name.split(".")[2]) for name in plan.ranks)
    assert lowest == end
    assert not any(
        ".lora_" in name and f"layers.{low}." in name for name, _ in model.named_parameters() for low in range(end)
    )
    assert read_plan(plan_path(tmp_path)) == plan


@pytest.mark.trains
def test_ranks_are_those_of_a_choice_among_the_layers_from_the_lowest_upwards_at_the_same_budget(tmp_path):
    limited, _ = choose(tmp_path / "limited", max_rank=30)
    chosen = list(range(limited.backward_end, 6))
    budget = limited.budget.allowed
    among, _ = choose(tmp_path / "among", max_rank=30, time=None, candidates=chosen, budget_parameters=budget)
    assert among.ranks == limited.ranks
    model = make_lora(make_small_llama(6))
    stack, base = find_layer_stack(model), model.get_base_model()
    modules = {name: base.get_submodule(name) for name in stack.list_modules(range(6))}
    costs = {name: module.in_features + module.out_features for name, module in modules.items()}
    work = count_work(base, stack, {name: 4 * cost for name, cost in costs.items()}, limited.step_time.tokens)
    lora = [
        sum(2 * limited.ranks.get(name, 0) * costs[name] for name in stack.lora_modules[place]) for place in range(6)
    ]
    share = find_relative(work, limited.backward_end, set(range(6)), checkpointing=False, lora=lora)
    assert limited.step_time.share == pytest.approx(share)


@pytest.mark.trains
def test_frozen_lora_below_leaves_the_choice_and_costs_a_forward_pass(tmp_path):
    removed, _ = choose(tmp_path / "removed")
    frozen, model = choose(tmp_path / "frozen", unselected="freeze")
    assert frozen.ranks == removed.ranks and frozen.backward_end == removed.backward_end
    assert removed.step_time.share < frozen.step_time.share < 0.75
    below = [p for name, p in model.named_parameters() if ".lora_" in name and "layers.0." in name]
    assert below and not any(parameter.requires_grad for parameter in below)


@pytest.mark.trains
def test_rank_can_move_from_there_within_the_default_room(tmp_path):
    trainer = make_trainer(make_lora(make_small_llama(6)), tmp_path, make_rows(16), max_steps=20)
    block = SelectionConfig(method="gradient", num_samples=16, time=0.75)
    plan = prepare_trainer(trainer, LayerselConfig(selection=block, l1ra=L1RAConfig()))
    assert plan.step_time.share <= 0.75
    ranks = [down.out_features for name, down in trainer.model.named_modules() if name.endswith("lora_A.default")]
    assert set(ranks) == {16} and 8 < max(plan.ranks.values()) <= 16 > min(plan.ranks.values())


@pytest.mark.trains
def test_a_plan_that_is_used_again_keeps_the_time_of_a_step(tmp_path):
    made, _ = choose(tmp_path / "made")
    for time in (0.75, None):
        again, _ = choose(tmp_path / "again", num_samples=None, plan=str(plan_path(tmp_path / "made")), time=time)
        assert again == made
    with pytest.raises(LayerselError, match=r"selection.time: 0.8 is not the 0.75 that it was made with"):
        choose(tmp_path / "again", num_samples=None, plan=str(plan_path(tmp_path / "made")), time=0.8)


@pytest.mark.trains
def test_too_short_a_step_is_refused_with_the_shortest_one(tmp_path):
    with pytest.raises(LayerselError, match=r"time: 0.1 is less than .* from layer 5 upwards it takes 0\.\d+ of plain"):
        choose(tmp_path, time=0.1)


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (lambda: make_lora(make_t5(), ["q", "v"]), "T5ForConditionalGeneration has an encoder and a decoder"),
        (
            lambda: make_lora(make_small_llama(), modules_to_save=["embed_tokens"]),
            r"\(model.embed_tokens.modules_to_save.default.weight\), because every backward pass must go down",
        ),
        (
            lambda: make_lora(make_small_llama(), ["embed_tokens", "q_proj"]),
            r"embed_tokens.* and 1 more\), .* Set `outside_layers: remove`, or remove `time`",
        ),
    ],
)
def test_a_model_in_which_no_layer_saves_time_is_refused(model, what):
    model = model()
    settings = SelectionConfig(method="gradient", time=0.75).resolve(run_seed=0)
    with pytest.raises(LayerselError, match=rf"selection.time: 0.75 .*{what}"):
        check_limit(model, find_layer_stack(model), settings)


def test_lora_outside_of_the_layers_that_is_removed_saves_time():
    model = make_lora(make_small_llama(), ["embed_tokens", "q_proj"])
    settings = SelectionConfig(method="gradient", time=0.75, outside_layers="remove").resolve(run_seed=0)
    check_limit(model, find_layer_stack(model), settings, removed=["model.embed_tokens"])
    head = make_lora(make_small_llama(), modules_to_save=["lm_head"])
    check_limit(head, find_layer_stack(head), settings)
