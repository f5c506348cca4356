"""Whether the gates of a search still move in one direction at its end.

The rule looks at the last half of the search, and at all gates together:

* Their drift is the distance between the mean gates of the last quarter and those of the quarter before, as a share of
  the distance of the former from 0, where all gates begin. Gates that climb straight from 0 drift by 29 %. Gates that
  approach their ends exponentially, within a third of the search, drift by 9 %.
* Their straightness is the distance between their values at the ends of the last half, as a share of the way that they
  went between. It is 100 % for gates that climb straight, and small for gates that tremble around a value.

They still move if the drift is above ``DRIFT`` and the straightness above ``STRAIGHTNESS``.
"""

from collections.abc import Sequence
from itertools import pairwise

from axolotl_layersel.selection.gate_history import GateHistory

DRIFT = 0.10
STRAIGHTNESS = 0.5
LEAST = 4  # gate steps, one for each quarter


def still_move(history: GateHistory) -> bool:
    """Return whether the gates still move at the end, which they do in a search of less than ``LEAST`` gate steps."""
    gates = [row for row, loss in zip(history.gates, history.validation_losses) if loss is not None]
    if len(gates) < LEAST:
        return True
    return find_drift(gates) > DRIFT and find_straightness(gates) > STRAIGHTNESS


def find_drift(gates: Sequence[Sequence[float]]) -> float:
    """Return the drift of gates, (steps, gates), from the third quarter of the steps to the last one."""
    quarter = len(gates) // 4
    before, last = average(gates[-2 * quarter : -quarter]), average(gates[-quarter:])
    distance = sum(map(abs, last))
    return find_distance(before, last) / distance if distance else 0.0


def find_straightness(gates: Sequence[Sequence[float]]) -> float:
    """Return the straightness of gates, (steps, gates), over the last half of the steps."""
    half = gates[-(len(gates) // 2 + 1) :]
    way = sum(find_distance(one, other) for one, other in pairwise(half))
    return find_distance(half[0], half[-1]) / way if way else 0.0


def average(gates: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean of each gate over the steps."""
    return [sum(values) / len(values) for values in zip(*gates)]


def find_distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the sum of the distances of all gates."""
    return sum(abs(a - b) for a, b in zip(one, other))
