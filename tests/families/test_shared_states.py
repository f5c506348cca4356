"""Upper layers that read keys and values of lower ones, in training and on every engine."""

import pytest
import torch
from helpers.families import make_family
from helpers.first_step import train_selected
from helpers.models import make_lora, make_rows, make_trainer
from helpers.settings import checkpoint_layers
from helpers.shared_states import TARGETS

from axolotl_layersel import SelectionConfig


def train_one_step(family: str, folder, layers: list[int], checkpointing: str, truncate: bool = True) -> dict:
    """Return the gradients of LoRA in ``layers``, the backward pass being cut below them or whole."""
    model = make_lora(make_family(family), TARGETS)
    model.enable_input_require_grads()  # Axolotl always does
    arguments = checkpoint_layers(checkpointing)
    trainer = make_trainer(model, folder, make_rows(4), max_steps=1, save_strategy="no", **arguments)
    settings = SelectionConfig(method="explicit", layers=layers)
    return train_selected(trainer, settings, model.get_base_model().model.layers, truncate).kept


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


@pytest.mark.parametrize("family", ["Gemma3n", "Gemma4"])
def test_a_warning_says_that_reentrant_checkpointing_loses_gradients(family, tmp_path, caplog):
    whole = train_one_step(family, tmp_path, [1, 2, 3], "none")
    lost = train_one_step(family, tmp_path, [1, 2, 3], "reentrant")
    keys = next(name for name in whole if "layers.1.self_attn.k_proj.lora_B" in name)
    # Where a new transformers makes these equal, the warning has no reason any more.
    assert (lost[keys] - whole[keys]).norm() > 0.1 * whole[keys].norm()
    assert f"use_reentrant: true loses gradients in {family}ForCausalLM, whose 2 highest layers" in caplog.text
