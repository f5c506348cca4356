"""The arms of a comparison: the keys that each of them sets in the user's file."""

import pytest
import yaml
from helpers.compared import FILE

from axolotl_layersel.cli.compare.arms import make_arms
from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.methods import METHODS


def test_the_default_arms_have_plain_lora_first_and_a_random_choice():
    arms = make_arms(None, FILE)
    assert list(arms) == ["lora", "gradient", "cka", "random", "lora@32"]
    assert [name for name, arm in arms.items() if arm.choosing] == ["gradient", "cka"]
    assert arms["lora"].keys == {"layersel": None}
    assert arms["lora@32"].keys == {"layersel": None, "lora_r": 32, "lora_alpha": 64}
    assert arms["cka"].keys == {"layersel": {"selection": {"method": "cka", "rank_allocation": "match"}}}
    assert arms["gradient"].keys == {"layersel": {"selection": {"method": "gradient"}}}, "by score is its default"


@pytest.mark.parametrize(
    ("block", "name"),
    [
        ({"selection": {"method": "fisher", "ratio": 0.25}}, "fisher"),
        ({"l1ra": {"max_rank": 32}}, "l1ra"),
        ({"selection": {"method": "cka", "num_layers": 4}, "l1ra": {}}, "cka+l1ra"),
    ],
)
def test_the_block_of_the_file_is_an_arm_as_it_is(block, name):
    arms = make_arms(None, {**FILE, "layersel": block})
    assert arms[name].keys == {"layersel": block}


def test_lora_and_a_random_choice_are_always_in():
    assert list(make_arms(["cka"], FILE)) == ["lora", "cka", "random"]
    assert list(make_arms(["l1ra"], FILE)) == ["lora", "l1ra"]
    assert list(make_arms(["random", "cka", "lora"], FILE)) == ["lora", "random", "cka"]


def test_settings_of_the_file_apply_to_other_methods_where_these_have_them():
    block = {"method": "cka", "ratio": 0.25, "num_samples": 2 + 62, "token": "mean", "candidates": [0, 1, 2, 3]}
    data = {**FILE, "layersel": {"selection": block}}
    arms = make_arms(["fisher", "gradient", "random"], data)
    fisher, gradient, random = (arms[name].keys["layersel"]["selection"] for name in ("fisher", "gradient", "random"))
    assert fisher == {
        "method": "fisher", "rank_allocation": "match", "ratio": 0.25, "num_samples": 64, "candidates": [0, 1, 2, 3]
    }  # fmt: skip
    assert gradient == {"method": "gradient", "num_samples": 64, "candidates": [0, 1, 2, 3]}
    assert random == {"method": "random", "rank_allocation": "match", "ratio": 0.25, "candidates": [0, 1, 2, 3]}


def test_the_random_control_draws_anew_with_each_seed():
    block = {"method": "random", "ratio": 0.5, "seed": 7}
    arms = make_arms(["random"], {**FILE, "layersel": {"selection": block}})
    assert arms["random"].keys == {"layersel": {"selection": {"method": "random", "ratio": 0.5}}}


def test_the_scaling_follows_the_rank_in_all_arms_whose_ranks_differ():
    block = {"selection": {"method": "gradient"}, "scaling_exponent": 0.5}
    arms = make_arms(["lora", "lora@32", "gradient", "cka", "l1ra", "random"], {**FILE, "layersel": block})
    assert arms["gradient"].keys == {"layersel": block}
    for name in ("cka", "l1ra", "random"):
        assert arms[name].keys["layersel"]["scaling_exponent"] == 0.5
    assert arms["lora@32"].keys == {"layersel": None, "lora_r": 32, "lora_alpha": 64}
    fixed = {**FILE, "layersel": block, "lora_rank_pattern": {"q_proj": 8}}
    assert "scaling_exponent" not in make_arms(["cka"], fixed)["cka"].keys["layersel"]


def test_ranks_stay_where_the_file_does_not_let_them_change():
    arms = make_arms(["cka", "gradient"], {**FILE, "lora_rank_pattern": {"q_proj": 8}})
    for name in ("cka", "gradient", "random"):
        assert arms[name].keys["layersel"]["selection"] == {"method": name, "rank_allocation": "same"}
    sharded = {**FILE, "fsdp_version": 2, "fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}}
    arms = make_arms(["flexora", "cka"], sharded)
    assert arms["flexora"].keys["layersel"]["selection"]["rank_allocation"] == "same"
    assert arms["cka"].keys["layersel"]["selection"]["rank_allocation"] == "match"


@pytest.mark.parametrize("name", [name for name in METHODS if name != "explicit"])
def test_every_method_is_an_arm_also_with_rank_that_moves(name):
    arms = make_arms([name, f"{name}+l1ra"], FILE)
    assert arms[f"{name}+l1ra"].keys["layersel"] == {**arms[name].keys["layersel"], "l1ra": {}}
    assert arms[name].choosing == METHODS[name].needs_data


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gradeint", "--arms: 'gradeint' is not known: did you mean 'gradient'?"),
        ("lora@16", "--arms: lora@16 is the arm `lora` itself, because lora_r is 16. Leave it out."),
        ("lora@x", "--arms: 'lora@x' has no valid rank. Write a rank such as lora@32."),
        ("explicit", "arm explicit: layersel.selection.layers is missing: method: explicit chooses the layers"),
    ],
)
def test_an_arm_that_cannot_be_is_refused(name, message):
    with pytest.raises(LayerselError) as caught:
        make_arms([name], FILE)
    assert str(caught.value).startswith(message)


def test_another_rank_keeps_the_scaling_or_is_refused():
    with pytest.raises(LayerselError, match=r"lora@3 needs lora_alpha: 4\.5 for the scaling of the file"):
        make_arms(["lora@3"], {**FILE, "lora_alpha": 24})
    assert make_arms(["lora@4"], {**FILE, "lora_alpha": 24})["lora@4"].keys["lora_alpha"] == 6
    assert "lora_alpha" not in make_arms(["lora@3"], {**FILE, "peft_use_rslora": True})["lora@3"].keys


def test_own_arms_come_from_a_file_and_replace_the_defaults(tmp_path):
    path = tmp_path / "arms.yml"
    own = {"top": {"layersel": {"selection": {"method": "last", "ratio": 0.25}}}, "dora": {"peft_use_dora": True}}
    path.write_text(yaml.safe_dump(own, sort_keys=False))
    arms = make_arms(None, FILE, path)
    assert list(arms) == ["lora", "top", "dora"]
    assert arms["top"].keys == own["top"]
    assert arms["dora"].keys == {"layersel": None, "peft_use_dora": True}
    assert list(make_arms(["cka"], FILE, path)) == ["lora", "top", "dora", "cka", "random"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "is not a mapping of arms"),
        ("a: {", "is not valid YAML"),
        ("a/b: {lora_r: 4}", "'a/b' is not a name for an arm"),
        ("..: {lora_r: 4}", "'..' is not a name for an arm"),
        ("best.yml: {lora_r: 4}", "best.yml is the name of a file or folder that the command itself writes"),
        ("lora: {lora_r: 4}", "lora is the name of an arm of the command"),
        ("a: {}", "the arm a sets no keys"),
        ("a: {seed: 1}", "the arm a sets seed, which is the same in all arms"),
        ("a: {layersel: {selection: {method: ckaa}}}", "arm a: layersel.selection.method: 'ckaa' is not known"),
        ("a: {layersel: {}}", "arm a: layersel: the block is empty"),
    ],
)
def test_a_file_of_arms_that_cannot_be_read_is_refused(content, message, tmp_path):
    path = tmp_path / "arms.yml"
    path.write_text(content)
    with pytest.raises(LayerselError) as caught:
        make_arms(None, FILE, path)
    assert message in str(caught.value)
