import functools
import json

import bitsandbytes
import pytest
import torch
from helpers.models import make_lora, make_small_llama, make_trainer
from peft import PeftModel
from torchao.optim.adam import AdamWFp8
from transformers import BertConfig, BertModel

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.l1ra.capacity import check_optimizer_class, grow_modules
from axolotl_layersel.lora.export import export_adapter
from axolotl_layersel.lora.modules import find_lora_modules
from axolotl_layersel.lora.plain_lora import check_plain_lora
from axolotl_layersel.lora.run import Run

TOKENS = torch.arange(3, 33)[None]


def make_trained(**settings) -> PeftModel:
    model = make_lora(make_small_llama(), **settings).eval()
    generator = torch.Generator().manual_seed(4)
    for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def compute(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}])
def test_growing_changes_nothing_that_is_computed(settings):
    model = make_trained(**settings)
    before, scalings = compute(model), [m.scaling["default"] for m in find_lora_modules(model).values()]
    slots = grow_modules(model, 9)
    torch.testing.assert_close(compute(model), before, atol=1e-6, rtol=0)
    assert [m.scaling["default"] for m in find_lora_modules(model).values()] == scalings
    for name, module in find_lora_modules(model.get_base_model()).items():
        rank = settings.get("rank_pattern", {}).get(name.rpartition(".")[2], 4)
        down, up = module.lora_A["default"], module.lora_B["default"]
        assert slots[name] == list(range(rank))
        assert (down.out_features, up.in_features) == (9, 9)
        assert not down.weight[rank:].any() and not up.weight[:, rank:].any()
        assert down.weight.requires_grad and up.weight.requires_grad


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}])
def test_whoever_saves_the_grown_modules_as_they_are_saves_a_right_adapter(tmp_path, settings):
    model = make_trained(**settings)
    grow_modules(model, 9)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(make_small_llama(), str(tmp_path)).eval()
    torch.testing.assert_close(compute(loaded), compute(model), atol=1e-6, rtol=0)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 9


def test_frozen_weights_stay_frozen():
    model = make_trained()
    frozen = find_lora_modules(model)["base_model.model.model.layers.0.self_attn.q_proj"].lora_A["default"]
    frozen.weight.requires_grad_(False)
    grow_modules(model, 8)
    assert not frozen.weight.requires_grad


@pytest.mark.parametrize("layout", ["ragged", "const", "uniform"])
def test_a_redistributed_adapter_gets_its_scaling_and_its_room_back(tmp_path, layout):
    trained = make_trained(rank_pattern={"q_proj": 2, "v_proj": 7})
    trained.save_pretrained(str(tmp_path / "trained"))
    export_adapter(tmp_path / "trained", layout, tmp_path / "out")
    model = PeftModel.from_pretrained(make_small_llama(), str(tmp_path / "out"), is_trainable=True).eval()
    names = find_lora_modules(model.get_base_model())
    scalings = {name: 2.0 + 0.5 * (place % 2) for place, name in enumerate(names)}
    slots = grow_modules(model, 8, scalings)
    torch.testing.assert_close(compute(model), compute(trained), atol=1e-5, rtol=0)
    assert {name: m.scaling["default"] for name, m in names.items()} == scalings
    assert {len(used) for used in slots.values()} == {2, 4, 7}


def test_a_rank_above_the_room_is_refused_with_the_module():
    with pytest.raises(LayerselError, match=r"l1ra.max_rank: 3 is less than the rank 4 that model\.layers\.0.*to at"):
        grow_modules(make_trained(), 3)


def test_encoders_are_plain_enough(tmp_path):
    size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 97}
    model = make_lora(BertModel(BertConfig(num_hidden_layers=2, **size)), ["query", "value"])
    run = Run.of(make_trainer(model, tmp_path))
    check_plain_lora(run, run.lora_modules, "layersel.l1ra")
    assert len(grow_modules(model, 8)) == 4


@pytest.mark.parametrize(
    ("optimizer", "engine", "message"),
    [
        (torch.optim.AdamW, "zero3", None),
        (bitsandbytes.optim.PagedAdamW8bit, "zero2", None),
        (AdamWFp8, "fsdp2", None),
        (AdamWFp8, "zero2", "optimizer: 'AdamWFp8' cannot be combined with DeepSpeed, .* Use `adamw_bnb_8bit`"),
        (bitsandbytes.optim.AdamW, "fsdp2", "'AdamW' cannot be combined with FSDP2, .* Use `adamw_torch_8bit`"),
        (torch.optim.SGD, "single", "optimizer: 'SGD' is not supported by layersel.l1ra.* Use `adamw_torch`"),
        (functools.partial(torch.optim.AdamW), "single", "optimizer: .*partial.* is not supported by layersel.l1ra"),
    ],
)
def test_the_class_of_an_optimizer_that_a_trainer_was_given_is_judged_as_its_name_is(optimizer, engine, message):
    if message is None:
        check_optimizer_class(optimizer, engine, whole_state=False)
        return
    with pytest.raises(LayerselError, match=message):
        check_optimizer_class(optimizer, engine, whole_state=False)


def test_torchaos_class_is_refused_where_fsdp2_would_write_its_moments_whole():
    with pytest.raises(LayerselError, match="FULL_STATE_DICT with optimizer: 'AdamWFp8' writes checkpoints that no"):
        check_optimizer_class(AdamWFp8, "fsdp2", whole_state=True)
    check_optimizer_class(torch.optim.AdamW, "fsdp2", whole_state=True)
