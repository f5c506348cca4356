"""A search has converged if its gates no longer move in one direction."""

import math
import random
from collections.abc import Callable

import pytest

from axolotl_layersel.selection.gate_history import GateHistory
from axolotl_layersel.selection.methods.flexora.convergence import find_drift, find_straightness, still_move

DRAW = random.Random(5)
ENDS = [DRAW.gauss(0, 1) for _ in range(24)]


def make_history(course: Callable[[float, float], float], steps: int, inner_steps: int = 1) -> GateHistory:
    """Return a history in which each gate follows ``course(end, share of the search)`` at every gate step."""
    DRAW.seed(6)  # the same noise, whichever tests run before
    history, gates = GateHistory([str(gate) for gate in range(len(ENDS))]), [0.0] * len(ENDS)
    for step in range(1, steps + 1):
        moves = step % inner_steps == 0
        gates = [course(end, step / steps) for end in ENDS] if moves else gates
        history.add(1.0, 2.0 if moves else None, gates)
    return history


def approach(within: float, noise: float = 0.0) -> Callable[[float, float], float]:
    return lambda end, share: end * (1 - math.exp(-share / within)) + DRAW.gauss(0, noise)


def climb(noise: float) -> Callable[[float, float], float]:
    return lambda end, share: end * share + DRAW.gauss(0, noise)


COURSES = {
    "straight": (climb(0), True),
    "straight, with some noise": (climb(0.0005), True),
    "slowing down too late": (approach(1.0), True),
    "converged": (approach(0.1), False),
    "converged late": (approach(0.25), False),
    "converged, with noise": (approach(0.1, noise=0.05), False),
    "noise alone": (lambda end, share: DRAW.gauss(0, 0.05), False),
    "still": (lambda end, share: 0.0, False),
}


@pytest.mark.parametrize("steps", [16, 200])
@pytest.mark.parametrize("course", COURSES)
def test_gates_that_still_move_in_one_direction_are_told_from_others(course, steps):
    moves, expected = COURSES[course]
    assert still_move(make_history(moves, steps)) == expected


def test_steps_without_a_gate_step_do_not_count():
    history = make_history(climb(0), 200, inner_steps=10)
    assert still_move(history)
    assert still_move(make_history(climb(0), 20)) and not still_move(make_history(approach(0.1), 200, inner_steps=10))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_search_of_fewer_steps_than_quarters_has_not_converged(steps):
    assert still_move(make_history(approach(0.01), steps))


def test_the_numbers_of_the_rule_are_those_of_its_description():
    straight = make_history(climb(0), 1000).gates
    assert find_drift(straight) == pytest.approx(0.29, abs=0.005)
    assert find_straightness(straight) == pytest.approx(1)
    assert find_drift(make_history(approach(1 / 3), 1000).gates) == pytest.approx(0.09, abs=0.005)
