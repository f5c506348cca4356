"""A run in which nothing would train, or whose adapter is not the one that was prepared, is refused before a step."""

import pytest
import torch
from helpers.adapter_switches import make_dpo, make_trained_lora
from helpers.models import make_lora, make_rows, make_small_llama, make_trainer
from helpers.readiness import BLOCKS, freeze_all
from helpers.refusals import FILE, say_by_file
from peft import PeftModel

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.root import LayerselArgs
from axolotl_layersel.training.prepare import prepare_trainer

WHILE_PREPARED = "adapter: 'default' was prepared for training and"


def prepare(folder, block, model=None, **settings):
    model = model or make_lora(make_small_llama(), task_type="CAUSAL_LM", **settings)
    values = {"max_steps": 12, "save_strategy": "steps", "save_steps": 6}
    trainer = make_trainer(model, folder, make_rows(24), **values)
    prepare_trainer(trainer, BLOCKS[block])
    return trainer


def load_for_inference(folder):
    make_trained_lora().save_pretrained(str(folder))
    return PeftModel.from_pretrained(make_small_llama(), folder)


def load_another(folder):
    """PEFT stops all adapters from training when it loads one that is not to."""
    make_trained_lora().save_pretrained(str(folder))
    model = make_trained_lora()
    model.load_adapter(str(folder), "other")
    return model


def train_head_only(folder):
    model = make_lora(make_small_llama(), task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(False)
    return model


IDLE = {
    "by hand": (lambda folder: freeze_all(make_trained_lora()), "Unfreeze those of the selected layers"),
    "for inference": (load_for_inference, "was loaded for inference. Load it with `is_trainable=True`"),
    "another was loaded": (load_another, r"call `model.set_adapter\('default'\)` afterwards"),
    "a head alone": (train_head_only, "Unfreeze those of the selected layers"),
}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("reason", IDLE)
def test_an_adapter_that_does_not_train_is_refused(reason, block, tmp_path):
    make, advice = IDLE[reason]
    message = (
        rf"^adapter: none of the \d+ LoRA matrices of 'default' requires a gradient, so nothing would train.*{advice}"
    )
    with pytest.raises(LayerselError, match=message):
        prepare(tmp_path / "run", block, make(tmp_path / "adapter"))
    assert not (tmp_path / "run" / "layersel").exists(), "nothing was scored"


@pytest.mark.parametrize("block", ["selection", "freeze"])
def test_a_choice_of_layers_that_do_not_train_is_refused(block, tmp_path):
    model = make_lora(make_small_llama(), task_type="CAUSAL_LM")
    for name, parameter in model.named_parameters():
        if any(f".layers.{layer}." in name for layer in (3, 4, 5)):
            parameter.requires_grad_(False)
    with pytest.raises(LayerselError, match=r"none of the \d+ LoRA matrices of 'default' requires a gradient"):
        prepare(tmp_path, block, model)


@pytest.mark.trains
def test_weights_that_stop_after_preparation_are_seen_when_training_begins(tmp_path):
    trainer = prepare(tmp_path, "selection")
    freeze_all(trainer.model)
    with pytest.raises(LayerselError, match="none of the 18 LoRA matrices of 'default' requires a gradient"):
        trainer.train()


ZERO = {"lora_alpha": 0}
BY_PATTERN = {"alpha_pattern": {r"layers\.3\.self_attn\.q_proj": 0}}


@pytest.mark.parametrize("block", BLOCKS)
def test_a_scaling_of_zero_is_refused_by_the_file_and_the_trainer_in_the_same_sentence(block, tmp_path):
    settings = BLOCKS[block].model_dump(exclude_none=True)
    by_file = say_by_file(settings, ZERO)
    with pytest.raises(LayerselError) as caught:
        prepare(tmp_path, block, **ZERO)
    assert str(caught.value) == by_file
    assert by_file == (
        "lora_alpha: 0 scales the output of LoRA to 0, so no LoRA weight would train. Set another number, such as 16."
    )


@pytest.mark.parametrize("settings", [BY_PATTERN, {**BY_PATTERN, "use_rslora": True}, {"lora_alpha": float("nan")}])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_scaling_under_which_a_module_cannot_train_is_refused(settings, block, tmp_path):
    with pytest.raises(
        LayerselError, match=r"lora_alpha: LoRA on model\.layers\.\d\.self_attn\.q_proj has the scaling"
    ):
        prepare(tmp_path, block, **settings)


def test_the_alpha_of_a_file_that_is_not_read_is_not_judged():
    """With an adapter to continue Axolotl does not look at it, but l1ra does."""
    keys = {**ZERO, "lora_model_dir": "./adapter"}
    block = {"selection": {"method": "last", "ratio": 0.5, "unselected": "freeze"}}
    LayerselArgs.model_validate({**FILE, **keys, "layersel": block})
    assert say_by_file({"l1ra": {}}, keys).startswith("lora_alpha: 0 scales")


def add(model):
    model.add_adapter("ref", model.peft_config["default"])


def switch(model):
    add(model)
    model.set_adapter("ref")


def delete(model):
    add(model)
    model.delete_adapter("default")


def switch_off(model):
    model.base_model.disable_adapter_layers()


def put_on_another(model):
    layer = model.get_base_model().model.layers[3].self_attn
    layer.q_proj = layer.q_proj.get_base_layer()


CHANGED = {
    "switched": (switch, r"^adapter: 'default' was prepared for training, but 'ref' is active. Call `model.set_ad"),
    "deleted": (delete, f"^{WHILE_PREPARED} then deleted from the model. Build a new model and trainer"),
    "merged and unloaded": (lambda model: model.merge_and_unload(), f"^{WHILE_PREPARED} is no longer in the model"),
    "unloaded": (lambda model: model.unload(), f"^{WHILE_PREPARED} is no longer in the model"),
    "merged": (lambda model: model.merge_adapter(), r"^adapter: 'default' is merged into .* Call `model.unmerge_adap"),
    "switched off": (switch_off, "^adapter: 'default' is switched off. Call `model.base_model.enable_adapter_layers"),
    "taken off": (
        put_on_another,
        "^adapter: LoRA of 'default' was added to or removed from model.layers.3.self_attn.q_proj",
    ),
}


@pytest.mark.trains
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("change", CHANGED)
def test_an_adapter_that_changed_after_preparation_is_refused_when_training_begins(change, block, tmp_path):
    act, message = CHANGED[change]
    trainer = prepare(tmp_path, block)
    act(trainer.model)
    with pytest.raises(LayerselError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    with pytest.raises(LayerselError, match=message):
        trainer.save_model()
    if change != "deleted":  # of which PEFT saves the others
        with pytest.raises(LayerselError, match=message):
            trainer.model.save_pretrained(str(tmp_path / "alone"))


@pytest.mark.trains
@pytest.mark.parametrize("block", BLOCKS)
def test_adding_adapters_after_preparation_is_nobodys_business(block, tmp_path):
    make_trained_lora().save_pretrained(str(tmp_path / "other"))
    ends = []
    for adds in (False, True):
        trainer = prepare(tmp_path / str(adds), block)
        before = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
        if adds:
            add(trainer.model)
            trainer.model.load_adapter(str(tmp_path / "other"), "other")  # by which PEFT would stop all others
        assert {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad} == before
        trainer.train()
        trainer.save_model()
        stock = PeftModel.from_pretrained(make_small_llama(), tmp_path / str(adds))
        ends.append({name: value for name, value in stock.state_dict().items() if "lora_" in name})
    one, other = ends
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.trains
def test_a_trainer_that_brings_its_reference_is_not_taken_for_a_change(tmp_path):
    trainer = make_dpo(make_trained_lora(), tmp_path, save_strategy="steps", save_steps=1)
    prepare_trainer(trainer, BLOCKS["freeze"], continues_adapter=True)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").exists()
