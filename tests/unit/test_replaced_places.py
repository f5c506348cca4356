"""Every place where a method of somebody else's object is replaced: whoever calls it notices nothing."""

import contextlib
import copy
import inspect
import sys
import types
from pathlib import Path

import pytest
import torch
from helpers.experts import make_experts
from helpers.models import make_lora, make_rows, make_selection, make_small_llama, make_trainer
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Trainer

import axolotl_layersel
from axolotl_layersel.config.flexora import FlexoraConfig
from axolotl_layersel.config.l1ra import L1RAConfig
from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.config.selection import SelectionConfig
from axolotl_layersel.lora import kernels
from axolotl_layersel.lora.modules import find_lora_modules
from axolotl_layersel.lora.switching import KEEPING_METHODS
from axolotl_layersel.selection.backward_cut import TruncatedBackward
from axolotl_layersel.selection.passes.backward import watching_gradients
from axolotl_layersel.selection.passes.forward import scoring
from axolotl_layersel.selection.passes.likelihood import replaying
from axolotl_layersel.training import saving
from axolotl_layersel.training.prepare import prepare_trainer

PACKAGE = str(Path(axolotl_layersel.__file__).parent)
FREEZE = LayerselConfig(selection=SelectionConfig(method="last", ratio=0.5, unselected="freeze"))
MOVING = LayerselConfig(
    selection=SelectionConfig(method="last", ratio=0.5), l1ra=L1RAConfig(update_ratio=0.2, move_ratio=0.3)
)
# What takes the place of a method for good, by object: the trainer, the PEFT model, its tuner.
TRAINER = {
    "_load_best_model",
    "_run_epoch",
    "_save",
    "create_model_card",
    "get_eval_dataloader",
    "get_train_dataloader",
    "save_model",
    "train",
    "training_step",  # with l1ra
}
MODEL = {"save_pretrained", "load_adapter"}  # the latter with l1ra
TUNER = set(KEEPING_METHODS)


def is_ours(value: object) -> bool:
    """Return whether a function's code is this package's."""
    code = getattr(getattr(value, "__func__", value), "__code__", None)
    return code is not None and code.co_filename.startswith(PACKAGE)


def list_replaced(thing: object) -> dict[str, object]:
    """Return what of an object takes the place of a method of its class, by this package's code."""
    return {name: value for name, value in vars(thing).items() if is_ours(value) and hasattr(type(thing), name)}


def check_signatures(thing: object) -> None:
    """Assert that whatever was replaced looks like the method of the class, bound to the object."""
    for name, value in list_replaced(thing).items():
        original = getattr(type(thing), name).__get__(thing)
        assert inspect.signature(value) == inspect.signature(original), name
        assert (value.__name__, value.__doc__) == (original.__name__, original.__doc__), name


def prepare(folder, block=FREEZE, **settings):
    model = make_lora(make_small_llama(), task_type="CAUSAL_LM", **settings)
    trainer = make_trainer(model, folder, make_rows(24), max_steps=12, save_strategy="no")
    prepare_trainer(trainer, block)
    return trainer


def test_what_is_replaced_for_good_is_in_the_table_and_looks_like_what_was_there(tmp_path):
    found = {"trainer": set(), "model": set(), "tuner": set()}
    for name, block in {"freeze": FREEZE, "moving": MOVING}.items():
        trainer = prepare(tmp_path / name, block)
        model = trainer.model
        for key, thing in {"trainer": trainer, "model": model, "tuner": model.base_model}.items():
            found[key] |= set(list_replaced(thing))
            check_signatures(thing)
        for module in model.get_base_model().modules():
            assert not list_replaced(module), "nothing of the base model is replaced before it trains"
        for thing in (trainer.accelerator, trainer.args, trainer.callback_handler, trainer.train_dataset):
            assert not list_replaced(thing)
    assert found == {"trainer": TRAINER, "model": MODEL, "tuner": TUNER}
    added = [name for name, value in vars(trainer).items() if is_ours(value) and not hasattr(Trainer, name)]
    assert added == ["save_adapter"]


def list_functions() -> set[tuple[str, str]]:
    """Return where a function of this package lies in a module of somebody else's, under what name."""
    libraries = ("accelerate", "axolotl", "deepspeed", "peft", "torch", "transformers", "trl")
    return {
        (module, name)
        for module, content in list(sys.modules.items())
        if content is not None and module.partition(".")[0] in libraries
        for name, value in list(vars(content).items())
        if isinstance(value, types.FunctionType) and is_ours(value)
    }


def test_functions_of_other_packages_that_are_replaced_look_like_what_was_there(tmp_path, monkeypatch):
    from axolotl.integrations.expert_parallel import shard
    from axolotl.kernels import lora

    for module, name in ((lora, "get_lora_parameters"), (shard, "save_fsdp2_lora_adapter")):
        original = getattr(module, name)
        while hasattr(original, "__wrapped__"):  # another test has replaced it
            original = original.__wrapped__
        monkeypatch.setattr(module, name, original)
    before = list_functions()
    originals = {name: getattr(module, name) for module, name in ((lora, "get_lora_parameters"),)}
    originals["save_fsdp2_lora_adapter"] = shard.save_fsdp2_lora_adapter
    trainer = prepare(tmp_path)
    kernels.give_gates_to_kernels()
    saving.take_over_fsdp2_writer(trainer)
    replaced = {
        "get_lora_parameters": lora.get_lora_parameters,
        "save_fsdp2_lora_adapter": shard.save_fsdp2_lora_adapter,
    }
    assert list_functions() - before == {
        ("axolotl.kernels.lora", "get_lora_parameters"),
        ("axolotl.integrations.expert_parallel.shard", "save_fsdp2_lora_adapter"),
    }
    for name, function in replaced.items():
        assert function is not originals[name]
        assert inspect.signature(function) == inspect.signature(originals[name])
        assert (function.__name__, function.__doc__) == (originals[name].__name__, originals[name].__doc__)


@contextlib.contextmanager
def truncated(trainer):
    selection = make_selection(trainer, "cka", num_samples=4)
    cut = TruncatedBackward(trainer.model, selection.stack)
    cut.install()
    yield trainer.model.get_base_model()
    cut.remove()


@contextlib.contextmanager
def scored(trainer):
    with scoring(make_selection(trainer, "fisher", num_samples=4)):
        yield trainer.model.get_base_model()


@contextlib.contextmanager
def replayed(trainer):
    with replaying(trainer.model.get_base_model().model):
        yield trainer.model.get_base_model()


# What takes the place of a method for a while, and where.
FOR_A_WHILE = {
    truncated: {"gradient_checkpointing_enable": 1},
    scored: {"forward": 6},
    replayed: {"forward": 1},
}


@pytest.mark.parametrize("change", FOR_A_WHILE)
def test_what_is_replaced_for_a_while_looks_like_what_was_there_and_comes_back(change, tmp_path):
    trainer = make_trainer(make_lora(make_small_llama(), task_type="CAUSAL_LM"), tmp_path)
    with change(trainer) as base:
        replaced = [module for module in base.modules() if list_replaced(module)]
        names = [name for module in replaced for name in list_replaced(module)]
        assert {name: names.count(name) for name in names} == FOR_A_WHILE[change]
        for module in replaced:
            check_signatures(module)
    assert not any(list_replaced(module) for module in trainer.model.modules())


def test_what_computes_lora_on_experts_looks_like_what_was_there_while_its_gradient_is_recorded():
    base = make_experts("Mixtral").get_base_model()
    with watching_gradients(list(find_lora_modules(base).values()), lambda *gradients: None):
        replaced = [module for module in base.modules() if list_replaced(module)]
        assert [name for module in replaced for name in list_replaced(module)] == ["get_delta_weight"] * 2 * 3
        for module in replaced:
            check_signatures(module)
    assert not any(list_replaced(module) for module in base.modules())


@pytest.mark.trains
def test_what_a_search_replaces_in_the_trainer_looks_like_what_was_there_and_comes_back(tmp_path):
    model = make_lora(make_small_llama(), task_type="CAUSAL_LM")
    trainer, seen = make_trainer(model, tmp_path, make_rows(24), save_strategy="no"), []

    def look(*inputs) -> None:
        if "training_step" in list_replaced(trainer):
            seen.append(trainer.training_step)
            check_signatures(trainer)

    model.get_base_model().model.register_forward_pre_hook(look)
    search = SelectionConfig(method="flexora", ratio=0.5, flexora=FlexoraConfig(steps=2, val_samples=4))
    prepare_trainer(trainer, LayerselConfig(selection=search))
    assert seen and "training_step" not in vars(trainer)


# --- How they behave --------------------------------------------------------------------------------------------------

CALLS = {
    "a folder": ((), {}),
    "safetensors by place": ((True,), {}),
    "safetensors by name": ((), {"safe_serialization": True}),
    "PyTorch's format by place": ((False,), {}),
    "PyTorch's format by name": ((), {"safe_serialization": False}),
    "one adapter": ((True, ["default"]), {}),
    "the other adapter": ((), {"selected_adapters": ["other"]}),
    "both": ((True, ["default", "other"]), {}),
    "both in PyTorch's format": ((False, ["other", "default"]), {}),
    "with embeddings": ((True, ["default"], True), {}),
    "without embeddings": ((), {"save_embedding_layers": False}),
    "not the main process by place": ((True, None, "auto", False), {}),
    "not the main process by name": ((), {"is_main_process": False}),
    "a keyword for a hub": ((), {"revision": "main"}),
}


def read(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


@pytest.mark.parametrize("call", CALLS)
def test_a_model_saves_what_peft_saves_however_it_is_called(call, tmp_path):
    args, options = CALLS[call]
    trainer = prepare(tmp_path)
    trainer.model.add_adapter("other", trainer.model.peft_config["default"])
    for parameter in (p for n, p in trainer.model.named_parameters() if "lora_" in n):
        torch.nn.init.normal_(parameter, std=0.1)
    trainer.model.save_pretrained(str(tmp_path / "ours"), *args, **options)
    PeftModel.save_pretrained(trainer.model, str(tmp_path / "peft"), *args, **options)
    ours, peft = (
        {str(path.relative_to(tmp_path / place)): path for path in (tmp_path / place).rglob("*") if path.is_file()}
        for place in ("ours", "peft")
    )
    assert ours.keys() == peft.keys()
    for name in (name for name in ours if name.endswith((".safetensors", ".bin"))):
        one, other = read(ours[name]), read(peft[name])
        assert one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def test_an_adapter_that_there_is_not_is_refused_as_peft_does(tmp_path):
    trainer = prepare(tmp_path)
    with pytest.raises(ValueError, match="You passed an invalid `selected_adapters` arguments"):
        trainer.model.save_pretrained(str(tmp_path / "ours"), selected_adapters=["defalt"])
    with pytest.raises(ValueError, match="should be a directory, not a file"):
        (tmp_path / "file").touch()
        PeftModel.save_pretrained(trainer.model, str(tmp_path / "file"))
    with pytest.raises(TypeError, match="save_directory"):
        trainer.model.save_pretrained()


@pytest.mark.trains
def test_ranks_that_moved_are_folded_in_pytorchs_format_too(tmp_path):
    trainer = prepare(tmp_path, MOVING)
    trainer.train()
    trainer.model.save_pretrained(str(tmp_path / "one"))
    trainer.model.save_pretrained(str(tmp_path / "other"), False)
    one, other = (read(next((tmp_path / place).glob("adapter_model.*"))) for place in ("one", "other"))
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
    tokens = torch.arange(3, 33)[None]
    with torch.no_grad():
        stock = PeftModel.from_pretrained(make_small_llama(), tmp_path / "other").eval()(tokens).logits
        torch.testing.assert_close(stock, trainer.model.eval()(tokens).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("call", [("folder", True), ("folder",), ()], ids=str)
def test_a_trainer_saves_its_model_however_it_is_called(call, tmp_path):
    trainer = prepare(tmp_path)
    call = tuple(str(tmp_path / "folder") if part == "folder" else part for part in call)
    trainer.save_model(*call)
    assert (Path(call[0] if call else tmp_path) / "adapter_model.safetensors").exists()


def test_a_copy_of_a_model_in_which_rank_moves_loads_into_itself(tmp_path):
    trainer = prepare(tmp_path, MOVING)
    twin = copy.deepcopy(trainer.model)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    stock = make_lora(make_small_llama(), r=8, lora_alpha=16, task_type="CAUSAL_LM", layers_to_transform=[3, 4, 5])
    for parameter in (p for p in stock.parameters() if p.requires_grad):
        torch.nn.init.ones_(parameter)
    stock.save_pretrained(str(tmp_path / "stock"))
    twin.load_adapter(str(tmp_path / "stock"), "default")
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert all(value.eq(1).all() for name, value in twin.state_dict().items() if "lora_" in name)
