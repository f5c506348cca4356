"""What the block refuses by itself; tests/runs/test_bad_input.py shows it through Axolotl."""

import json
import math
import re
from dataclasses import asdict

import hypothesis
import pytest
from helpers.refusals import VALUES
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.engines import PARALLELISM
from axolotl_layersel.config.flexora import FUSED_KEYS, FlexoraConfig, Search
from axolotl_layersel.config.l1ra import OPTIMIZERS, L1RAConfig
from axolotl_layersel.config.methods import METHODS
from axolotl_layersel.config.root import LayerselArgs, LayerselConfig, describe_unread
from axolotl_layersel.config.selection import SelectionConfig
from axolotl_layersel.config.strict_block import as_number, as_whole_list, quote
from axolotl_layersel.selection.plan import LayerChoice, Plan
from axolotl_layersel.selection.plan_checks import list_setting_differences
from axolotl_layersel.selection.reuse import check_differences

PLUGIN = "axolotl_layersel.LayerSelectionPlugin"
FSDP2 = {"fsdp_version": 2, "fsdp_config": {"cpu_ram_efficient_loading": True}}
RUN = {"plugins": [PLUGIN], "adapter": "lora", "lora_r": 4, "lora_alpha": 8}


def check(search: dict | None = None, **values) -> None:
    selection = {"method": "flexora", "flexora": search or {}}
    LayerselArgs.model_validate(
        {"plugins": [PLUGIN], "adapter": "lora", "layersel": {"selection": selection}, **values},
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "flexora", "keep": "positive", "ratio": 0.5}, "keep: positive and ratio: 0.5 all set how many"),
        (
            {"method": "cka", "keep": "positive"},
            "selection.keep: positive needs gates, but method: cka has none. Use `ratio`",
        ),
        (
            {"method": "random", "layers": [1, 4]},
            r"selection.layers: \[1, 4\] has no effect with method: random. Set `method: explicit`, or `num_layers: 2`",
        ),
        (
            {"method": "cka", "num_samples": 2},
            "selection.num_samples: 2 is too few rows for method: cka. Set 3",
        ),
        (
            {"method": "cosine", "num_samples": 1},
            "selection.num_samples: 1 is too few rows for method: cosine",
        ),
        ({"method": "cka", "ratio": True}, r"selection.ratio: True .*`on`.* is not a finite number"),
        ({"method": "cka", "num_layers": True}, "selection.num_layers: True .* is not a whole number"),
        ({"method": "cka", "num_samples": True}, "selection.num_samples: True .* is not a whole number"),
        ({"method": "explicit", "layers": [True]}, r"selection.layers: \[True\] is not a list of whole numbers"),
        ({"method": "explicit", "layers": "0-5"}, "selection.layers: '0-5' is not a list of whole numbers, such as"),
        ({"method": "explicit", "layers": [[0]]}, r"selection.layers: \[\[0\]\] is not a list of whole numbers"),
        ({"method": "cka", "candidates": {"a": 1}}, "selection.candidates: {'a': 1} is not a list of whole numbers"),
        ({"method": "cka", "candidates": 5}, "selection.candidates: 5 is not a list of whole numbers"),
        ({"method": "cka", "seed": -1}, "selection.seed: -1 is outside 0 to 4294967295"),
        ({"method": "cka", "seed": 2**32}, "selection.seed: 4294967296 is outside 0 to 4294967295"),
        ({"method": "cka", "plan": 5}, "selection.plan: 5 is not some text"),
        ({"ratio": 0.5}, "selection.method is missing. How layers are chosen: cka, cosine"),
        ({"method": "flexora", "flexora": {"steps": True}}, "flexora.steps: True .* is not a whole number"),
        ({"method": "flexora", "keep": "negative"}, "selection.keep: 'negative' is not known"),
        (
            {"method": "flexora", "num_layers": 2, "granularity": "module"},
            "num_layers: 2 counts layers, but granularity: module chooses modules. Use `num_units`",
        ),
        ({"method": "flexora", "granularity": "modul"}, "granularity: 'modul' is not known: did you mean"),
        (
            {"method": "cka", "granularity": "module"},
            "granularity: 'module' is not available with method: cka, which chooses layers or groups. Use fisher, ",
        ),
        ({"method": "fisher", "num_units": 2}, "num_units: 2 is for granularity group and module"),
        ({"method": "cosine", "granularity": "group", "num_units": 0}, "num_units: 0 is too low"),
        (
            {"method": "cosine", "granularity": "group", "num_units": 2, "ratio": 0.5},
            "ratio: 0.5 and num_units: 2 all set how many are chosen",
        ),
        (
            {"method": "random", "rank_allocation": "score"},
            "rank_allocation: 'score' needs scores, but method: random computes none",
        ),
        ({"method": "cka", "rank_allocation": "most"}, "rank_allocation: 'most' is not known"),
        (
            {"method": "cka", "budget": 0.5},
            "budget: 0.5 has no effect with rank_allocation: same, the default of method: cka. Set",
        ),
        (
            {"method": "cka", "rank_allocation": "same", "budget": 0.5},
            "budget: 0.5 has no effect with rank_allocation: same. Set `rank_allocation: match`",
        ),
        (
            {"method": "random", "max_rank": 9},
            "max_rank: 9 has no effect with rank_allocation: same, the default of method: random",
        ),
        ({"method": "gradient", "min_rank": 9, "max_rank": 8}, "min_rank: 9 is more than max_rank: 8"),
        ({"method": "gradient", "max_rank": 0}, "max_rank: 0 is outside 1 to 1024"),
        ({"method": "gradient", "budget": "parameter"}, "budget: 'parameter' is not a finite number"),
        (
            {"method": "gradient", "budget": 100.5},
            r"budget: 100.5 is outside \(0, 64\]: it is a multiple of",
        ),
        ({"method": "gradient", "budget": 10**6}, "or set `budget_parameters` to a number of parameters"),
        (
            {"method": "gradient", "budget": "parameters"},
            "budget: 'parameters' is now written as 1, the default. Remove",
        ),
        ({"method": "gradient", "budget_parameters": 0}, "budget_parameters: 0 is too low. Set 1 or more."),
        ({"method": "gradient", "budget_parameters": 9, "budget": 2}, "both set the budget. Keep only one of them."),
        (
            {"method": "cka", "budget_parameters": 9},
            "budget_parameters: 9 has no effect with rank_allocation: same,",
        ),
        ({"method": "cka", "rank": "match"}, "selection.rank: this key is now called `rank_allocation`. Rename it."),
        ({"method": "cka", "towers": "keep"}, "selection.towers: this key is now called `outside_layers`. Rename it."),
        ({"method": "gradient", "budget": -1}, r"budget: -1 is outside \(0, 64\]"),
        ({"method": "flexora", "flexora": {"val_batches": 0}}, "flexora.val_batches: 0 is too low"),
        ({"method": "flexora", "flexora": {"patience": 0}}, "flexora.patience: 0 is too low"),
        (
            {"method": "flexora", "flexora": {"gate_lr": -1}},
            "flexora.gate_lr: -1.0 is too low. Set 0 or more, such as 0.01",
        ),
        ({"method": "flexora", "flexora": {"gate_lr": float("nan")}}, "flexora.gate_lr: nan is not a finite number"),
    ],
)
def test_a_block_that_contradicts_itself_is_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        SelectionConfig(**settings)


def list_unread(**block) -> list[str]:
    return [key.partition(":")[0] for key in LayerselConfig(**block).list_unread()]


SEARCH = {"steps": 4, "val_samples": 4}
CHOOSE = "layersel.selection"


@pytest.mark.parametrize(
    ("block", "unread"),
    [
        ({"method": "random", "num_samples": 1, "token": "last"}, ["num_samples", "token"]),
        ({"method": "first", "num_samples": 9, "token": "mean", "flexora": SEARCH, "seed": 3}, None),
        ({"method": "last", "seed": 3}, ["seed"]),
        ({"method": "explicit", "layers": [1], "flexora": {"gate_lr": 0}}, ["flexora"]),
        ({"method": "cosine", "token": "mean"}, ["token"]),
        ({"method": "cka", "flexora": SEARCH}, ["flexora"]),
        ({"method": "cka", "rank_allocation": "match", "min_rank": 2}, ["min_rank"]),
        ({"method": "cka", "rank_allocation": "same", "min_rank": 2, "max_rank": 8}, ["max_rank", "min_rank"]),
        ({"method": "flexora", "num_samples": 9, "token": "last"}, ["num_samples", "token"]),
        ({"method": "random", "stacks": "vision", "token": "cls"}, ["token"]),
        ({"method": "flexora", "flexora": {"steps": 9, "inner_steps": 2, "patience": 3}}, ["flexora.patience"]),
        ({"method": "flexora", "flexora": {"steps": 9, "inner_steps": 2, "patience": 2}}, []),
        ({"method": "cka", "num_samples": 9, "token": "mean", "seed": 3}, []),
    ],
)
def test_a_key_that_a_method_does_not_read_is_passed_over_and_named(block, unread):
    unread = ["flexora", "num_samples", "seed", "token"] if unread is None else unread
    assert list_unread(selection=block) == [f"{CHOOSE}.{key}" for key in unread]
    left = SelectionConfig(**block).drop_unread()
    assert list_unread(selection=left.model_dump()) == []
    for path in unread:
        *outer, key = path.split(".")
        assert getattr(getattr(left, outer[0]) if outer else left, key) is None
    kept = {key: value for key, value in block.items() if key not in unread}
    assert left == SelectionConfig(**kept).drop_unread()


@pytest.mark.parametrize(
    ("block", "unread"),
    [
        ({"rule": "saliency", "l1_lambda": 0.5, "gate_lr": 0, "reassign": False}, ["gate_lr", "l1_lambda", "reassign"]),
        ({"rule": "pressure", "move_ratio": 0.2}, ["move_ratio"]),
        ({"rule": "pressure", "l1_lambda": 0.5}, []),
        ({}, []),
    ],
)
def test_the_key_of_another_rule_is_passed_over_where_the_rule_is_written(block, unread):
    assert list_unread(l1ra=block) == [f"layersel.l1ra.{key}" for key in unread]
    assert all(getattr(L1RAConfig(**block).drop_unread(), key) is None for key in unread)


@pytest.mark.parametrize(
    ("block", "is_read"),
    [
        ({"selection": {"method": "gradient"}}, True),
        ({"selection": {"method": "random", "rank_allocation": "match"}}, True),
        ({"selection": {"method": "cka", "rank_allocation": "same"}}, False),
        ({"selection": {"method": "cka", "rank_allocation": "same"}, "l1ra": {}}, True),
        ({"selection": {"method": "cka", "plan": "plan.json"}}, True),
        ({"l1ra": {}}, True),
    ],
)
def test_the_exponent_of_the_scaling_is_read_where_ranks_can_differ(block, is_read):
    block = {**block, "scaling_exponent": 0.5}
    assert list_unread(**block) == ([] if is_read else ["layersel.scaling_exponent"])
    settings = LayerselConfig(**block)
    assert settings.drop_unread().scaling_exponent == (0.5 if is_read else None)
    if not is_read:
        assert describe_unread(settings).endswith("layersel.scaling_exponent: 0.5 (with rank_allocation: same)")


def test_all_keys_that_are_not_read_are_named_in_one_sentence():
    chosen = {"method": "first", "num_samples": 9, "seed": 3}
    settings = LayerselConfig(selection=chosen, l1ra={"rule": "saliency", "l1_lambda": 0.5})
    assert describe_unread(settings) == (
        "these keys are not read, and the run goes on without them: layersel.selection.num_samples: 9, "
        "layersel.selection.seed: 3 (with method: first); layersel.l1ra.l1_lambda: 0.5 (with rule: saliency)"
    )
    assert describe_unread(settings.drop_unread()) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_rank": math.inf}, "l1ra.max_rank: inf is not a whole number"),
        ({"max_rank": math.nan}, "l1ra.max_rank: nan is not a whole number"),
        ({"max_rank": 16.5}, "l1ra.max_rank: 16.5 is not a whole number"),
        ({"max_rank": "1e9"}, "l1ra.max_rank: 1000000000 is outside 1 to 65536. Set a value in"),
        ({"min_rank": True}, "l1ra.min_rank: True .* is not a whole number"),
        ({"min_rank": None}, "l1ra.min_rank: the value is blank. Write one, or remove the key"),
        ({"update_ratio": True}, "l1ra.update_ratio: True .* is not a finite number"),
        ({"reassign": 1}, "l1ra.reassign: 1 is not true or false"),
    ],
)
def test_ranks_of_another_type_or_size_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        LayerselArgs.model_validate({**RUN, "layersel": {"l1ra": settings}})


def test_numbers_may_be_text_since_yaml_reads_some_so():
    settings = L1RAConfig(rule="pressure", max_rank="16", update_ratio="1e-1", l1_lambda="1e-3")
    assert (settings.max_rank, settings.update_ratio, settings.l1_lambda) == (16, 0.1, 0.001)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"lora_r": 0}, "lora_r: 0 is not a valid rank"),
        ({"lora_r": -4}, "lora_r: -4 is not a valid rank"),
        ({"lora_r": True}, "lora_r: True is not a valid rank"),
        ({"lora_r": "high"}, "lora_r: 'high' is not a valid rank"),
        ({"seed": -1}, "seed: -1 is outside 0 to 4294967295, the seeds that NumPy accepts"),
        ({"seed": 2**32}, "seed: 4294967296 is outside 0 to 4294967295"),
        ({"fsdp_config": [{"offload_params": False}]}, r"fsdp_config: \[{'offload_params': False}\] is not a mapping"),
        ({"tensor_parallel_size": "two"}, "tensor_parallel_size: 'two' is not a whole number"),
        ({"context_parallel_size": "2"}, "context_parallel_size: 2 splits rows across devices"),
    ],
)
def test_other_keys_of_the_file_that_are_read_are_refused_by_name(run, message):
    for block in ({"selection": {"method": "last"}}, {"l1ra": {}}):
        with pytest.raises(ValidationError, match=message):
            LayerselArgs.model_validate({**RUN, "layersel": block, **run})


MOVES = "so no rank could move"
EQUAL = "so all ranks would be equal, whatever the scores of"


@pytest.mark.parametrize(
    ("block", "run", "message"),
    [
        ({"l1ra": {}}, {"lora_r": 1}, f"lora_r: modules start with rank 1, and layersel.l1ra.min_rank: 1 is .*{MOVES}"),
        ({"l1ra": {"min_rank": 4}}, {}, f"lora_r: modules start with rank 4, .*min_rank: 4 .*{MOVES}.* lower min_rank"),
        ({"l1ra": {"rule": "pressure"}}, {"lora_r": 1}, f"lora_r: modules start with rank 1, .*{MOVES}"),
        ({"l1ra": {"max_rank": 4}}, {}, r"l1ra.max_rank: 4 is the rank that all modules start with"),
        ({"l1ra": {"max_rank": 4}, "selection": {"method": "first"}}, {}, r"l1ra.max_rank: 4 is the rank that all"),
        ({"l1ra": {"max_rank": 4, "rule": "pressure"}}, {}, None),
        ({"l1ra": {}}, {"lora_r": 1, "lora_rank_pattern": {"q_proj": 4}}, None),
        ({"l1ra": {}}, {"lora_r": 1, "lora_model_dir": "adapter"}, None),
        ({"l1ra": {}, "selection": {"method": "gradient"}}, {"lora_r": 1}, None),
        (
            {"l1ra": {}},
            {"max_steps": 2},
            r"update_ratio: 0.1 \(warmup_ratio: 0.0\) leaves 1 .* of max_steps: 2 optimizer",
        ),
        ({"l1ra": {"update_ratio": 0.3}}, {"max_steps": 4}, r"update_ratio: 0.3 .* leaves 1 .* of max_steps: 4"),
        ({"l1ra": {"update_ratio": 0.34}}, {}, r"update_ratio: 0.34 leaves fewer than two updates in a run of any"),
        ({"l1ra": {"update_ratio": 1 / 3}}, {}, None),
        ({"l1ra": {}}, {"max_steps": 3}, None),
        (
            {"selection": {"method": "gradient", "max_rank": 4}},
            {},
            f"budget: it allows rank 4 .*max_rank: 4, {EQUAL}",
        ),
        (
            {"selection": {"method": "gradient", "budget": 4}},
            {},
            f"budget: it allows rank 16 .*max_rank: 16, {EQUAL}",
        ),
        ({"selection": {"method": "gradient", "budget": 3.9}}, {}, None),
        ({"selection": {"method": "gradient", "budget_parameters": 10**6}}, {}, None),
        ({"selection": {"method": "gradient", "budget": 4, "ratio": 0.5}}, {}, None),
        (
            {"selection": {"method": "cka", "rank_allocation": "score", "min_rank": 4}},
            {},
            f"min_rank: 4 in every unit uses .*{EQUAL}",
        ),
        ({"selection": {"method": "cka", "rank_allocation": "score", "min_rank": 3}}, {}, None),
        ({"selection": {"method": "gradient"}, "l1ra": {"max_rank": 4}}, {}, f"max_rank: 4, {EQUAL}"),
        ({"selection": {"method": "gradient", "max_rank": 20}, "l1ra": {}}, {}, None),
        (
            {"selection": {"method": "gradient", "max_rank": 20}, "l1ra": {"max_rank": 19}},
            {},
            "max_rank: 20 is more than",
        ),
    ],
)
def test_what_can_do_nothing_is_refused_as_far_as_the_file_shows_it(block, run, message):
    errors = collect_errors({**RUN, "layersel": block, **run})
    assert len(errors) == (message is not None), errors
    assert all(re.search(message, error) for error in errors), errors


BLOCKS = {
    "layersel.selection": SelectionConfig,
    "layersel.selection.flexora": FlexoraConfig,
    "layersel.l1ra": L1RAConfig,
}
KEYS = [
    ("layersel", "selection"),
    ("layersel", "l1ra"),
    *((path, key) for path in BLOCKS for key in BLOCKS[path].model_fields),
]
READ_BY_US = (
    *("plugins", "adapter", "relora", "relora_steps", "lora_target_parameters", "lora_r", "lora_alpha", "seed"),
    *("fsdp", "fsdp_config", "fsdp_version", "deepspeed", "peft", "peft_use_dora", "peft_init_lora_weights", "fp16"),
    *("auto_find_batch_size", "rl", "trl", "optimizer", "val_set_size", "test_datasets", "attn_implementation"),
    *("sample_packing", "sdpa_varlen", "loraplus_lr_ratio", "lr_groups", "peft_layers_to_transform", "streaming"),
    *("pretraining_dataset", "layersel", "max_steps", *PARALLELISM, *FUSED_KEYS),
)


def collect_errors(data: dict) -> list[str]:
    """Return what is said of a file; anything but pydantic's errors of value is raised."""
    try:
        LayerselArgs.model_validate(data)
    except ValidationError as error:
        assert all(problem["type"] == "value_error" for problem in error.errors()), error
        return [problem["msg"].removeprefix("Value error, ") for problem in error.errors()]
    return []


@hypothesis.settings(max_examples=400, deadline=None)
@given(place=st.sampled_from(KEYS), method=st.sampled_from(sorted(METHODS)), value=VALUES)
@example(place=("layersel.l1ra", "max_rank"), method="cka", value=math.inf)
@example(place=("layersel.selection", "candidates"), method="cka", value=[[0]])
@example(place=("layersel.selection", "candidates"), method="explicit", value=[1])
@example(place=("layersel.selection", "ratio"), method="cka", value=True)
@example(place=("layersel.selection", "seed"), method="cka", value=1 << 20_000)
def test_any_value_of_our_keys_is_taken_or_refused_by_key_and_value(place, method, value):
    path, key = place
    selection = {"method": method, **({"layers": [0]} if method == "explicit" else {})}
    block = {
        "layersel": {key: value},
        "layersel.selection": {"selection": {**selection, key: value}},
        "layersel.selection.flexora": {"selection": {"method": "flexora", "flexora": {key: value}}},
        "layersel.l1ra": {"l1ra": {key: value}},
    }[path]
    messages = collect_errors({**RUN, "layersel": block})
    for message in messages:
        assert message.startswith(f"{path}.{key}") or f"{key}:" in message or value is None, message
        if isinstance(value, str | int | float | list) and as_number(value) is None and as_whole_list(value) is None:
            assert quote(value) in message, message
    booleans = ("reassign", "exclude_pruned")
    if value is True or (isinstance(value, list) and True in [item is True for item in value]):
        assert messages or key in booleans


@hypothesis.settings(max_examples=300, deadline=None)
@given(key=st.sampled_from(READ_BY_US), value=VALUES, block=st.sampled_from(["cka", "flexora", "l1ra"]))
@example(key="fsdp_config", value=[1], block="cka")
@example(key="peft_layers_to_transform", value=2.5, block="cka")
@example(key="plugins", value=5, block="cka")
def test_any_value_of_other_keys_is_passed_by_or_refused_by_key(key, value, block):
    search = {"method": "flexora", "flexora": {"hypergradient": "unrolled", "val_source": "eval"}}
    blocks = {"cka": {"selection": {"method": "cka"}}, "flexora": {"selection": search}, "l1ra": {"l1ra": {}}}
    data = {**RUN, "val_set_size": 0.1, "layersel": blocks[block], key: value}
    for message in collect_errors(data):
        assert key.removesuffix("_config") in message, message


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"peft_init_lora_weights": "eva"}, "peft_init_lora_weights: 'eva' cannot be combined with layersel.selection"),
        ({"peft": {"loftq_config": {"loftq_bits": 4}}}, "peft.loftq_config: LoftQ changes base"),
        (
            {"peft_init_lora_weights": "olora", "deepspeed": {"zero_optimization": {"stage": 3}}},
            "'olora' is computed on every process from the base weights, which ZeRO-3 splits",
        ),
        (
            {"peft_init_lora_weights": "pissa", **FSDP2},
            "which fsdp_config.cpu_ram_efficient_loading loads on one process only. Set it to false",
        ),
        ({"peft_init_lora_weights": "olora", "deepspeed": {"zero_optimization": {"stage": 2}}}, None),
        ({"peft_init_lora_weights": "eva", "lora_model_dir": "adapter"}, None),
    ],
)
def test_an_initialisation_that_layers_cannot_be_selected_under_is_refused(run, message):
    errors = collect_errors({**RUN, "layersel": {"selection": {"method": "first"}}, **run})
    assert len(errors) == (message is not None)
    assert all(message in error for error in errors)


@pytest.mark.parametrize(
    ("search", "run", "message"),
    [
        ({}, {"peft_use_dora": True}, "peft_use_dora: true cannot be combined with layersel.selection.method: flexora"),
        ({}, {"fp16": True}, "fp16: True scales the loss"),
        (
            {},
            {"rl": "grpo"},
            "rl: 'grpo' trains on prompts .* layersel.selection.method: 'flexora' reads",
        ),
        ({}, {"peft_init_lora_weights": "pissa"}, "peft_init_lora_weights: 'pissa' is not supported by layersel.sel"),
        ({}, {"auto_find_batch_size": True}, "auto_find_batch_size: true restarts training"),
        ({}, {"streaming": True}, "streaming: True cannot be sampled for layersel.selection.method: 'flexora'"),
        (
            {"hypergradient": "unrolled"},
            {"plugins": [PLUGIN, "axolotl.integrations.liger.LigerPlugin"]},
            "'unrolled' differentiates twice, which the fused code of the plugin axolotl.integrations.liger",
        ),
        ({"hypergradient": "unrolled"}, {"flash_attention": True}, "twice, which flash_attention does not support"),
        (
            {"hypergradient": "unrolled"},
            {"attn_implementation": "flash_attention_2"},
            "twice, which flash_attention_2 does not support",
        ),
        ({"hypergradient": "unrolled"}, {"tiled_mlp": True}, "twice, which tiled_mlp: True does not support"),
        ({"hypergradient": "unrolled"}, {"sample_packing": True}, "the attention kernel for packed rows does not sup"),
        ({"hypergradient": "unrolled"}, {"loraplus_lr_ratio": 16}, "with one learning rate, but loraplus_lr_ratio: 16"),
        (
            {"hypergradient": "unrolled"},
            {"deepspeed": {"zero_optimization": {"stage": 3}}},
            "on every process, but ZeRO-3 splits them",
        ),
    ],
)
def test_a_run_that_cannot_be_searched_is_refused(search, run, message):
    with pytest.raises(ValidationError, match=message):
        check(search, **run)


ENGINE_KEYS = {
    "single": {},
    **{f"zero{stage}": {"deepspeed": {"zero_optimization": {"stage": stage}}} for stage in (1, 2, 3)},
    "fsdp2": FSDP2,
}
SHARDED_BY_DEEPSPEED = ("zero1", "zero2", "zero3")
# What an optimizer of l1ra's does not go with, and which one does there.
EXCEPTIONS = {
    "adamw_bnb_8bit": (("fsdp2",), "adamw_torch_8bit"),
    "adamw_8bit": (("fsdp2",), "adamw_torch_8bit"),
    "paged_adamw_8bit": (("fsdp2",), "adamw_torch_8bit"),
    "paged_adamw_32bit": (("fsdp2",), "adamw_torch_8bit"),
    "adamw_torch_8bit": (SHARDED_BY_DEEPSPEED, "adamw_bnb_8bit"),
    "ao_adamw_fp8": (SHARDED_BY_DEEPSPEED, "adamw_bnb_8bit"),
}


@pytest.mark.parametrize("engine", ENGINE_KEYS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_optimizer_is_refused_on_the_engines_alone_that_it_does_not_work_on(optimizer, engine):
    engines, instead = EXCEPTIONS.get(optimizer, ((), ""))
    run = {**RUN, "layersel": {"l1ra": {}}, **ENGINE_KEYS[engine]}
    messages = collect_errors({**run, "optimizer": optimizer})
    assert len(messages) == (engine in engines)
    for message in messages:
        assert message.startswith(f"optimizer: '{optimizer}' cannot be combined with ")
        assert message.endswith(f"Use `{instead}`.")
        assert collect_errors({**run, "optimizer": instead}) == []


@pytest.mark.parametrize("key", ["state_dict_type", "fsdp_state_dict_type"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_torchaos_moments_are_not_to_be_written_whole_by_fsdp2(optimizer, key):
    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        config = {**FSDP2, "fsdp_config": {key: kind}}
        messages = collect_errors({**RUN, "layersel": {"l1ra": {}}, **config, "optimizer": optimizer})
        messages = [message for message in messages if "cannot be combined with FSDP2" not in message]
        assert len(messages) == (kind == "FULL_STATE_DICT" and OPTIMIZERS[optimizer] == "torchao")
        for message in messages:
            assert message.startswith(f"fsdp_config.state_dict_type: FULL_STATE_DICT with optimizer: '{optimizer}'")
            assert message.endswith("Use `SHARDED_STATE_DICT`.")


@pytest.mark.parametrize(
    ("optimizer", "instead"),
    [
        ("ao_adamw_4bit", ("adamw_torch_8bit", "adamw_bnb_8bit", "adamw_torch_8bit")),
        ("adamw_torch_4bit", ("adamw_torch_8bit", "adamw_bnb_8bit", "adamw_torch_8bit")),
        ("lion_8bit", ("adamw_bnb_8bit", "adamw_bnb_8bit", "adamw_torch_8bit")),
        ("paged_lion_8bit", ("paged_adamw_8bit", "paged_adamw_8bit", "adamw_torch_8bit")),
        ("adafactor", ("adamw_torch", "adamw_torch", "adamw_torch")),
        (["adamw_torch"], ("adamw_torch", "adamw_torch", "adamw_torch")),
    ],
)
def test_an_optimizer_that_keeps_no_moments_known_here_is_refused_with_the_nearest_that_works(optimizer, instead):
    for engine, nearest in zip(("single", "zero2", "fsdp2"), instead, strict=True):
        run = {**RUN, "layersel": {"l1ra": {}}, **ENGINE_KEYS[engine]}
        (message,) = collect_errors({**run, "optimizer": optimizer})
        assert message.startswith(f"optimizer: {optimizer!r} is not supported by layersel.l1ra")
        assert message.endswith(f"Use `{nearest}`.")
        assert collect_errors({**run, "optimizer": nearest}) == []


def test_a_deepspeed_file_is_read_for_its_stage(tmp_path):
    path = tmp_path / "zero.json"
    for stage in (2, 3):
        path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        if stage == 2:
            check({"hypergradient": "unrolled"}, deepspeed=str(path))
        else:
            with pytest.raises(ValidationError, match="but ZeRO-3 splits them"):
                check({"hypergradient": "unrolled"}, deepspeed=str(path))
    check({"hypergradient": "unrolled"}, deepspeed="nowhere.json")  # Axolotl says what is wrong with it


def test_what_takes_effect_is_written_out():
    values = asdict(SelectionConfig(method="flexora").resolve(run_seed=4))
    assert values["keep"] == "positive" and values["ratio"] is None and values["num_samples"] is None
    assert values["flexora"] == asdict(Search())
    assert SelectionConfig(method="flexora", ratio=0.3).resolve(4).keep is None
    assert SelectionConfig(method="cka").resolve(4).keep is None


def test_dumped_defaults_are_valid_again():
    for settings in ({"method": "flexora"}, {"method": "flexora", "ratio": 0.5, "flexora": {"steps": 9}}):
        first = SelectionConfig(**settings)
        assert SelectionConfig(**first.model_dump()) == first


def test_a_plan_of_another_search_is_refused_by_the_key_that_differs():
    settings = SelectionConfig(method="flexora", ratio=0.5, flexora={"steps": 9})
    layers = [LayerChoice(layer=layer, score=float(layer), selected=layer > 0) for layer in range(2)]
    about = {"base_model": None, "versions": {}, "engine": "single", "processes": 1, "seconds": 0.0}
    plan = Plan(
        method="flexora",
        layers=layers,
        unselected="remove",
        stack="model.layers",
        modules=["model.layers.1.q_proj"],
        settings=asdict(settings.resolve(1)),
        seed=1,
        calibration_rows=[],
        dataset_fingerprint=None,
        **about,
    )
    assert list_setting_differences(plan, settings) == []
    for left_out in (None, {}, {"steps": 9}):
        assert list_setting_differences(plan, SelectionConfig(method="flexora", flexora=left_out)) == []
    other = SelectionConfig(method="flexora", flexora={"steps": 8})
    with pytest.raises(LayerselError, match=r"there does not .*: layersel\.selection\.flexora\.steps: 8 is not the 9 "):
        check_differences("there", False, [], list_setting_differences(plan, other))
