"""What training changed is in the file, so that whoever loads it with stock PEFT has the model that was trained."""

import pytest
import torch
from helpers.models import make_lora, make_rows, make_small_llama, make_trainer
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.l1ra import L1RAConfig
from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.config.selection import SelectionConfig
from axolotl_layersel.training.prepare import prepare_trainer

TOKENS = torch.arange(3, 33)[None]
BLOCKS = {
    "remove": LayerselConfig(selection=SelectionConfig(method="last", ratio=0.5)),
    "freeze": LayerselConfig(selection=SelectionConfig(method="last", ratio=0.5, unselected="freeze")),
    "l1ra": LayerselConfig(l1ra=L1RAConfig(update_ratio=0.2, move_ratio=0.3)),
}


def make_qwen(tied: bool = False):
    """Return a small model whose q_proj, k_proj and v_proj have a bias."""
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=97, num_hidden_layers=6, tie_word_embeddings=tied, initializer_range=0.1, **size)
    return Qwen2ForCausalLM(config)


def prepare(folder, block, model):
    trainer = make_trainer(model, folder, make_rows(24), max_steps=12, save_strategy="steps", save_steps=6)
    prepare_trainer(trainer, BLOCKS[block])
    return trainer


@torch.no_grad()
def compute(model) -> torch.Tensor:
    return model.eval()(TOKENS).logits


def list_changed(before: dict, model) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


KINDS = {
    "plain": {},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "a head": {"modules_to_save": ["lm_head"]},
    "embeddings": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {"trainable_token_indices": [4, 5, 6]},
    "LoRA's own bias": {"lora_bias": True, "targets": ["q_proj", "v_proj"]},
    "DoRA": {"use_dora": True},
    "LoRA on embeddings": {"targets": ["embed_tokens", "q_proj", "v_proj"]},
}
NOT_PLAIN = ("DoRA", "LoRA's own bias", "LoRA on embeddings")  # which gates do not go with


@pytest.mark.trains
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("kind", "block"), [(k, b) for k in KINDS for b in BLOCKS if b != "l1ra" or k not in NOT_PLAIN]
)
def test_stock_peft_loads_what_was_trained(kind, block, tied, tmp_path):
    settings = dict(KINDS[kind])
    targets = settings.pop("targets", ("q_proj", "v_proj", "down_proj"))
    model = make_lora(make_qwen(tied), targets, task_type="CAUSAL_LM", **settings)
    trainer = prepare(tmp_path, block, model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    trainer.train()
    assert list_changed(before, model) <= trained
    trainer.save_model()
    model.save_pretrained(str(tmp_path / "alone"))
    expected = compute(model)
    for place in (".", "alone", "checkpoint-12"):
        stock = PeftModel.from_pretrained(make_qwen(tied), tmp_path / place)
        torch.testing.assert_close(compute(stock), expected, atol=1e-5, rtol=1e-5)
    assert (expected - compute(make_qwen(tied))).abs().max() > 0.01


@pytest.mark.trains
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_train_where_the_adapter_says_and_the_selection_does_not_freeze_them(bias, tmp_path):
    model = make_lora(make_qwen(), task_type="CAUSAL_LM", bias=bias)
    trainer = prepare(tmp_path, "freeze", model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.train()
    changed = {name for name in list_changed(before, model) if name.endswith("bias")}
    places = {tuple(name.split(".layers.")[1].split(".")[:3:2]) for name in changed}
    kept = {(layer, part) for layer in "345" for part in ("q_proj", "v_proj")}
    everywhere = {(layer, "k_proj") for layer in "012345"} if bias == "all" else set()
    assert places == kept | everywhere


def test_biases_of_modules_that_lost_their_lora_do_not_train_with_lora_only(tmp_path):
    model = make_lora(make_qwen(), task_type="CAUSAL_LM", bias="lora_only")
    prepare(tmp_path, "remove", model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "bias" in name}
    assert {name.split(".layers.")[1][0] for name in trained} == {"3", "4", "5"}


@pytest.mark.trains
@pytest.mark.parametrize("block", BLOCKS)
def test_biases_resume(block, tmp_path):
    ends = []
    for resume in (None, str(tmp_path / "checkpoint-6")):
        model = make_lora(make_qwen(), task_type="CAUSAL_LM", bias="lora_only")
        trainer = make_trainer(model, tmp_path, make_rows(24), max_steps=12, save_strategy="steps", save_steps=6)
        prepare_trainer(trainer, BLOCKS[block], resume_from=resume)
        trainer.train(resume_from_checkpoint=resume)
        ends.append(model.state_dict())
    whole, resumed = ends
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


@pytest.mark.parametrize("block", BLOCKS)
def test_what_trains_and_is_in_no_file_is_refused(block, tmp_path):
    model = make_lora(make_small_llama(), task_type="CAUSAL_LM")
    model.get_base_model().model.norm.weight.requires_grad_(True)
    message = r"^adapter: model\.norm\.weight trains \(1 such parameters\), but PEFT does not save it"
    with pytest.raises(LayerselError, match=message):
        prepare(tmp_path, block, model)


def test_a_module_to_save_with_buffers_is_refused(tmp_path):
    base = make_small_llama()
    base.lm_head = torch.nn.Sequential(torch.nn.BatchNorm1d(32), torch.nn.Linear(32, 97))
    model = make_lora(base, modules_to_save=["lm_head"])
    with pytest.raises(LayerselError, match=r"^modules_to_save: lm_head has the buffer 0\.num_batches_tracked,"):
        prepare(tmp_path, "remove", model)


@pytest.mark.trains
def test_what_begins_to_train_after_preparation_is_refused(tmp_path):
    trainer = prepare(tmp_path, "remove", make_lora(make_small_llama(), task_type="CAUSAL_LM"))
    trainer.model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(LayerselError, match=r"^adapter: model\.embed_tokens\.weight trains"):
        trainer.train()


def test_peft_still_leaves_biases_of_lora_only_out():
    """The fact for which this package adds them; where PEFT writes them by itself, that can go."""
    model = make_lora(make_qwen(), task_type="CAUSAL_LM", bias="lora_only")
    from peft import get_peft_model_state_dict

    assert not any("bias" in name for name in get_peft_model_state_dict(model))
    assert any("bias" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


def test_the_file_names_biases_as_the_model_does(tmp_path):
    trainer = prepare(tmp_path, "remove", make_lora(make_qwen(), task_type="CAUSAL_LM", bias="lora_only"))
    trainer.save_model()
    biases = [name for name in load_file(tmp_path / "adapter_model.safetensors") if "bias" in name]
    assert len(biases) == 3 * 2
    assert "base_model.model.model.layers.3.self_attn.q_proj.base_layer.bias" in biases
