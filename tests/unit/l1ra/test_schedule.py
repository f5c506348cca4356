import pytest
from hypothesis import given
from hypothesis import strategies as st

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.l1ra import L1RAConfig
from axolotl_layersel.config.schedule import (
    check_run_length,
    find_update_steps,
    plan_updates,
    resolve_gate_lr,
    resolve_lambda,
)


def test_updates_come_at_equal_intervals_but_not_in_the_last_one():
    assert find_update_steps(200, 0.1, 0.0) == list(range(20, 200, 20))
    assert find_update_steps(535, 0.05, 0.0) == list(range(27, 509, 27))
    assert find_update_steps(10, 0.2, 0.0) == [2, 4, 6, 8]


def test_floating_point_makes_no_interval_longer():
    # 0.1 × 30 is 3.0000000000000004
    assert find_update_steps(30, 0.1, 0.0)[0] == 3


def test_there_is_no_update_before_the_warmup_is_over():
    assert find_update_steps(100, 0.1, 0.3) == [30, 40, 50, 60, 70, 80, 90]


@given(st.integers(1, 3000), st.floats(0.001, 1), st.floats(0, 0.99))
def test_whatever_is_added_has_a_whole_interval_to_train(steps, update_ratio, warmup_ratio):
    updates = find_update_steps(steps, update_ratio, warmup_ratio)
    interval = find_update_steps(steps, update_ratio, 0.0)[:1]
    assert all(step >= warmup_ratio * steps - 1e-6 and step % interval[0] == 0 for step in updates)
    assert not updates or steps - updates[-1] >= interval[0] >= update_ratio * steps - 1e-6


def test_a_run_too_short_for_two_updates_is_refused_with_its_length():
    with pytest.raises(LayerselError, match=r"update_ratio: 0.3 .* leaves 1 rank updates in a run of 7 optimizer"):
        check_run_length(7, L1RAConfig(update_ratio=0.3))
    with pytest.raises(
        LayerselError, match=r"last_update_ratio: 0.5\) leaves 1 rank updates in .*, or raise last_update_ratio\."
    ):
        check_run_length(3, L1RAConfig(last_update_ratio=0.5))
    with pytest.raises(LayerselError, match=r"\(warmup_ratio: 0.0\) leaves 1 .* 2 optimizer .* or warmup_ratio\."):
        check_run_length(2, L1RAConfig())


def test_a_default_end_of_the_updates_is_as_late_as_it_takes_for_two():
    assert plan_updates(3, L1RAConfig()) == [1, 2]
    assert plan_updates(100, L1RAConfig(warmup_ratio=0.6)) == [60, 70]
    assert plan_updates(100, L1RAConfig()) == [10, 20, 30, 40, 50]
    assert plan_updates(100, L1RAConfig(last_update_ratio=0.1)) == [10]
    assert plan_updates(100, L1RAConfig(rule="pressure")) == list(range(10, 100, 10))


def test_auto_lambda_takes_a_gate_to_zero_in_a_third_of_the_run():
    assert resolve_lambda("auto", 0.02, 200) == pytest.approx(0.75)
    assert resolve_lambda("auto", 0.02, 2000) * 0.02 * 2000 == pytest.approx(3)
    assert resolve_lambda(0.005, 0.02, 200) == 0.005


def test_gates_move_faster_in_short_runs_where_they_would_all_fall_to_zero():
    assert resolve_gate_lr(None, 200) == resolve_gate_lr(None, 5000) == 0.02
    assert resolve_gate_lr(None, 20) == pytest.approx(0.2)
    assert resolve_lambda("auto", resolve_gate_lr(None, 20), 20) == pytest.approx(0.75)
    assert resolve_gate_lr(0.02, 20) == 0.02
