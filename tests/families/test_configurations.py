"""Every architecture of transformers: its layers are found, or it is refused in one sentence."""

import contextlib
import re

import pytest
import torch
import transformers
from helpers.configurations import KINDS, OTHERS, TRIED, build, find_needed, list_classes, put_lora, quiet
from helpers.models import make_lora, make_trainer
from helpers.places import at_night
from peft import PeftModel
from transformers import Gemma4ForCausalLM, Gemma4TextConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from axolotl_layersel import LayerselConfig, SelectionConfig, prepare_trainer
from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.paths import plan_path
from axolotl_layersel.config.facts import read_fact
from axolotl_layersel.config.layer_names import ENCODER_DECODER, STACKS
from axolotl_layersel.lora.backward_end import find_lowest_trained
from axolotl_layersel.lora.layers import LayerStack, find_layer_counts, find_layer_stack
from axolotl_layersel.lora.modules import get_base_model
from axolotl_layersel.selection.data.label_alignment import find_kind
from axolotl_layersel.selection.data.row_token import find_token
from axolotl_layersel.selection.provenance import describe_shape
from axolotl_layersel.selection.units import find_units

# The kinds with over a hundred architectures, which take minutes.
MANY = ("causal language models", "models of text and other inputs", OTHERS)


def generalise(message: str, name: str) -> str:
    """Return the sentence that a class is refused with, without what is of that class only."""
    sentence = re.split(r" \(lists|, in which|\. ", message.replace(name, "it"))[0]
    return re.sub(r"\d+", "n", sentence)


def examine(model: PeftModel) -> LayerStack:
    """Return the layers of a model, after everything was read that the package reads of any model.

    Raises:
        LayerselError: where they cannot be told.
    """
    base = get_base_model(model)
    shape = describe_shape(base.config)
    assert isinstance(shape["model_type"], str)
    stack = find_layer_stack(model)
    assert stack.layers and stack.lora_modules
    assert find_token(base, "auto") in ("cls", "mean", "ending")
    find_lowest_trained(model, stack)
    for read in (lambda: find_kind(model), lambda: find_units(stack, "group", sorted(stack.lora_modules))):
        with contextlib.suppress(LayerselError):
            read()
    check_counts(base.config, stack)
    return stack


def check_counts(config, stack: LayerStack) -> None:
    """Check that what the configuration says before the model is there is what the model has."""
    sides = [side.name for side in stack.sides]
    counts = find_layer_counts(config, sides)
    assert counts in (None, {side.name: len(side.layers) for side in stack.sides}), (counts, stack.place)


@pytest.mark.parametrize("kind", [*(kind for kind in KINDS if kind not in MANY), *at_night(*MANY)])
def test_layers_are_found_or_refused_in_one_sentence(kind, support):
    found: list[str] = []
    refused: dict[str, str] = {}
    unbuilt: dict[str, str] = {}
    classes = list_classes(kind)
    with quiet():
        for model_type, name in classes:
            for layers in TRIED:
                try:
                    model = put_lora(build(name, model_type, layers))
                except Exception as error:  # transformers' own, or PEFT's
                    unbuilt[name] = type(error).__name__
                    break
                try:
                    examine(model)
                    find_both(model)
                    refused.pop(name, None)
                    found.append(name)
                    break
                except LayerselError as error:
                    refused[name] = generalise(str(error), name)
    assert len(found) + len(refused) + len(unbuilt) == len(classes)
    support.survey(kind, len(found), refused, unbuilt)


def test_every_configuration_is_read_without_a_model(support):
    found: list[str] = []
    unbuilt: dict[str, str] = {}
    with quiet():
        for model_type, name in CONFIG_MAPPING_NAMES.items():
            try:
                config = getattr(transformers, name)(**find_needed(name, model_type))
            except Exception as error:  # transformers' own
                unbuilt[name] = type(error).__name__
                continue
            assert all(type(value) in (int, str) for value in describe_shape(config).values())
            for sides in (*STACKS.values(), ENCODER_DECODER):
                counts = find_layer_counts(config, sides)
                assert counts is None or (counts.keys() == set(sides) and min(counts.values()) > 0)
            found.append(model_type)
    support.survey("configurations, without a model", len(found), {}, unbuilt)


def find_both(model: PeftModel) -> None:
    """Look for the layers of a vision tower too, where the model has one."""
    base = get_base_model(model)
    if read_fact(base.config, "vision_config"):
        with contextlib.suppress(LayerselError):
            check_counts(base.config, find_layer_stack(model, "both"))


def test_a_model_whose_layers_have_heads_of_two_sizes_is_planned_trained_and_planned_again(tmp_path):
    def make(folder):
        torch.manual_seed(0)
        size = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16}
        kinds = ["sliding_attention", "full_attention"] * 2
        inputs = {"vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8}
        config = Gemma4TextConfig(layer_types=kinds, num_kv_shared_layers=0, **size, **heads, **inputs)
        with pytest.raises(RuntimeError, match="per-layer attribute"):
            config.head_dim  # noqa: B018
        return make_trainer(make_lora(Gemma4ForCausalLM(config)), folder, max_steps=1)

    trainer = make(tmp_path)
    plan = prepare_trainer(trainer, LayerselConfig(selection=SelectionConfig(method="cosine", num_samples=7)))
    assert plan.base_shape["num_hidden_layers"] == 4 and "head_dim" not in plan.base_shape
    assert all(choice.score is not None for choice in plan.layers) and len(plan.selected) == 2
    trainer.train()
    trainer.save_model()
    reused = SelectionConfig(method="cosine", plan=str(plan_path(tmp_path)))
    assert prepare_trainer(make(tmp_path / "again"), LayerselConfig(selection=reused)).selected == plan.selected
