import pytest
import torch
from conftest import make_lora, make_small_bert, make_small_llama
from transformers import GPT2Config, GPT2LMHeadModel

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.lora.layers import find_layer_stack
from axolotl_layersel.lora.modules import find_lora_modules

SIDE = {"ffn_dim": 48, "attention_heads": 4}


def make_bert():
    return make_small_bert("BertForSequenceClassification")


def make_gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=4, n_head=4))


def make_llava():
    """A vision tower that has as many layers as the language model, and modules of the same names."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 4}
    text = LlamaConfig(vocab_size=97, num_key_value_heads=2, **size)
    vision = CLIPVisionConfig(image_size=16, patch_size=8, projection_dim=32, **size)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=96))


def make_t5(layers: int = 4):
    """A decoder of ``layers`` layers beside an encoder of 4."""
    from transformers import T5Config, T5ForConditionalGeneration

    size = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 4}
    config = T5Config(vocab_size=97, num_decoder_layers=layers, decoder_start_token_id=0, **size)
    return T5ForConditionalGeneration(config)


def bart_config(layers: int):
    from transformers import BartConfig

    size = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in SIDE.items()}
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "decoder_start_token_id": 1}
    return BartConfig(vocab_size=97, d_model=32, encoder_layers=4, decoder_layers=layers, **size, **tokens)


def make_bart(layers: int = 4):
    """A decoder of ``layers`` layers beside an encoder of 4, and modules of the same names."""
    from transformers import BartForConditionalGeneration

    return BartForConditionalGeneration(bart_config(layers))


def make_bart_decoder(layers: int = 4):
    """What Axolotl loads of BART by default."""
    from transformers import BartForCausalLM

    return BartForCausalLM(bart_config(layers))


def make_mixtral():
    """As many experts as layers."""
    from transformers import MixtralConfig, MixtralForCausalLM

    size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=97, num_hidden_layers=4, num_local_experts=4, **size))


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
    from conftest import make_trainer

    from axolotl_layersel.config.selection import SelectionArgs
    from axolotl_layersel.lora.run import Run
    from axolotl_layersel.selection.select import select_layers

    targets = ["query", "value"] if make is make_bert else ["c_attn"]
    model = make_lora(make(), targets, fan_in_fan_out=make is make_gpt2)
    plan = select_layers(
        Run.of(make_trainer(model, tmp_path)), SelectionArgs(method="cka", num_samples=12, token="mean", ratio=0.5)
    )
    assert len(plan.selected) == 2
    assert all(choice.score is not None for choice in plan.layers)
    assert torch.isfinite(torch.tensor([choice.score for choice in plan.layers])).all()
