"""Compiled models: as many graphs as plain LoRA in the same layers, none of them again, and the same losses."""

from collections import Counter

import pytest
import torch
from helpers.models import make_lora, make_rows, make_small_llama, make_trainer
from torch._dynamo.utils import counters

from axolotl_layersel import L1RAConfig, LayerselConfig, SelectionConfig, prepare_trainer
from axolotl_layersel.l1ra.records import RankHistory

pytestmark = pytest.mark.trains

HALF = SelectionConfig(method="last", ratio=0.5)
SCORED = SelectionConfig(method="cosine", num_layers=1, num_samples=6, candidates=[1])
MOVED = L1RAConfig(update_ratio=0.2)
PRESSED = L1RAConfig(rule="pressure", update_ratio=0.2)


def train(folder, config: LayerselConfig | None, compiled: bool, layers: list[int] | None = None, **arguments):
    """Train LoRA for ten steps on rows of one length, and return the trainer and what was compiled."""
    model = make_lora(make_small_llama(2), layers_to_transform=layers)
    rows = [{key: value[:6] for key, value in row.items()} for row in make_rows(24)]
    # The graphs are the same with any backend; this one runs their operations as they are.
    compiling = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
    trainer = make_trainer(
        model, folder, rows, max_steps=10, logging_steps=1, save_strategy="no", **compiling, **arguments
    )
    torch._dynamo.reset()
    counters.clear()
    if config is not None:
        prepare_trainer(trainer, config)
    trainer.train()
    return trainer, Counter(
        {"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}
    )


def list_losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("config", "layers", "checkpointing"),
    [
        pytest.param(LayerselConfig(selection=HALF), [1], True, id="with checkpointing", marks=pytest.mark.nightly),
        pytest.param(LayerselConfig(l1ra=MOVED), None, False, id="moved rank"),
        pytest.param(LayerselConfig(selection=HALF), [1], False, id="half of the layers", marks=pytest.mark.nightly),
        pytest.param(LayerselConfig(l1ra=PRESSED), None, False, id="moved rank by pressure", marks=pytest.mark.nightly),
        pytest.param(LayerselConfig(selection=SCORED, l1ra=MOVED), [1], False, id="both", marks=pytest.mark.nightly),
    ],
)
def test_a_compiled_run_has_the_graphs_of_plain_lora_and_its_own_losses(tmp_path, config, layers, checkpointing):
    options = {"gradient_checkpointing": checkpointing, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    _, plain = train(tmp_path / "plain", None, True, layers, **options)
    compiled, found = train(tmp_path / "compiled", config, True, **options)
    assert found["graphs"] <= plain["graphs"] and found["breaks"] <= plain["breaks"]
    if not checkpointing:
        assert found == Counter(graphs=1, breaks=0), "no update of rank compiles anything again"
    if config.l1ra is not None:
        history = RankHistory.read(tmp_path / "compiled").ranks
        assert len({tuple(ranks.values()) for ranks in history.values()}) > 1, "rank has moved"
    expected, _ = train(tmp_path / "expected", config, False, **options)
    # Compiled code may add up in another order.
    assert list_losses(compiled) == pytest.approx(list_losses(expected), abs=1e-4)


def test_scalings_that_follow_the_rank_compile_the_model_once_more_and_not_at_every_update(tmp_path):
    moving = L1RAConfig(update_ratio=0.1, last_update_ratio=1.0, move_ratio=0.05)
    config = LayerselConfig(l1ra=moving, scaling_exponent=0.5)
    compiled, found = train(tmp_path / "compiled", config, True)
    assert found == Counter(graphs=2, breaks=0)
    history = RankHistory.read(tmp_path / "compiled").ranks
    begun = history[0].items()
    moved = [{name for name, rank in begun if ranks[name] != rank} for ranks in history.values()]
    assert set().union(*moved) != next(filter(None, moved)), "later updates are the first ones to move other modules"
    expected, _ = train(tmp_path / "expected", config, False)
    assert RankHistory.read(tmp_path / "expected").ranks == history
    assert list_losses(compiled) == pytest.approx(list_losses(expected), abs=1e-4)
