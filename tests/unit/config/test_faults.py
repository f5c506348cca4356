"""All faults of a file at once; the first is the one that the commands of Axolotl show."""

import hypothesis
import pytest
from helpers.refusals import VALUES
from helpers.refused_files import CASES, FILE, check
from helpers.settings import l1ra, selection
from hypothesis import given
from hypothesis import strategies as st

from axolotl_layersel.config.faults import list_faults
from axolotl_layersel.config.l1ra import L1RAConfig
from axolotl_layersel.config.selection import SelectionConfig
from axolotl_layersel.training.ending import describe_error


def collect(values: dict) -> list[str]:
    content = {key: value for key, value in {**FILE, **values}.items() if value is not None}
    return list_faults(content, with_folder=False)[1]


def test_a_file_in_order_has_none():
    assert collect({}) == []


@pytest.mark.parametrize("case", CASES)
def test_the_first_of_all_faults_is_what_a_run_ends_with(case):
    values, _ = CASES[case]
    with pytest.raises(ValueError) as refused:
        check(values)
    assert collect(values)[0] == describe_error(refused.value)


MANY = {
    "keys, values and contradictions of a block": (
        selection("cka", rato=0.5, num_layer=2, num_samples=2, granularity="module", layers=[1]),
        [
            "layersel.selection.rato is not a setting: did you mean 'ratio'?",
            "layersel.selection.num_layer is not a setting: did you mean 'num_layers'?",
            "layersel.selection.layers: [1] has no effect with method: cka.",
            "layersel.selection.num_samples: 2 is too few rows for method: cka.",
            "layersel.selection.granularity: 'module' is not available with method: cka",
        ],
    ),
    "values in two blocks": (
        {"layersel": {**selection(ratio=2, num_layers=True)["layersel"], **l1ra(update_ratio=0)["layersel"]}},
        [
            "layersel.selection.ratio: 2.0 is outside (0, 1]",
            "layersel.selection.num_layers: True",
            "layersel.l1ra.update_ratio: 0.0 is outside (0, 1]",
        ],
    ),
    "a value that is refused is not missing too": (
        selection("explicit", layers="0-5"),
        ["layersel.selection.layers: '0-5' is not a list of whole numbers"],
    ),
    "nothing is left of the block": ({"layersel": {"selection": 5}}, ["layersel.selection: 5 is not a mapping"]),
    "the rest of the file": (
        {
            **selection("flexora", flexora={"hypergradient": "unrolled", "val_source": "eval", "step": 3}),
            **{"adapter": None, "relora": True, "seed": -1, "fp16": True, "tensor_parallel_size": 2, "streaming": True},
            **{"auto_find_batch_size": True, "flash_attention": True, "loraplus_lr_ratio": 2, "fsdp_config": [1]},
        },
        [
            "layersel.selection.flexora.step is not a setting",
            "adapter: None has no LoRA layers",
            "relora: True merges and restarts",
            "tensor_parallel_size: 2 splits",
            "fsdp_config: [1] is not a mapping",
            "seed: -1 is outside",
            "streaming: True cannot be sampled",
            "fp16: True scales the loss",
            "auto_find_batch_size: true restarts training",
            "layersel.selection.flexora.val_source: 'eval' needs an eval set",
            "layersel.selection.flexora.hypergradient: 'unrolled' differentiates twice, which flash_attention",
            "layersel.selection.flexora.hypergradient: 'unrolled' takes LoRA steps with one learning rate",
        ],
    ),
    "l1ra and the rest": (
        {**l1ra(max_rank=2, min_rank=3, gate_lr=0.1), "lora_alpha": None, "optimizer": "lion_pytorch", "rl": "ebft"},
        [
            "layersel.l1ra.gate_lr: 0.1 has no effect with the default, rule: saliency",
            "layersel.l1ra.max_rank: 2 is less than min_rank: 3",
            "lora_alpha: None is not a number",
            "layersel.l1ra.max_rank: 2 is less than lora_r: 4",
            "rl: 'ebft' also reads hidden states",
            "optimizer: 'lion_pytorch' is not supported",
        ],
    ),
}


@pytest.mark.parametrize("case", MANY)
def test_faults_are_told_all_at_once(case):
    values, expected = MANY[case]
    told = collect(values)
    missing = [message for message in expected if not any(line.startswith(message) for line in told)]
    assert not missing, told
    assert len(told) == len(set(told))


BLOCK_KEYS = st.sampled_from([*SelectionConfig.model_fields, *L1RAConfig.model_fields, "rato"])
BLOCKS = st.dictionaries(BLOCK_KEYS, VALUES, max_size=5)
FILE_KEYS = st.sampled_from(
    (
        *("adapter", "lora_r", "lora_alpha", "optimizer", "fsdp_config", "fsdp_version", "deepspeed", "rl", "seed"),
        *("fp16", "max_steps", "plugins", "layersel", "peft_init_lora_weights", "lora_target_parameters"),
    )
)


@hypothesis.settings(max_examples=150, deadline=None)
@given(BLOCKS, BLOCKS, st.dictionaries(FILE_KEYS, VALUES, max_size=4))
def test_any_file_has_all_its_faults_told_or_is_in_order(chosen, moving, rest):
    content = {**FILE, "layersel": {"selection": {"method": "cka", **chosen}, "l1ra": moving}, **rest}
    told = list_faults(content, with_folder=False)[1]
    try:
        check(content)
    except ValueError as error:
        assert told and told[0] == describe_error(error).splitlines()[0]
    else:
        assert told == []
