"""Which components move by saliency, and what never happens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from axolotl_layersel.l1ra.saliency import MARGIN, ModuleWorth, find_saliency, move_rank, observe_gradient


@st.composite
def modules(draw):
    """Draw modules with components of any worth, some of them young."""
    found = {}
    for index in range(draw(st.integers(1, 6))):
        capacity = draw(st.integers(1, 8))
        used = draw(st.sets(st.integers(0, capacity - 1), min_size=1))
        young = frozenset(draw(st.sets(st.sampled_from(sorted(used)))))
        worth = {slot: draw(st.floats(0, 10, allow_subnormal=False)) for slot in sorted(used - young)}
        found[f"module {index}"] = ModuleWorth(worth, young, draw(st.integers(1, 5)), capacity)
    return found


@given(modules=modules(), pool=st.integers(0, 10), move_ratio=st.floats(0.01, 1), min_rank=st.integers(1, 3))
def test_moves_keep_the_budget_and_every_bound(modules, pool, move_ratio, min_rank):
    moves = move_rank(modules, pool, move_ratio, min_rank)
    freed = sum(modules[name].cost * len(slots) for name, slots in moves.pruned.items())
    spent = sum(modules[name].cost * len(slots) for name, slots in moves.added.items())
    assert moves.pool == pool + freed - spent >= 0
    assert freed <= move_ratio * sum(module.rank * module.cost for module in modules.values())
    assert not moves.pruned.keys() & moves.added.keys()
    for name, slots in moves.pruned.items():
        assert set(slots) <= modules[name].worth.keys(), "young components stay"
        assert modules[name].rank - len(slots) >= min_rank
    for name, slots in moves.added.items():
        module = modules[name]
        assert len(slots) == 1
        assert slots[0] not in {*module.worth, *module.young}
        assert module.rank + 1 <= module.capacity
    if moves.pruned:
        highest = max(min(modules[name].worth.values()) for name in moves.added)
        worths = [modules[name].worth[slot] for name, slots in moves.pruned.items() for slot in slots]
        assert max(worths) < MARGIN * highest


@given(modules=modules(), pool=st.integers(0, 10), factor=st.sampled_from([0.25, 4.0]))
def test_moves_depend_on_no_order_and_on_no_unit(modules, pool, factor):
    expected = move_rank(modules, pool, 0.5, 1)
    scaled = {
        name: ModuleWorth({slot: worth * factor for slot, worth in module.worth.items()}, *list_rest(module))
        for name, module in reversed(modules.items())
    }
    moves = move_rank(scaled, pool, 0.5, 1)
    assert (moves.pruned, moves.added, moves.pool) == (expected.pruned, expected.added, expected.pool)


def list_rest(module: ModuleWorth) -> tuple:
    return module.young, module.cost, module.capacity


def test_rank_goes_from_what_is_worth_least_to_where_all_is_worth_most():
    modules = {
        "idle": ModuleWorth({0: 0.1, 1: 0.01, 2: 5.0}, frozenset(), 1, 4),
        "busy": ModuleWorth({0: 4.0, 1: 3.0}, frozenset(), 1, 4),
        "middling": ModuleWorth({0: 1.0, 1: 9.0}, frozenset(), 1, 4),
        "new": ModuleWorth({0: 2.0}, frozenset({1}), 1, 4),
    }
    moves = move_rank(modules, 0, 0.12, 1)
    assert (moves.pruned, moves.added, moves.pool) == ({"idle": (1,)}, {"busy": (2,)}, 0)
    moves = move_rank(modules, 0, 0.3, 1)
    assert (moves.pruned, moves.added) == ({"idle": (0, 1)}, {"busy": (2,), "new": (2,)})


def test_nothing_moves_where_all_is_worth_about_the_same():
    modules = {str(i): ModuleWorth({0: 1.0 + i / 10, 1: 0.8}, frozenset(), 1, 4) for i in range(5)}
    moves = move_rank(modules, 0, 1.0, 1)
    assert (moves.pruned, moves.added, moves.pool) == ({}, {}, 0)


def test_a_dear_component_is_paid_for_by_several_cheap_ones_and_the_rest_waits():
    modules = {
        "cheap": ModuleWorth({0: 0.1, 1: 0.2, 2: 0.3, 3: 9.0}, frozenset(), 2, 4),
        "dear": ModuleWorth({0: 8.0}, frozenset(), 5, 4),
    }
    moves = move_rank(modules, 0, 1.0, 1)
    assert (moves.pruned, moves.added, moves.pool) == ({"cheap": (0, 1, 2)}, {"dear": (1,)}, 1)
    assert move_rank(modules, 0, 0.3, 1).added == {}  # a part of the price frees nothing


def test_saliency_is_the_mean_square_of_the_gradients_that_a_component_has_had():
    squares, steps = torch.zeros(3), torch.zeros(3, dtype=torch.int64)
    active = torch.tensor([True, True, False])
    for _ in range(7):
        observe_gradient(torch.tensor([3.0, -2.0, 5.0]), squares, steps, active)
    assert steps.tolist() == [7, 7, 0]
    assert find_saliency(squares, steps).tolist() == pytest.approx([9, 4, 0], rel=1e-5)
    squares[0], steps[0] = 0, 0  # taken out, and added anew
    observe_gradient(torch.tensor([1.0, -2.0, 5.0]), squares, steps, active)
    assert find_saliency(squares, steps).tolist() == pytest.approx([1, 4, 0], rel=1e-5)
