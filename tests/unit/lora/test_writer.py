"""Saving with a plain Trainer: what is written, what is refused, and that training does not notice."""

import copy
import json

import pytest
import torch
from helpers.corruptions import leave_one_out, round_one, spoil_one, zero_one
from helpers.models import make_lora, make_small_llama, make_trainer
from helpers.writing import BLOCKS, CHOSEN, prepare
from peft import PeftModel
from safetensors.torch import load_file, save_file

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.l1ra import L1RAConfig
from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.l1ra.callback import RankCallback
from axolotl_layersel.lora import layouts
from axolotl_layersel.lora.config import complete_config
from axolotl_layersel.lora.modules import find_lora_modules, get_config
from axolotl_layersel.lora.run import Run
from axolotl_layersel.lora.writer import AdapterWriter


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"task_type": "CAUSAL_LM"},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": [1, 2]},
        {"use_dora": True},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        {"targets": ["embed_tokens", "q_proj"]},
        {"targets": "all-linear", "exclude_modules": ["v_proj", "k_proj"]},
        {"layers_to_transform": [1, 2]},
        {"bias": "all"},
        {"init_lora_weights": "pissa"},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_every_kind_of_lora_is_written_as_peft_would(tmp_path, settings, tied):
    settings = dict(settings)
    targets = settings.pop("targets", ("q_proj", "v_proj", "down_proj"))
    model = make_lora(make_small_llama(layers=3, tie_word_embeddings=tied), targets, **settings)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(str(tmp_path / "peft"))
    run = Run.of(make_trainer(model, tmp_path))
    complete_config(run)
    writer = AdapterWriter(run)
    writer.save(tmp_path / "together")
    writer.save_alone(tmp_path / "alone")
    expected = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    for place in ("together", "alone"):
        written = load_file(tmp_path / place / "adapter_model.safetensors")
        assert written.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in written.items())
        found = json.loads((tmp_path / place / "adapter_config.json").read_text())
        for names in ("target_modules", "exclude_modules"):
            if isinstance(config[names], list):
                config[names].sort()
        config["base_model_name_or_path"] = config["base_model_name_or_path"] or None  # PEFT 0.20.0 writes ""
        assert found == config


@pytest.mark.trains
@pytest.mark.parametrize("block", BLOCKS)
def test_saving_leaves_training_as_it_was(tmp_path, block):
    ends = []
    for steps in (1, 12):
        trainer = prepare(tmp_path / str(steps), BLOCKS[block], save_steps=steps, save_total_limit=1)
        trainer.model.base_model.model.model.layers[1].self_attn.q_proj.lora_dropout["default"] = torch.nn.Dropout(0.1)
        trainer.train()
        weights = load_file(tmp_path / str(steps) / "checkpoint-12" / "adapter_model.safetensors")
        ends.append((weights, torch.get_rng_state()))
        assert trainer.model.training
    (often, state), (once, other) = ends
    assert torch.equal(state, other)
    assert often.keys() == once.keys() and all(torch.equal(value, once[name]) for name, value in often.items())


@pytest.mark.trains
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (zero_one, "contains only zeros"),
        (spoil_one, "holds NaN or infinite numbers"),
        (leave_one_out, "is missing"),
        (round_one, "has dtype torch.bfloat16, not torch.float32"),
    ],
)
def test_a_corrupted_write_stops_the_run_and_leaves_the_last_checkpoint(tmp_path, monkeypatch, block, corrupt, message):
    trainer = prepare(tmp_path, BLOCKS[block], save_total_limit=1)
    written = []

    def save(content, path, **kwargs):
        written.append(path)
        name = next(name for name in content if "layers.1." in name and "lora_A" in name)
        save_file(corrupt(content, name) if len(written) == 2 else content, path, **kwargs)

    monkeypatch.setattr(layouts, "save_tensors", save)
    with pytest.raises(LayerselError, match=f"checkpoint-8/adapter_model.safetensors: .* {message}.*was not kept"):
        trainer.train()
    assert not (tmp_path / "checkpoint-8" / "adapter_model.safetensors").exists()
    assert (tmp_path / "checkpoint-4" / "trainer_state.json").exists()
    loaded = PeftModel.from_pretrained(make_small_llama(), str(tmp_path / "checkpoint-4"))
    assert all(parameter.isfinite().all() for parameter in loaded.parameters())


@pytest.mark.trains
def test_weights_that_became_nan_are_not_written(tmp_path):
    trainer = prepare(tmp_path, CHOSEN, max_steps=1, save_steps=1)
    next(p for p in trainer.model.parameters() if p.requires_grad).data[0, 0] = float("nan")
    with pytest.raises(
        LayerselError, match=r"checkpoint-1/adapter_model.safetensors: .* holds NaN or infinite numbers"
    ):
        trainer.train()


def find_ranks(trainer):
    return next(c.ranks for c in trainer.callback_handler.callbacks if isinstance(c, RankCallback))


@pytest.fixture
def gated(tmp_path):
    """A trainer whose gates are all one half, and a fold that forgets them."""
    trainer = prepare(tmp_path, LayerselConfig(l1ra=L1RAConfig(rule="pressure", update_ratio=0.2)))
    for parameter in (p for p in trainer.model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter)
    ranks = find_ranks(trainer)
    ranks.gates.values.mul_(0.5)

    def forget(tensors, config):
        ranks.gates.values.mul_(2)
        folded = ranks.fold(tensors, config)
        ranks.gates.values.mul_(0.5)
        return folded

    return trainer, ranks, forget


def test_gates_that_are_not_in_the_file_are_seen(gated, tmp_path):
    trainer, ranks, forget = gated
    AdapterWriter(Run.of(trainer), ranks.fold).save(tmp_path / "right")
    with pytest.raises(
        LayerselError, match=r"the LoRA output of model.layers.0.self_attn.q_proj would differ by up to"
    ):
        AdapterWriter(Run.of(trainer), forget).save(tmp_path / "wrong")
    assert not (tmp_path / "wrong" / "adapter_model.safetensors").exists()


@pytest.mark.trains
def test_a_module_that_computes_past_its_gates_stops_the_run_though_its_file_is_right(tmp_path):
    """Fused kernels do that. Its gates get no gradient, which the second update of rank sees on every engine."""
    trainer = prepare(tmp_path, LayerselConfig(l1ra=L1RAConfig(rule="pressure", update_ratio=0.2)), learning_rate=1e-2)
    name, module = next(iter(find_ranks(trainer).modules.items()))
    down, up = (linears["default"] for linears in (module.lora_A, module.lora_B))
    module.forward = lambda hidden: (
        module.base_layer(hidden) + hidden @ down.weight.T @ up.weight.T * module.scaling["default"]
    )
    with pytest.raises(LayerselError, match=f"layersel.l1ra: {name} trains, but no gradient has reached its gates"):
        trainer.train()
    assert trainer.state.global_step < 12


def change_rest(tensors: dict, config):
    return {name: value + 1e-3 if "lm_head" in name else value for name, value in tensors.items()}, config


def change_rank(tensors: dict, config):
    config = copy.copy(config)
    config.r += 1
    config.lora_alpha = config.lora_alpha * config.r / (config.r - 1)
    return tensors, config


def change_one_rank(tensors: dict, config):
    config = copy.copy(config)
    config.rank_pattern, config.alpha_pattern = {"layers.4.self_attn.q_proj": 2}, {"layers.4.self_attn.q_proj": 4}
    return tensors, config


def change_scaling(tensors: dict, config):
    config = copy.copy(config)
    config.use_rslora = True
    return tensors, config


def forget_dora(tensors: dict, config):
    config = copy.copy(config)
    config.use_dora = False
    return tensors, config


@pytest.mark.parametrize(
    ("fold", "settings", "message"),
    [
        (change_rest, {"modules_to_save": ["lm_head"]}, "model.safetensors: .*lm_head.weight has other values than"),
        (change_rank, {}, "config.json: PEFT would give LoRA on model.layers.0.* rank 5, but its matrices have"),
        (change_one_rank, {}, "config.json: PEFT would give LoRA on model.layers.4.self_attn.q_proj rank 2"),
        (change_scaling, {}, "once loaded, the LoRA output of model.layers.0.* would differ by"),
        (change_rank, {"targets": ["embed_tokens"]}, "LoRA on model.embed_tokens rank 5"),
        (change_scaling, {"targets": ["embed_tokens"]}, "PEFT would scale LoRA on model.embed_tokens by"),
        (forget_dora, {"use_dora": True}, "config.json: use_dora: False contradicts model.layers.0"),
    ],
)
def test_a_file_of_which_peft_would_build_something_else_is_seen(tmp_path, fold, settings, message):
    settings = {"targets": ["q_proj"], **settings}
    model = make_lora(make_small_llama(), **settings)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.1)
    run = Run.of(make_trainer(model, tmp_path))
    complete_config(run)
    AdapterWriter(run).save(tmp_path / "right")
    with pytest.raises(LayerselError, match=message):
        AdapterWriter(run, fold).save(tmp_path / "wrong")
    assert not (tmp_path / "wrong" / "adapter_model.safetensors").exists()


def test_a_wrong_scaling_is_seen_before_b_is_more_than_zero(tmp_path):
    trainer = prepare(tmp_path, CHOSEN)
    next(iter(find_lora_modules(trainer.model).values())).scaling["default"] = 5.0
    with pytest.raises(LayerselError, match=r"PEFT would scale LoRA on model.* by 2.0, training scales it by 5.0"):
        trainer.save_model()


def test_a_configuration_that_names_other_modules_is_seen(tmp_path):
    trainer = prepare(tmp_path, CHOSEN)
    config = get_config(trainer.model)
    config.layers_to_transform = [1]
    with pytest.raises(LayerselError, match=r"adapter_config.json: PEFT would put no LoRA on model.layers.4"):
        trainer.save_model()
    config.layers_to_transform = None
    with pytest.raises(LayerselError, match=r"adapter_config.json: PEFT cannot read it \(When `layers_pattern` is"):
        trainer.save_model()
    config.layers_pattern = None
    with pytest.raises(LayerselError, match=r"adapter_config.json: PEFT would put LoRA on model.layers.0"):
        trainer.save_model()


def test_a_scaling_that_the_configuration_does_not_know_is_seen(tmp_path):
    trainer = prepare(tmp_path, CHOSEN)
    for parameter in (p for p in trainer.model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter)
    next(iter(find_lora_modules(trainer.model).values())).scaling["default"] = 5.0
    with pytest.raises(LayerselError, match=r"once loaded, the LoRA output of model.layers.1.* would differ by"):
        trainer.save_model()


def test_models_that_share_nothing_with_the_run_save_themselves(tmp_path):
    trainer = prepare(tmp_path, CHOSEN)
    twin = copy.deepcopy(trainer.model)
    for parameter in (p for p in twin.parameters() if p.requires_grad):
        torch.nn.init.ones_(parameter)
    twin.save_pretrained(str(tmp_path / "twin"))
    assert all(value.eq(1).all() for value in load_file(tmp_path / "twin" / "adapter_model.safetensors").values())
    state = {name: value * 0 + 2 for name, value in trainer.model.state_dict().items()}
    trainer.model.save_pretrained(str(tmp_path / "given"), state_dict=state)
    assert all(value.eq(2).all() for value in load_file(tmp_path / "given" / "adapter_model.safetensors").values())


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
