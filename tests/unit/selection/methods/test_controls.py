import pytest
from helpers.models import make_lora, make_selection, make_small_llama, make_trainer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from axolotl_layersel.config.methods import METHODS


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    size = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    return make_trainer(make_lora(make_small_llama(24, **size)), tmp_path_factory.mktemp("controls"))


def choose(trainer, method: str, **values) -> list[int]:
    choice = METHODS[method].load()(make_selection(trainer, method, **values))
    assert choice.scores == [None] * 24
    return list(dict.fromkeys(int(name.split(".")[2]) for name in choice.modules))


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(candidates=st.sets(st.integers(0, 23), min_size=1), seed=st.integers(0, 10**6), data=st.data())
def test_random_layers_are_candidates_and_come_from_the_seed(trainer, candidates, seed, data):
    keep = data.draw(st.integers(1, len(candidates)))
    values = {"num_layers": keep, "seed": seed}
    chosen = choose(trainer, "random", candidates=list(candidates), **values)
    assert chosen == sorted(set(chosen)) == choose(trainer, "random", candidates=sorted(candidates), **values)
    assert len(chosen) == keep
    assert set(chosen) <= candidates


def test_different_seeds_choose_different_layers(trainer):
    assert len({tuple(choose(trainer, "random", num_layers=8, seed=seed)) for seed in range(20)}) > 15


def test_first_and_last_take_the_ends_and_explicit_what_is_listed(trainer):
    assert choose(trainer, "first", candidates=[5, 1, 9, 3], num_layers=2) == [1, 3]
    assert choose(trainer, "last", candidates=[5, 1, 9, 3], num_layers=2) == [5, 9]
    assert choose(trainer, "explicit", layers=[3, 1]) == [1, 3]
