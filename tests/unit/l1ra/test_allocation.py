from hypothesis import given
from hypothesis import strategies as st

from axolotl_layersel.l1ra.allocation import ModuleState, Moves, allocate, prune

THRESHOLD = 1e-10
# Gates that are clamped, equal, tiny and ordinary.
GATE = st.sampled_from([0.0, 1e-12, 1e-11, 0.3, 1.0]) | st.floats(0, 1, allow_subnormal=False)


COSTS = st.integers(1, 9)


@st.composite
def rounds(draw, costs=COSTS) -> dict:
    """Draw what a round starts from: modules within their limits, a pool, and the settings."""
    capacity = draw(st.integers(1, 6))
    min_rank = draw(st.integers(1, capacity))
    modules = {}
    for name in draw(st.lists(st.text("abcdef.0123", min_size=1, max_size=4), min_size=1, max_size=8, unique=True)):
        slots = draw(st.sets(st.integers(0, capacity - 1), min_size=min_rank, max_size=capacity))
        gates = {slot: draw(GATE) for slot in sorted(slots)}
        modules[name] = ModuleState(gates=gates, cost=draw(costs), capacity=capacity)
    return {
        "modules": modules,
        "pool": draw(st.integers(0, 30)),
        "threshold": THRESHOLD,
        "min_rank": min_rank,
        "exclude_pruned": draw(st.booleans()),
    }


def ranks_after(modules: dict[str, ModuleState], moves: Moves) -> dict[str, int]:
    return {
        name: len(module.gates) - len(moves.pruned.get(name, ())) + len(moves.added.get(name, ()))
        for name, module in modules.items()
    }


def used(modules: dict[str, ModuleState], ranks: dict[str, int]) -> int:
    return sum(modules[name].cost * rank for name, rank in ranks.items())


@given(rounds())
def test_the_budget_is_neither_exceeded_nor_lost(start):
    modules = start["modules"]
    before = {name: len(module.gates) for name, module in modules.items()}
    moves = allocate(**start)
    assert moves.pool >= 0
    assert used(modules, ranks_after(modules, moves)) + moves.pool == used(modules, before) + start["pool"]


@given(rounds(costs=st.just(1)))
def test_a_budget_of_rank_conserves_ranks_and_pool(start):
    modules = start["modules"]
    moves = allocate(**start)
    assert sum(ranks_after(modules, moves).values()) + moves.pool == start["pool"] + sum(
        len(module.gates) for module in modules.values()
    )


@given(rounds())
def test_every_module_stays_within_its_limits(start):
    for name, rank in ranks_after(start["modules"], allocate(**start)).items():
        assert start["min_rank"] <= rank <= start["modules"][name].capacity


@given(rounds())
def test_only_active_components_below_the_threshold_are_pruned_and_only_free_slots_are_filled(start):
    moves = allocate(**start)
    for name, slots in moves.pruned.items():
        assert all(start["modules"][name].gates[slot] < THRESHOLD for slot in slots)
    for name, slots in moves.added.items():
        kept = set(start["modules"][name].gates) - set(moves.pruned.get(name, ()))
        assert not kept & set(slots) and list(slots) == sorted(set(slots))
        assert max(slots) < start["modules"][name].capacity


@given(rounds())
def test_the_same_round_gives_the_same_moves_in_whatever_order_modules_come(start):
    backwards = dict(reversed(start["modules"].items()))
    moves = allocate(**start)
    assert allocate(**start) == moves
    again = allocate(**{**start, "modules": backwards})
    assert (again.pruned, again.added, again.pool) == (moves.pruned, moves.added, moves.pool)


@given(rounds(), st.data())
def test_renaming_modules_of_different_gates_renames_the_moves(start, data):
    modules = start["modules"]
    keys = [(min(m.gates.values()), len(m.gates)) for m in modules.values()]
    if len(set(keys)) < len(keys) or prune(modules, THRESHOLD, start["min_rank"]):
        # Pruning may make modules equal that were not; then the names decide.
        return
    renamed = dict(zip(modules, data.draw(st.permutations(list(modules)))))
    moves = allocate(**start)
    again = allocate(**{**start, "modules": {renamed[name]: module for name, module in modules.items()}})
    assert again.added == {renamed[name]: slots for name, slots in moves.added.items()}


@given(rounds())
def test_nobody_gains_in_the_round_in_which_it_lost(start):
    moves = allocate(**{**start, "exclude_pruned": True})
    assert not set(moves.pruned) & set(moves.added)


@given(rounds())
def test_rank_waits_only_where_nobody_can_take_it(start):
    moves = allocate(**start)
    ranks = ranks_after(start["modules"], moves)
    for name, module in start["modules"].items():
        if not (start["exclude_pruned"] and name in moves.pruned):
            assert ranks[name] == module.capacity or module.cost > moves.pool


@given(rounds())
def test_without_reassigning_the_adapter_only_shrinks(start):
    moves = allocate(**start, reassign=False)
    assert moves.added == {}
    assert moves.pool == start["pool"]
    assert moves.pruned == allocate(**start).pruned


def module(*gates: float, capacity: int = 4, cost: int = 1) -> ModuleState:
    return ModuleState(gates=dict(enumerate(gates)), cost=cost, capacity=capacity)


def test_freed_rank_goes_round_in_the_order_of_the_smallest_gate():
    modules = {"a": module(0.0, 0.0, 0.0, 0.5), "b": module(0.9, 0.8), "c": module(0.9, 0.2), "d": module(1.0, 0.1)}
    moves = allocate(modules, pool=0, threshold=THRESHOLD, min_rank=1)
    assert moves == Moves(pruned={"a": (0, 1, 2)}, added={"b": (2,), "c": (2,), "d": (2,)}, pool=0)
    moves = allocate(modules, pool=2, threshold=THRESHOLD, min_rank=1)
    assert moves.added == {"b": (2, 3), "c": (2, 3), "d": (2,)}


def test_of_equal_modules_the_smaller_one_gains_first():
    modules = {"a": module(1.0, 1.0), "b": module(1.0)}
    assert allocate(modules, pool=1, threshold=THRESHOLD, min_rank=1).added == {"b": (1,)}


def test_when_every_module_lost_rank_it_waits_in_the_pool_for_the_next_round():
    modules = {"a": module(0.0, 0.5), "b": module(0.0, 0.5)}
    moves = allocate(modules, pool=0, threshold=THRESHOLD, min_rank=1)
    assert (moves.added, moves.pool) == ({}, 2)
    left = {name: ModuleState({1: 0.5}, cost=1, capacity=4) for name in modules}
    assert allocate(left, moves.pool, THRESHOLD, 1).added == {"a": (0,), "b": (0,)}


def test_a_module_keeps_its_least_rank_and_the_larger_of_its_gates():
    assert prune({"a": module(0.0, 1e-12, 1e-11)}, THRESHOLD, min_rank=2) == {"a": (0,)}
    assert prune({"a": module(0.0, 0.0)}, THRESHOLD, min_rank=1) == {"a": (1,)}
    assert prune({"a": module(0.0)}, THRESHOLD, min_rank=1) == {}


def test_a_budget_of_parameters_passes_wide_modules_by_that_it_cannot_pay():
    modules = {"wide": module(1.0, cost=5), "narrow": module(0.5, cost=2), "gone": module(0.0, 0.1, cost=4)}
    moves = allocate(modules, pool=0, threshold=THRESHOLD, min_rank=1)
    assert (moves.added, moves.pool) == ({"narrow": (1, 2)}, 0)
