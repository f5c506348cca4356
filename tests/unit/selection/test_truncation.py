import pytest
import torch
from helpers.first_step import FirstGradients, train_first_step
from helpers.generation import make_generating_trainer
from helpers.models import make_lora, make_rows, make_small_llama, make_trainer
from helpers.settings import CHECKPOINTING, checkpoint_layers

from axolotl_layersel.common.paths import plan_path
from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.config.selection import SelectionConfig
from axolotl_layersel.lora.backward_end import find_lowest_trained
from axolotl_layersel.lora.layers import find_layer_stack
from axolotl_layersel.lora.weights import initialize_lora
from axolotl_layersel.selection.plan_file import read_plan
from axolotl_layersel.training.prepare import prepare_trainer


def train_one_step(folder, checkpointing: str, truncate: bool) -> FirstGradients:
    """Train LoRA in layers 3 and 5 for a step: with this package, or with stock PEFT's ``layers_to_transform``."""
    model = make_lora(make_small_llama(), layers_to_transform=None if truncate else [3, 5])
    model.enable_input_require_grads()  # Axolotl always does
    arguments = checkpoint_layers(checkpointing)
    trainer = make_trainer(model, folder, make_rows(4), max_steps=1, save_strategy="no", **arguments)
    if truncate:
        prepare_trainer(trainer, LayerselConfig(selection=SelectionConfig(method="explicit", layers=[3, 5])))
    else:
        initialize_lora(model, trainer.args.seed)
    return train_first_step(trainer, model.get_base_model().model.layers)


@pytest.mark.trains
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_gradients_are_those_of_the_whole_backward_pass(tmp_path, checkpointing):
    cut = train_one_step(tmp_path / "cut", checkpointing, truncate=True)
    assert read_plan(plan_path(tmp_path / "cut")).backward_end == 3
    whole = train_one_step(tmp_path / "whole", checkpointing, truncate=False)
    assert cut.kept.keys() == whole.kept.keys()
    assert len(cut.kept) == 12
    for name, gradient in cut.kept.items():
        assert torch.equal(gradient, whole.kept[name]), name
    once, twice = [1] * 6, [2] * 6
    assert whole.runs == (once if checkpointing == "none" else twice)
    assert cut.runs == (once if checkpointing == "none" else [1, 1, 1, 2, 2, 2]), "a layer below was computed again"


@pytest.mark.parametrize(
    ("settings", "lowest"),
    [
        ({}, 0),
        ({"layers_to_transform": [2, 4]}, 2),
        ({"layers_to_transform": [2, 4], "modules_to_save": ["lm_head"]}, 2),
        ({"layers_to_transform": [2, 4], "modules_to_save": ["embed_tokens"]}, 0),
    ],
)
def test_the_pass_is_cut_below_the_lowest_layer_unless_something_below_trains(settings, lowest):
    model = make_lora(make_small_llama(), **settings)
    assert find_lowest_trained(model, find_layer_stack(model)) == lowest


def test_trained_embeddings_that_the_head_shares_are_not_cut_off():
    model = make_lora(
        make_small_llama(tie_word_embeddings=True), layers_to_transform=[3], modules_to_save=["embed_tokens"]
    )
    assert find_lowest_trained(model, find_layer_stack(model)) == 0


@pytest.mark.trains
def test_a_trainer_that_sets_up_checkpointing_in_every_step_keeps_the_cut(tmp_path):
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    trainer = make_generating_trainer(
        tmp_path, max_steps=3, max_completion_length=4, save_strategy="no", **checkpointing
    )
    prepare_trainer(trainer, LayerselConfig(selection=SelectionConfig(method="last", ratio=0.5)))
    base = trainer.model.get_base_model()
    graphs, runs = [set() for _ in range(6)], [0] * 6

    def record(place: int, output: torch.Tensor) -> None:
        if torch.is_grad_enabled():
            graphs[place].add(output.requires_grad)
            runs[place] += 1

    for place, layer in enumerate(base.model.layers):
        # The first of its parts: what is computed again ends where nothing more is needed.
        layer.self_attn.q_proj.register_forward_hook(lambda module, args, output, place=place: record(place, output))
    trainer.train()
    assert graphs == [{False}] * 3 + [{True}] * 3
    assert runs[3:] == [2 * runs[0]] * 3 and runs[:3] == [runs[0]] * 3, "what lies below is not computed again"
    assert "gradient_checkpointing_enable" not in vars(base), "the cut is gone when training ends"
