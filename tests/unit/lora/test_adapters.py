import copy
import json
import time

import pytest
import torch
from helpers.models import make_lora, make_small_llama, make_trainer
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.initialisation import RESTORED, SEEDED
from axolotl_layersel.lora import adapters, layouts
from axolotl_layersel.lora.layers import find_layer_stack
from axolotl_layersel.lora.modules import find_lora_modules, get_config
from axolotl_layersel.lora.run import Run
from axolotl_layersel.lora.writer import AdapterWriter

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def module_products(model) -> list[float]:
    """Return the largest element of B·A of every module."""
    modules = find_lora_modules(model.get_base_model()).values()
    return [float((m.lora_B["default"].weight @ m.lora_A["default"].weight).abs().max()) for m in modules]


def lora_weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "lora_" in name}


@pytest.mark.parametrize("method", [True, "gaussian", "orthogonal"])
def test_initial_weights_come_from_the_seed_alone(method):
    first, second, other = (make_lora(make_small_llama(), init_lora_weights=method) for _ in range(3))
    torch.manual_seed(11)
    state = torch.get_rng_state()
    assert adapters.initialize_lora(first, seed=5)
    assert torch.equal(torch.get_rng_state(), state), "the user's random stream moved"
    torch.manual_seed(12)
    adapters.initialize_lora(second, seed=5)
    adapters.initialize_lora(other, seed=6)
    for name, value in lora_weights(first).items():
        assert torch.equal(value, lora_weights(second)[name])
        assert torch.equal(value, lora_weights(other)[name]) == ("lora_B" in name and method != "orthogonal")


def test_a_row_does_not_depend_on_rank_or_on_what_else_carries_lora():
    small = make_lora(make_small_llama(), r=2, target_modules=["q_proj"])
    large = make_lora(make_small_llama(), r=6, target_modules=["q_proj", "up_proj"])
    for model in (small, large):
        adapters.initialize_lora(model, seed=5)
    for name, value in lora_weights(small).items():
        if "lora_A" in name:
            assert torch.equal(value, lora_weights(large)[name][:2])


@pytest.mark.parametrize("method", [True, "gaussian", "orthogonal"])
def test_the_distribution_is_pefts(method):
    model = make_lora(make_small_llama(hidden_size=256, num_attention_heads=8), r=16, init_lora_weights=method)
    stock = torch.cat([value.flatten() for name, value in lora_weights(model).items() if "q_proj.lora_A" in name])
    adapters.initialize_lora(model, seed=5)
    ours = torch.cat([value.flatten() for name, value in lora_weights(model).items() if "q_proj.lora_A" in name])
    assert ours.std().item() == pytest.approx(stock.std().item(), rel=0.03)
    assert ours.abs().max().item() == pytest.approx(stock.abs().max().item(), rel=0.01 if method is True else 0.3)
    assert max(module_products(model)) <= 1e-6
    assert abs(ours.mean().item()) < 3 * ours.std().item() / len(ours) ** 0.5


def test_an_initialisation_that_looks_at_the_base_weights_is_kept():
    model = make_lora(make_small_llama(), init_lora_weights="pissa")
    before = lora_weights(model)
    assert not adapters.initialize_lora(model, seed=5)
    assert all(torch.equal(value, before[name]) for name, value in lora_weights(model).items())


@pytest.mark.parametrize(
    "targets", [["q_proj", "down_proj"], r".*\.(q_proj|down_proj)", "all-linear"], ids=["list", "regex", "all-linear"]
)
def test_stock_peft_rebuilds_exactly_the_layers_that_are_left(tmp_path, targets):
    model = make_lora(make_small_llama(), targets)
    trainer = make_trainer(model, tmp_path)
    stack = find_layer_stack(model)
    adapters.remove_unselected(Run.of(trainer), stack, stack.lora_modules[1] + stack.lora_modules[4])
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.1)
    AdapterWriter(Run.of(trainer)).save(tmp_path / "adapter")

    rebuilt = PeftModel.from_pretrained(make_small_llama(), tmp_path / "adapter").eval()
    assert set(find_lora_modules(rebuilt.get_base_model())) == set(find_lora_modules(model.get_base_model()))
    tokens = torch.arange(3, 33)[None]
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(tokens).logits, model.eval()(tokens).logits, atol=1e-6, rtol=1e-6)
    assert not model.get_base_model().model.layers[0].self_attn.q_proj.__class__.__module__.startswith("peft")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == (
        ["down_proj", "q_proj"] if targets != "all-linear" else sorted(ALL_LINEAR)
    )
    assert config["layers_to_transform"] == [1, 4] and config["layers_pattern"] == ["layers"]


def make_small_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=4, n_head=4))


CONV1D = {"targets": ["c_attn", "c_proj"], "fan_in_fan_out": True}


@pytest.mark.parametrize(
    ("make", "settings", "method"),
    [
        *((make_small_llama, {}, method) for method in (*SEEDED, *RESTORED)),
        (make_small_llama, {"use_rslora": True}, "pissa"),
        (make_small_gpt2, CONV1D, "pissa"),
    ],
)
def test_layers_that_lose_their_lora_have_the_base_weights_that_they_had(tmp_path, make, settings, method):
    before = make().state_dict()
    model = make_lora(make(), init_lora_weights=method, **settings)
    trainer = make_trainer(model, tmp_path)
    stack = find_layer_stack(model)
    adapters.remove_unselected(Run.of(trainer), stack, stack.lora_modules[1] + stack.lora_modules[3])
    after = model.get_base_model().state_dict()
    removed = {f"{name}.weight" for layer in (0, 2) for name in stack.lora_modules[layer]}
    assert removed <= before.keys() & after.keys()
    for name in removed:
        torch.testing.assert_close(after[name], before[name], atol=1e-7, rtol=1e-6)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) * 0.1
    AdapterWriter(Run.of(trainer)).save(tmp_path / "adapter")
    rebuilt = PeftModel.from_pretrained(make(), tmp_path / "adapter").eval()
    tokens = torch.arange(3, 33)[None]
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(tokens).logits, model.eval()(tokens).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (
            make_small_gpt2,
            {**CONV1D, "init_lora_weights": "olora"},
            "'olora' takes transformer.h.0.attn.c_attn, a Conv",
        ),
        (
            lambda: make_small_llama().to(torch.bfloat16),
            {"init_lora_weights": "pissa"},
            "base weights in float32.* that of model.layers.0.self_attn.q_proj is bfloat16",
        ),
    ],
)
def test_base_weights_that_cannot_be_what_they_were_are_refused(tmp_path, make, settings, message):
    model = make_lora(make(), **settings)
    trainer = make_trainer(model, tmp_path)
    stack = find_layer_stack(model)
    with pytest.raises(LayerselError, match=message):
        adapters.remove_unselected(Run.of(trainer), stack, stack.lora_modules[1])


class Tower(torch.nn.Module):
    """Two stacks of layers with modules of the same names, and a module that is named as one inside another."""

    def __init__(self):
        super().__init__()
        for name in ("text", "vision"):
            layers = [
                torch.nn.ModuleDict({"proj": torch.nn.Linear(4, 4), "out": torch.nn.Linear(4, 4)}) for _ in range(3)
            ]
            setattr(self, name, torch.nn.ModuleDict({"layers": torch.nn.ModuleList(layers)}))
        self.head = torch.nn.Linear(4, 4)
        self.inner = torch.nn.ModuleDict({"head": torch.nn.Linear(4, 4)})


@pytest.mark.parametrize(
    ("kept", "target", "layers"),
    [
        (["text.layers.1.proj", "vision.layers.1.proj"], ["proj"], [1]),
        (
            ["text.layers.0.proj", "text.layers.0.out", "vision.layers.0.proj", "vision.layers.0.out"],
            ["out", "proj"],
            [0],
        ),
        (["text.layers.1.proj", "text.layers.2.proj"], ["text.layers.1.proj", "text.layers.2.proj"], None),
        (["text.layers.0.proj", "vision.layers.1.out"], ["text.layers.0.proj", "vision.layers.1.out"], None),
        (["text.layers.1.proj", "inner.head"], ["inner.head", "text.layers.1.proj"], None),
        (["text.layers.1.proj", "head"], r"head|text\.layers\.1\.proj", None),
    ],
)
def test_the_configuration_names_the_modules_that_carry_lora_and_no_other(kept, target, layers):
    model = get_peft_model(Tower(), LoraConfig(target_modules=["proj", "out", "head"]))
    base = model.get_base_model()
    for name in set(find_lora_modules(base)) - set(kept):
        base.set_submodule(name, base.get_submodule(name).base_layer)
    config = model.peft_config["default"]
    adapters.name_exactly(config, base)
    assert (config.target_modules, config.layers_to_transform) == (target, layers)
    assert set(find_lora_modules(get_peft_model(Tower(), config).get_base_model())) == set(kept)


def test_naming_the_modules_takes_time_in_proportion_to_their_number():
    size = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    models = [make_lora(make_small_llama(layers, **size), ALL_LINEAR) for layers in (100, 400)]

    def measure(model) -> float:
        times = []
        for _ in range(3):
            started = time.process_time()  # others may share the processor
            adapters.name_exactly(get_config(model), model.get_base_model())
            times.append(time.process_time() - started)
        return min(times)

    few, many = map(measure, models)
    assert many / few < 8, "4 would be in proportion, 16 quadratic"


def test_modules_to_save_are_in_the_file(tmp_path):
    model = make_lora(make_small_llama(), modules_to_save=["lm_head"])
    trainer = make_trainer(model, tmp_path)
    stack = find_layer_stack(model)
    adapters.remove_unselected(Run.of(trainer), stack, stack.lora_modules[1])
    torch.nn.init.normal_(model.get_base_model().lm_head.modules_to_save["default"].weight)
    AdapterWriter(Run.of(trainer)).save(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    head = model.get_base_model().lm_head.modules_to_save["default"].weight
    assert torch.equal(saved["base_model.model.lm_head.weight"], head)
    rebuilt = PeftModel.from_pretrained(make_small_llama(), tmp_path / "adapter")
    tokens = torch.arange(3, 33)[None]
    with torch.no_grad():
        torch.testing.assert_close(rebuilt.eval()(tokens).logits, model.eval()(tokens).logits, atol=1e-6, rtol=1e-6)


def test_an_interrupted_write_leaves_the_files_that_were_there(tmp_path, monkeypatch):
    model = make_lora(make_small_llama())
    trainer = make_trainer(model, tmp_path)
    AdapterWriter(Run.of(trainer)).save(tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(layouts, "save_tensors", fail)
    with pytest.raises(LayerselError, match=r"adapter_model.safetensors cannot be written \(disk full\)"):
        AdapterWriter(Run.of(trainer)).save(tmp_path / "adapter")
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_lora(make_small_llama(), ["embed_tokens"]), "embed_tokens is a Embedding, whose LoRA"),
        (lambda: make_lora(make_small_llama(), use_dora=True), "peft_use_dora: true cannot be combined with"),
        (lambda: make_lora(make_small_llama(), init_lora_weights="pissa"), "peft_init_lora_weights: 'pissa'"),
        (lambda: make_lora(make_small_llama(attention_bias=True), ["q_proj"], lora_bias=True), "is not plain LoRA"),
    ],
)
def test_what_is_more_than_linear_lora_is_refused(tmp_path, make, message):
    with pytest.raises(LayerselError, match=message):
        run = Run.of(make_trainer(make(), tmp_path))
        adapters.check_plain_lora(run, run.lora_modules, "layersel.l1ra")


def test_frozen_weights_stay_frozen_when_the_adapter_was_switched_off(tmp_path):
    model = make_lora(make_small_llama())
    adapters.keep_trained_alone(model)
    stack = find_layer_stack(model)
    adapters.freeze_unselected(Run.of(make_trainer(model, tmp_path)), stack, stack.lora_modules[1])
    twin = copy.deepcopy(model)
    tokens = torch.arange(3, 33)[None]

    def trained(model) -> set[str]:
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    before = trained(model)
    assert len(before) == 2 * 3
    for parameter in (p for p in twin.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter)
    plain = model(tokens).logits
    assert not torch.equal(twin(tokens).logits, plain)
    with twin.disable_adapter():
        assert torch.equal(twin(tokens).logits, plain)
        assert trained(twin) == set()
        assert trained(model) == before, "a copy switches its own adapter off"
    assert trained(twin) == trained(model) == before
    assert not torch.equal(twin(tokens).logits, plain)
