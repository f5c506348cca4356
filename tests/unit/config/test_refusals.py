"""A refusal is one sentence, whether the YAML file or the trainer shows the reason; and what is unknown raises."""

import types
from collections.abc import Callable

import pytest
from accelerate.parallelism_config import ParallelismConfig
from helpers.generation import make_generating_trainer
from helpers.models import make_lora, make_small_llama, make_trainer
from helpers.refusals import say_by_file
from transformers import Trainer

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.flexora import FlexoraConfig
from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.config.selection import SelectionConfig
from axolotl_layersel.engines import load_class
from axolotl_layersel.training.prepare import prepare_trainer

FLEXORA = {"selection": {"method": "flexora", "flexora": {"steps": 4, "val_samples": 4}}}
UNROLLED = {"selection": {"method": "flexora", "flexora": {"hypergradient": "unrolled", "val_samples": 4}}}
L1RA = {"l1ra": {}}


def say_by_trainer(block: dict, trainer: Trainer) -> str:
    """Return what a trainer is refused with."""
    with pytest.raises(LayerselError) as caught:
        prepare_trainer(trainer, LayerselConfig(**block))
    return str(caught.value)


def change_argument(name: str, value: object) -> Callable[[Trainer], None]:
    return lambda trainer: setattr(trainer.args, name, value)


def split(**sizes: int) -> Callable[[Trainer], None]:
    """Let a trainer's accelerator say that it splits something, without what all accelerators share."""

    def change(trainer: Trainer) -> None:
        parallelism = {"parallelism_config": ParallelismConfig(**sizes)}
        trainer.accelerator.state = types.SimpleNamespace(**{**vars(trainer.accelerator.state), **parallelism})

    return change


def use_flash_attention(trainer: Trainer) -> None:
    trainer.model.config._attn_implementation = "flash_attention_2"


def leave(trainer: Trainer) -> None:
    """The adapter itself is what is refused."""


REFUSALS = {
    "fp16 with l1ra": (L1RA, {"fp16": True}, {}, change_argument("fp16", True)),
    "fp16 with flexora": (FLEXORA, {"fp16": True}, {}, change_argument("fp16", True)),
    "starting over with l1ra": (
        L1RA,
        {"auto_find_batch_size": True},
        {},
        change_argument("auto_find_batch_size", True),
    ),
    "starting over with flexora": (
        FLEXORA,
        {"auto_find_batch_size": True},
        {},
        change_argument("auto_find_batch_size", True),
    ),
    "DoRA with l1ra": (L1RA, {"peft_use_dora": True}, {"use_dora": True}, leave),
    "DoRA with flexora": (FLEXORA, {"peft_use_dora": True}, {"use_dora": True}, leave),
    "PiSSA with l1ra": (L1RA, {"peft_init_lora_weights": "pissa"}, {"init_lora_weights": "pissa"}, leave),
    "an initialisation that is not known": (
        {"selection": {"method": "first"}},
        {"peft_init_lora_weights": "eva"},
        {},
        lambda trainer: setattr(trainer.model.peft_config["default"], "init_lora_weights", "eva"),
    ),
    "an optimizer without moments": (L1RA, {"optimizer": "adafactor"}, {}, change_argument("optim", "adafactor")),
    "a highest rank below the first": ({"l1ra": {"max_rank": 3}}, {}, {}, leave),
    "a lowest rank above the first": ({"l1ra": {"min_rank": 5}}, {}, {}, leave),
    "PiSSA with ranks by score": (
        {"selection": {"method": "gradient"}},
        {"peft_init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa"},
        leave,
    ),
    "no room for more rank": ({"l1ra": {"max_rank": 4}}, {}, {}, leave),
    "ranks that are equal by force": ({"selection": {"method": "gradient", "max_rank": 4}}, {}, {}, leave),
    "a floor that takes the whole budget": (
        {"selection": {"method": "cosine", "rank_allocation": "score", "min_rank": 4, "num_samples": 9}},
        {},
        {},
        leave,
    ),
    "more rank than l1ra has room for": (
        {"selection": {"method": "gradient", "max_rank": 9}, "l1ra": {"max_rank": 8}},
        {},
        {},
        leave,
    ),
    "no eval set": (
        {"selection": {"method": "flexora", "flexora": {"steps": 4, "val_source": "eval"}}},
        {},
        {},
        leave,
    ),
    "tensor parallelism": (L1RA, {"tensor_parallel_size": 2}, {}, split(tp_size=2)),
    "context parallelism": (L1RA, {"context_parallel_size": 2}, {}, split(cp_size=2)),
    "sequence parallelism": (L1RA, {"sequence_parallel_degree": 2}, {}, split(sp_size=2)),
    "attention that is differentiated once": (
        UNROLLED,
        {"attn_implementation": "flash_attention_2"},
        {},
        use_flash_attention,
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_the_file_and_the_trainer_are_refused_in_the_same_sentence(tmp_path, name):
    block, keys, lora, change = REFUSALS[name]
    by_file = say_by_file(block, keys)
    trainer = make_trainer(make_lora(make_small_llama(), **lora), tmp_path, max_steps=20)
    change(trainer)
    assert say_by_trainer(block, trainer) == by_file


def test_a_method_that_is_not_known_raises_wherever_it_comes_from(tmp_path):
    trainer = make_trainer(make_lora(make_small_llama()), tmp_path)
    slipped = SelectionConfig.model_construct(
        method="cosin", **dict.fromkeys(SelectionConfig.model_fields.keys() - {"method"})
    )
    with pytest.raises(LayerselError, match="method: 'cosin' is not known: did you mean 'cosine'"):
        prepare_trainer(trainer, LayerselConfig.model_construct(selection=slipped, l1ra=None))
    assert not list(tmp_path.iterdir()), "nothing was written"


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("val_source", {"val_source": "test"}),
        ("hypergradient", {"hypergradient": "second_order"}),
    ],
)
def test_a_setting_of_a_search_that_is_not_known_raises_wherever_it_comes_from(tmp_path, key, values):
    trainer = make_trainer(make_lora(make_small_llama()), tmp_path)
    search = FlexoraConfig(steps=4, val_samples=4).model_copy(update=values)
    selection = SelectionConfig(method="flexora", flexora=FlexoraConfig()).model_copy(update={"flexora": search})
    with pytest.raises(KeyError, match=values[key]):
        prepare_trainer(trainer, LayerselConfig.model_construct(selection=selection, l1ra=None))


def test_an_engine_that_is_not_known_raises():
    with pytest.raises(KeyError, match="zero4"):
        load_class("zero4")


def test_a_search_with_a_trainer_that_generates_is_refused_in_the_same_sentence(tmp_path):
    by_file = say_by_file(FLEXORA, {"rl": "grpo"})
    assert by_file.startswith("rl: 'grpo' trains on prompts whose answers are not generated yet")
    by_trainer = say_by_trainer(FLEXORA, make_generating_trainer(tmp_path))
    assert by_trainer.replace("trainer: GRPOTrainer", "rl: 'grpo'") == by_file


def test_rank_does_not_move_where_another_program_generates(tmp_path):
    by_file = say_by_file(L1RA, {"rl": "grpo", "trl": {"use_vllm": True}})
    trainer = make_generating_trainer(tmp_path)
    trainer.args.use_vllm = True
    assert say_by_trainer(L1RA, trainer) == by_file


def test_rows_whose_answers_are_yet_to_be_generated_cannot_be_scored(tmp_path):
    message = say_by_trainer({"selection": {"method": "cka", "num_samples": 4}}, make_generating_trainer(tmp_path))
    assert message.startswith("datasets: training row 1 has no token ids")
    assert message.endswith("or use a method that needs no data: random, first, last, explicit.")
