"""Upper layers that read keys and values of lower ones, in training and on every engine."""

import functools
from pathlib import Path

import pytest
import torch
from conftest import CHECKPOINTING, make_lora, make_rows, make_trainer
from families import make_base, make_family
from first_step import train_first_step
from ranks import check_same_choices, launch_ranks, make_arguments, train_and_record

from axolotl_layersel import LayerselConfig, SelectionConfig, prepare_trainer
from axolotl_layersel.selection.callback import LayerSelectionCallback

TARGETS = ["q_proj", "k_proj", "v_proj"]


def train_one_step(family: str, folder, layers: list[int], checkpointing: str, truncate: bool = True) -> dict:
    """Return the gradients of LoRA in ``layers``, the backward pass being cut below them or whole."""
    model = make_lora(make_family(family), TARGETS)
    model.enable_input_require_grads()  # Axolotl always does
    options = CHECKPOINTING[checkpointing]
    arguments = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": options} if options else {}
    trainer = make_trainer(model, folder, make_rows(4), max_steps=1, save_strategy="no", **arguments)
    prepare_trainer(trainer, LayerselConfig(selection=SelectionConfig(method="explicit", layers=layers)))
    if not truncate:
        trainer.remove_callback(LayerSelectionCallback)
    return train_first_step(trainer, model.get_base_model().model.layers).kept


@pytest.mark.trains
# Layers 2 and 3 read keys and values of layers 0 and 1.
@pytest.mark.parametrize("layers", [[0, 2, 3], [1, 2, 3], [2, 3], [3]])
@pytest.mark.parametrize("family", ["Gemma3n", "Gemma4"])
def test_gradients_are_those_of_the_whole_backward_pass(family, layers, tmp_path, caplog):
    whole = train_one_step(family, tmp_path, layers, "none", truncate=False)
    assert "loses gradients" not in caplog.text
    for checkpointing in ("none", "non-reentrant"):
        cut = train_one_step(family, tmp_path, layers, checkpointing)
        assert cut.keys() == whole.keys()
        for name, gradient in cut.items():
            assert torch.equal(gradient, whole[name]), name
    assert "loses gradients" not in caplog.text


@pytest.mark.trains
@pytest.mark.parametrize("family", ["Gemma3n", "Gemma4"])
def test_a_warning_says_that_reentrant_checkpointing_loses_gradients(family, tmp_path, caplog):
    whole = train_one_step(family, tmp_path, [1, 2, 3], "none")
    lost = train_one_step(family, tmp_path, [1, 2, 3], "reentrant")
    keys = next(name for name in whole if "layers.1.self_attn.k_proj.lora_B" in name)
    # Where a new transformers makes these equal, the warning has no reason any more.
    assert (lost[keys] - whole[keys]).norm() > 0.1 * whole[keys].norm()
    assert f"use_reentrant: true loses gradients in {family}ForCausalLM, whose 2 highest layers" in caplog.text


CHOICES = {
    "cka": {"num_samples": 9, "num_layers": 2},
    "fisher": {"num_samples": 9, "num_layers": 2},
    "gradient": {"num_samples": 9, "granularity": "layer", "num_layers": 2, "rank": "same"},
}


def be_a_rank(family: str, engine: str, base: str, folder: str) -> None:
    """Choose by several methods on an engine, and train what the last one chose, into ``folder``."""
    import cpu_engines  # noqa: F401  # lets the engines run without a GPU

    chosen = make_arguments(engine, [f"{family}TextDecoderLayer"])

    def load(arguments):
        # From a file, for then ZeRO-3 shards it at once.
        model = make_lora(type(make_base(family)).from_pretrained(base, dtype=torch.float32), TARGETS)
        model.enable_input_require_grads()
        return model

    for method, settings in CHOICES.items():
        trainer = make_trainer(load, Path(folder) / method, use_cpu=False, save_strategy="no", **chosen)
        prepare_trainer(trainer, LayerselConfig(selection=SelectionConfig(method=method, **settings)))
    train_and_record(trainer, folder)


@pytest.fixture(scope="module")
def launch(zygote, tmp_path_factory):
    """Return a function that lets an engine choose and train, once, and returns the folder."""

    @functools.cache
    def run(family: str, engine: str) -> Path:
        folder = tmp_path_factory.mktemp(f"{family}-{engine}")
        return launch_ranks(zygote, "test_shared_states:be_a_rank", engine, folder, make_family(family), family=family)

    return run


@pytest.mark.parametrize(
    ("family", "engine"), [("Gemma3n", "ddp"), ("Gemma3n", "zero3"), ("Gemma4", "zero3"), ("Gemma4", "fsdp2")]
)
def test_every_engine_scores_and_trains_as_one_process_does(family, engine, launch):
    alone, shared = launch(family, "single"), launch(family, engine)
    check_same_choices(alone, shared, engine, CHOICES, make_family(family))
