import pytest
import torch
from helpers.models import (
    make_bart,
    make_bart_decoder,
    make_gpt2,
    make_llava,
    make_lora,
    make_mixtral,
    make_small_bert,
    make_small_llama,
    make_t5,
)

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.lora.layers import find_layer_stack
from axolotl_layersel.lora.modules import find_lora_modules


def make_bert():
    return make_small_bert("BertForSequenceClassification")


@pytest.mark.parametrize(
    ("make", "targets", "name"),
    [
        (make_small_llama, ["q_proj"], "model.layers"),
        (make_bert, ["query"], "bert.encoder.layer"),
        (make_gpt2, ["c_attn"], "transformer.h"),
        (make_llava, ["q_proj"], "model.language_model.layers"),
        (make_mixtral, ["q_proj"], "model.layers"),
        (make_bart_decoder, r".*self_attn\.q_proj", "model.decoder.layers"),
    ],
)
def test_the_stack_of_the_language_model_is_found(make, targets, name):
    base = make()
    model = make_lora(base, targets)
    stack = find_layer_stack(model)
    assert stack.place == name
    assert stack.layers == list(base.get_submodule(name))
    assert sorted(stack.lora_modules) == list(range(len(stack.layers)))
    assert all(module.startswith(f"{name}.{layer}.") for layer, (module,) in stack.lora_modules.items())


def test_layers_without_lora_are_not_listed():
    stack = find_layer_stack(make_lora(make_small_llama(), layers_to_transform=[1, 3]))
    assert sorted(stack.lora_modules) == [1, 3]
    assert [len(names) for names in stack.lora_modules.values()] == [3, 3]


def test_lora_outside_any_stack_is_an_error_that_lists_what_was_found():
    with pytest.raises(LayerselError, match=r"lora_target_modules: no stack of layers.*model\.layers \(6\)"):
        find_layer_stack(make_lora(make_small_llama(), ["lm_head"]))


def test_lora_in_the_vision_tower_alone_is_not_taken_for_the_language_model():
    model = make_lora(make_llava(), r".*vision_tower.*q_proj")
    with pytest.raises(LayerselError, match="no stack of layers"):
        find_layer_stack(model)


@pytest.mark.parametrize(
    ("make", "targets", "name", "towers"),
    [
        (make_small_llama, ["q_proj"], "model.layers", {}),
        (
            make_small_llama,
            ["q_proj", "lm_head", "embed_tokens"],
            "model.layers",
            {"model.embed_tokens": 1, "lm_head": 1},
        ),
        (make_bert, ["query", "dense"], "bert.encoder.layer", {"bert.pooler": 1}),
        (
            make_llava,
            ["q_proj", "linear_1", "linear_2"],
            "model.language_model.layers",
            {"model.vision_tower": 4, "model.multi_modal_projector": 2},
        ),
        (make_t5, ["q", "v", "lm_head"], {"encoder": "encoder.block", "decoder": "decoder.block"}, {"lm_head": 1}),
        (
            make_bart,
            ["q_proj", "shared"],
            {"encoder": "model.encoder.layers", "decoder": "model.decoder.layers"},
            {"model.shared": 1},
        ),
        (lambda: make_bart_decoder(3), ["q_proj"], "model.decoder.layers", {}),
    ],
)
def test_lora_outside_of_the_layers_is_counted_by_place(make, targets, name, towers):
    model = make_lora(make(), targets)
    stack = find_layer_stack(model)
    assert stack.place == name
    assert {place: len(names) for place, names in stack.towers.items()} == towers
    outside = [module for names in stack.towers.values() for module in names]
    everything = set(find_lora_modules(model.get_base_model()))
    assert {*stack.list_modules(stack.lora_modules), *outside} == everything
    assert len(stack.list_modules(stack.lora_modules)) + len(outside) == len(everything)


@pytest.mark.parametrize("make", [make_bert, make_gpt2])
def test_other_architectures_run_through_the_same_passes(make, tmp_path):
    from helpers.models import make_trainer

    from axolotl_layersel.config.selection import SelectionConfig
    from axolotl_layersel.lora.run import Run
    from axolotl_layersel.selection.select import select_layers

    targets = ["query", "value"] if make is make_bert else ["c_attn"]
    model = make_lora(make(), targets, fan_in_fan_out=make is make_gpt2)
    plan = select_layers(
        Run.of(make_trainer(model, tmp_path)), SelectionConfig(method="cka", num_samples=12, token="mean", ratio=0.5)
    )
    assert len(plan.selected) == 2
    assert all(choice.score is not None for choice in plan.layers)
    assert torch.isfinite(torch.tensor([choice.score for choice in plan.layers])).all()
