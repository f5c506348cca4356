"""A model with a second, inactive adapter: selection, moving rank and saving leave that one as it is, bit for bit."""

import copy
import warnings

import pytest
import torch
from helpers.adapter_switches import make_dpo, make_trained_lora
from helpers.models import make_lora, make_rows, make_small_llama, make_trainer
from peft import PeftModel

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.flexora import FlexoraConfig
from axolotl_layersel.config.l1ra import L1RAConfig
from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.config.selection import SelectionConfig
from axolotl_layersel.lora.modules import find_lora_modules
from axolotl_layersel.training.prepare import prepare_trainer

TOKENS = torch.arange(3, 33)[None]
MOVING = L1RAConfig(update_ratio=0.2, move_ratio=0.3)
BLOCKS = {
    "remove": LayerselConfig(selection=SelectionConfig(method="last", ratio=0.5)),
    "freeze": LayerselConfig(selection=SelectionConfig(method="last", ratio=0.5, unselected="freeze")),
    "fisher": LayerselConfig(selection=SelectionConfig(method="fisher", ratio=0.5, num_samples=8)),
    "ranks": LayerselConfig(selection=SelectionConfig(method="gradient", num_samples=8)),
    "flexora": LayerselConfig(
        selection=SelectionConfig(method="flexora", ratio=0.5, flexora=FlexoraConfig(steps=4, val_samples=4))
    ),
    "l1ra": LayerselConfig(l1ra=MOVING),
    "remove and l1ra": LayerselConfig(selection=SelectionConfig(method="last", ratio=0.5), l1ra=MOVING),
}


def make_two(folder, targets=("q_proj", "v_proj", "down_proj"), **settings):
    """Return a model that trains one adapter, and carries a trained one, ``reference``, with LoRA in other modules."""
    other = make_lora(make_small_llama(), ("q_proj", "up_proj"), r=3, task_type="CAUSAL_LM")
    for name, parameter in other.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(7))
    other.save_pretrained(str(folder))
    model = make_lora(make_small_llama(), targets, task_type="CAUSAL_LM", **settings)
    model.load_adapter(str(folder), "reference")
    model.set_adapter("default")
    return model


@torch.no_grad()
def compute(model, adapter: str) -> torch.Tensor:
    """Return the logits of a model under one of its adapters, or under none."""
    was, active = model.training, model.active_adapter
    model.eval()
    if adapter:
        model.set_adapter(adapter)
        logits = model(TOKENS).logits
        model.set_adapter(active)
    else:
        with model.disable_adapter():
            logits = model(TOKENS).logits
    model.train(was)
    return logits


@pytest.mark.trains
@pytest.mark.parametrize("kind", BLOCKS)
def test_the_other_adapter_computes_the_same_to_the_bit(kind, tmp_path):
    model = make_two(tmp_path / "reference")
    before, base = compute(model, "reference"), compute(model, "")
    assert (before - base).abs().max() > 0.1
    trainer = make_trainer(model, tmp_path, make_rows(24), max_steps=12, save_strategy="steps", save_steps=6)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Adapter default was active which is now deleted")
        prepare_trainer(trainer, BLOCKS[kind])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and not any("reference" in name for name in trained)
    assert torch.equal(compute(model, "reference"), before) and torch.equal(compute(model, ""), base)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    trainer.train()
    trainer.save_model()
    assert torch.equal(compute(model, "reference"), before) and torch.equal(compute(model, ""), base)

    stock = PeftModel.from_pretrained(make_small_llama(), tmp_path).eval()
    own = find_lora_modules(model.get_base_model(), "default")
    assert find_lora_modules(stock.get_base_model()).keys() == own.keys()
    with torch.no_grad():
        logits = stock(TOKENS).logits
    torch.testing.assert_close(logits, compute(model, "default"), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits, base, atol=1e-3)
    if "remove" in kind:
        assert {name.split(".layers.")[1][0] for name in own} == {"3", "4", "5"}
        left = find_lora_modules(model.get_base_model())
        assert len([name for name in left if "q_proj" in name]) == 6, "the other adapter's modules stay"
        assert not any("down_proj" in name and ".layers.0." in name for name in left), "and those of none go"


@pytest.mark.trains
def test_training_beside_another_adapter_is_training_without_it(tmp_path):
    ends = []
    for place in ("alone", "beside"):
        alone = make_lora(make_small_llama(), task_type="CAUSAL_LM")
        model = alone if place == "alone" else make_two(tmp_path / "reference")
        trainer = make_trainer(model, tmp_path / place, make_rows(24), max_steps=6, save_strategy="no")
        prepare_trainer(trainer, BLOCKS["remove"])
        trainer.train()
        ends.append({name: value for name, value in model.state_dict().items() if ".default." in name})
    one, other = ends
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.trains
def test_the_reference_that_a_trainer_makes_of_a_trained_adapter_stays_whole(tmp_path):
    """DPO compares with what was loaded; the layers that the new policy leaves out are part of that."""
    model = make_trained_lora()
    before = compute(copy.deepcopy(model), "default")
    trainer = make_dpo(model, tmp_path)
    prepare_trainer(
        trainer,
        LayerselConfig(selection=SelectionConfig(method="last", ratio=0.5, unselected="remove")),
        continues_adapter=True,
    )
    trainer.train()
    assert torch.equal(compute(model, "ref"), before)


@pytest.mark.trains
def test_a_run_resumes_beside_another_adapter(tmp_path):
    ends = []
    for resume in (None, str(tmp_path / "checkpoint-3")):
        model = make_two(tmp_path / "reference")
        trainer = make_trainer(model, tmp_path, make_rows(24), max_steps=6, save_strategy="steps", save_steps=3)
        prepare_trainer(trainer, BLOCKS["remove"], resume_from=resume)
        trainer.train(resume_from_checkpoint=resume)
        ends.append({name: value.clone() for name, value in model.state_dict().items() if "lora_" in name})
    whole, resumed = ends
    assert whole.keys() == resumed.keys() and all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_base_weights_under_another_adapter_are_not_restored(tmp_path):
    model = make_two(tmp_path / "reference", init_lora_weights="pissa")
    trainer = make_trainer(model, tmp_path)
    with pytest.raises(LayerselError, match=r"undoes the change that 'pissa' made .* the adapter 'reference'"):
        prepare_trainer(trainer, BLOCKS["remove"])
