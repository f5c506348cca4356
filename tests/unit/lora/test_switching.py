"""Trainers that compare with a reference switch adapters in every loss: what is frozen stays so, on every path."""

import ast
import copy
import inspect
import textwrap

import pytest
import torch
from datasets import Dataset
from helpers.adapter_switches import PROMPTS, make_arguments, make_dpo, make_trained_lora
from helpers.models import make_lora, make_rows, make_small_llama, make_trainer
from helpers.multimodal import make_tokenizer
from peft import LoraConfig, get_peft_model
from peft.tuners import tuners_utils
from peft.tuners.lora import LoraModel
from trl import GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, RLOOConfig, RLOOTrainer

from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.config.selection import SelectionConfig
from axolotl_layersel.lora.layers import find_layer_stack
from axolotl_layersel.lora.removal import freeze_unselected
from axolotl_layersel.lora.run import Run
from axolotl_layersel.lora.switching import KEEPING_METHODS, preserve_trained
from axolotl_layersel.training.prepare import prepare_trainer

FROZEN = LayerselConfig(selection=SelectionConfig(method="explicit", layers=[3, 5], unselected="freeze"))
JUDGED = [{**row, "completion": f" {i} 11 12", "label": i % 2 == 0} for i, row in enumerate(PROMPTS, 20)]
GENERATING = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}


def reward_length(completions, **_) -> list[float]:
    return [float(len(completion)) for completion in completions]


def make_kto(model, folder, **arguments):
    arguments = make_arguments(KTOConfig, folder, **arguments)
    return KTOTrainer(model, args=arguments, train_dataset=Dataset.from_list(JUDGED), processing_class=make_tokenizer())


def make_grpo(model, folder, **arguments):
    arguments, rows = make_arguments(GRPOConfig, folder, **GENERATING, **arguments), Dataset.from_list(PROMPTS)
    return GRPOTrainer(model, [reward_length], arguments, rows, processing_class=make_tokenizer())


def make_rloo(model, folder, **arguments):
    arguments, rows = make_arguments(RLOOConfig, folder, **GENERATING, **arguments), Dataset.from_list(PROMPTS)
    return RLOOTrainer(model, [reward_length], arguments, rows, processing_class=make_tokenizer())


TRAINERS = {"DPO": make_dpo, "KTO": make_kto, "GRPO": make_grpo, "RLOO": make_rloo}


def list_trained(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def make_constant(model, layers: list[int]) -> None:
    """Let LoRA in ``layers`` be buffers, which nothing can train."""
    for name, module in model.named_modules():
        if name.endswith((".lora_A.default", ".lora_B.default")) and int(name.split(".layers.")[1][0]) in layers:
            weight = module.weight.data
            del module.weight
            module.register_buffer("weight", weight)


def watch_layers(model) -> list[set[bool]]:
    """Return, by layer, whether its output had a graph in the forward passes that are to come with gradients."""
    graphs = [set() for _ in range(6)]

    def note(place: int, output: torch.Tensor) -> None:
        if torch.is_grad_enabled():
            graphs[place].add(output.requires_grad)

    for place, layer in enumerate(model.get_base_model().model.layers):
        layer.self_attn.q_proj.register_forward_hook(lambda module, args, output, place=place: note(place, output))
    return graphs


@pytest.mark.trains
@pytest.mark.parametrize("kind", TRAINERS)
def test_frozen_lora_takes_no_part_in_a_trainer_that_switches_adapters(kind, tmp_path):
    trainer = TRAINERS[kind](make_trained_lora(), tmp_path / "frozen")
    assert set(trainer.model.peft_config) == {"default", "ref"}, "the trainer's own reference is a second adapter"
    prepare_trainer(trainer, FROZEN, continues_adapter=True)
    graphs, before = watch_layers(trainer.model), copy.deepcopy(trainer.model.state_dict())
    trainer.train()

    plain = TRAINERS[kind](make_trained_lora(), tmp_path / "constant")
    make_constant(plain.model, [0, 1, 2, 4])
    plain.train()

    norms, expected = (
        [log["grad_norm"] for log in each.state.log_history if "grad_norm" in log] for each in (trainer, plain)
    )
    assert len(norms) == 3 and min(expected) > 1e-4, "gradients are clipped"
    assert norms == pytest.approx(expected, rel=1e-4)
    after, reference = trainer.model.state_dict(), plain.model.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == list_trained(trainer.model) and len(moved) == 2 * 3 * 2
    for name in moved:
        change = (reference[name] - before[name]).norm()
        assert (after[name] - reference[name]).norm() <= 1e-3 * change, name
    assert graphs == [{False}] * 3 + [{True}] * 3, "the backward pass ends where nothing below trains"


def freeze_above(folder, rows=None):
    """Return a plain trainer whose model has LoRA that is frozen in the layers below."""
    trainer = make_trainer(make_trained_lora(), folder, rows or make_rows(8), max_steps=1, save_strategy="no")
    prepare_trainer(trainer, FROZEN, continues_adapter=True)
    return trainer


def do_nothing(model):
    """Training itself changes nothing."""


def add(model):
    model.add_adapter("ref", model.peft_config["default"])


def add_and_switch(model):
    add(model)
    model.set_adapter("ref")
    assert not any(".default." in name for name in list_trained(model))
    model.set_adapter("default")


def add_and_delete(model):
    add(model)
    model.set_adapter("ref")
    model.delete_adapter("ref")


def switch_off(model):
    with model.disable_adapter():
        assert not list_trained(model)


def switch_off_twice(model):
    add(model)
    with model.disable_adapter():
        model.set_adapter("ref")
        model.set_adapter("default")
    with model.disable_adapter(), model.disable_adapter():
        pass


def stop_and_go(model):
    model.set_requires_grad("default", False)
    assert not list_trained(model)
    model.set_requires_grad(["default"], True)


def ask_for_gradients(model):
    model.set_requires_grad("default")


def set_again(model):
    model.set_adapter("default")
    model.base_model.set_adapter(["default"], True)


def merge(model):
    model.merge_adapter()
    model.unmerge_adapter()


ACTS = [do_nothing, add, add_and_switch, add_and_delete, switch_off, switch_off_twice, stop_and_go, ask_for_gradients]
ACTS += [set_again, merge]


@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__)
def test_what_trains_is_the_same_after_whatever_peft_is_asked(act, tmp_path):
    model = freeze_above(tmp_path).model
    trained = list_trained(model)
    assert len(trained) == 2 * 3 * 2
    for twin in (copy.deepcopy(model), model):
        act(twin)
        assert list_trained(twin) == trained
        assert list_trained(model) == trained, "a copy switches its own adapter"


def test_what_is_held_for_a_while_is_held_through_a_switch(tmp_path):
    """A search holds weights while the gates' gradient is computed, in a loss that switches adapters."""
    model = freeze_above(tmp_path).model
    add(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    add_and_switch_only(model)
    assert not list_trained(model)


def add_and_switch_only(model):
    model.set_adapter("ref")
    model.set_adapter("default")


def test_a_model_is_prepared_for_one_adapter_after_the_other(tmp_path):
    # The adapter named default comes second: PEFT saves any other one beside it to the same files, which is refused.
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    model = get_peft_model(make_small_llama(), config, adapter_name="first")
    for name in ("first", "default"):
        if name == "default":
            model.add_adapter(name, config)
            model.set_adapter(name)
        trainer = make_trainer(model, tmp_path / name, make_rows(8), max_steps=1, save_strategy="no")
        prepare_trainer(trainer, FROZEN)
        trained = list_trained(model)
        assert len(trained) == 2 * 3 * 2 and all(f".{name}." in parameter for parameter in trained)
    switch_off(model)
    model.set_adapter("first")
    model.set_adapter("default")
    assert list_trained(model) == trained


# What PEFT 0.20.0's tuners call to let weights train or not, and which of their methods that are called by others do.
SWITCHING = {
    *("requires_grad_", "set_requires_grad", "set_adapter", "enable_adapters", "delete_adapter", "inject_adapter"),
    *("_enable_adapter_layers", "_mark_only_adapters_as_trainable", "set_additional_trainable_modules"),
}
CALLED_BY_OTHERS = {
    *("__init__", "_mark_only_adapters_as_trainable", "_enable_adapter_layers"),
    *("_create_and_replace", "add_weighted_adapter"),
}


def find_calls(method: ast.AST) -> set[str]:
    """Return the names of what is called, and of attributes that are set, in a method."""
    calls = [node.func for node in ast.walk(method) if isinstance(node, ast.Call)]
    called = {call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "") for call in calls}
    stored = [node for node in ast.walk(method) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
    return called | {f"{node.attr}_" for node in stored}


def test_every_method_of_pefts_tuners_by_which_weights_train_is_kept():
    methods = [
        method
        for kind in (tuners_utils.BaseTuner, LoraModel)
        for method in ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body
        if isinstance(method, ast.FunctionDef)
    ]
    switching = {method.name for method in methods if SWITCHING & find_calls(method)}
    assert switching - CALLED_BY_OTHERS == set(KEEPING_METHODS)


def test_frozen_weights_stay_frozen_when_the_adapter_was_switched_off(tmp_path):
    model = make_lora(make_small_llama())
    preserve_trained(model)
    stack = find_layer_stack(model)
    freeze_unselected(Run.of(make_trainer(model, tmp_path)), stack, stack.lora_modules[1])
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
