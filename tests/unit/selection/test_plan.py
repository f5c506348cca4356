import json
from dataclasses import asdict

import pytest
import torch
from helpers.plans import make_plan
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.selection import SelectionConfig
from axolotl_layersel.selection.plan import Budget, LayerChoice, Plan
from axolotl_layersel.selection.plan_checks import ModelFacts, list_model_differences, list_setting_differences
from axolotl_layersel.selection.plan_file import check_checkpoint, read_plan, write_plan


@given(st.lists(st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False)), min_size=1, max_size=9))
def test_what_is_written_is_read_back(tmp_path_factory, scores):
    path = tmp_path_factory.mktemp("plan") / "deep" / "plan.json"
    plan = make_plan(scores)
    write_plan(plan, path)
    assert read_plan(path) == plan
    content = json.loads(path.read_text())
    assert content["layers"][0] == {"layer": 0, "score": scores[0], "selected": True}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read .No such file"),
        ('{"schema_version": 3, "meth', "not valid JSON, truncated or damaged"),
        ("[]", "schema_version None, and this version of axolotl-layersel reads 3"),
        ('{"schema_version": 1}', "schema_version 1, and this version of axolotl-layersel reads 3. Make a new"),
        ('{"schema_version": 7}', "schema_version 7"),
        (
            '{"schema_version": 3, "method": "cka"}',
            r"is not a plan: \(1\) layers: Field required; \(2\) unselected: Field required; .*; \(9\) \d more\.",
        ),
    ],
)
def test_a_file_that_is_no_plan_is_an_error_that_names_the_key_and_the_file(tmp_path, content, message):
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(LayerselError, match=rf"^layersel.selection.plan: .*plan.json.*{message}"):
        read_plan(path)


def test_a_plan_that_selects_nothing_or_skips_a_layer_is_refused(tmp_path):
    skipping = make_plan()
    skipping.layers = skipping.layers[::2]
    for plan, fault in (
        (make_plan(selected=()), "`layers` selects none"),
        (skipping, "`layers` does not list every layer at 'model.layers' once, in order"),
    ):
        write_plan(plan, tmp_path / "plan.json")
        with pytest.raises(LayerselError, match=rf"plan\.json contradicts itself: {fault}\. Undo what was edited"):
            read_plan(tmp_path / "plan.json")


def test_settings_left_alone_do_not_contradict_a_plan_but_others_do():
    plan = make_plan()
    assert list_setting_differences(plan, SelectionConfig(method="cka")) == []
    same = SelectionConfig(method="cka", ratio=0.5, unselected="remove", num_samples=128)
    assert list_setting_differences(plan, same) == []
    other = SelectionConfig(method="cosine", num_layers=2, unselected="freeze", num_samples=64)
    assert list_setting_differences(plan, other) == [
        "layersel.selection.method: 'cosine' is not the 'cka' that it was made with",
        "layersel.selection.num_layers: 2 is not in the settings that it was made with",
        "layersel.selection.unselected: 'freeze' is not the 'remove' that it was made with",
        "layersel.selection.num_samples: 64 is not the 128 that it was made with",
    ]


@pytest.mark.parametrize(
    ("stack", "layers", "modules", "difference"),
    [
        ("model.layers", 4, {}, "the plan has 3 layers, the model 4"),
        ("transformer.h", 3, {}, "the plan's layers are at 'model.layers', the model's at 'transformer.h'"),
        ("model.layers", 3, {0: ["x"]}, "the model has no LoRA on model.layers.0.self_attn.q_proj"),
        (
            "model.layers",
            3,
            {0: ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"]},
            "the model has LoRA on model.layers.0.mlp.up_proj, unknown to the plan",
        ),
    ],
)
def test_a_plan_for_another_model_is_refused_with_the_difference(stack, layers, modules, difference):
    assert difference in "; ".join(list_model_differences(make_plan(), ModelFacts(stack, range(layers), modules)))


@pytest.mark.parametrize("unselected", ["remove", "freeze"])
def test_a_checkpoint_must_hold_the_plans_modules(tmp_path, unselected):
    plan = make_plan(selected=(0, 2), unselected=unselected)
    with pytest.raises(LayerselError, match="holds no adapter_model"):
        check_checkpoint(plan, tmp_path)
    for layers, fits in [((0, 2), True), ((0,), False), ((0, 1, 2), unselected == "freeze")]:
        names = [f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{x}.weight" for i in layers for x in "AB"]
        save_file({name: torch.zeros(1) for name in names}, tmp_path / "adapter_model.safetensors")
        if fits:
            check_checkpoint(plan, tmp_path)
        else:
            with pytest.raises(LayerselError, match=r"they differ in model.layers.\d.self_attn.q_proj \(1 such"):
                check_checkpoint(plan, tmp_path)


def test_a_checkpoint_must_hold_the_plans_ranks(tmp_path):
    plan = make_plan(ranks={"model.layers.0.self_attn.q_proj": 3})
    for rank in (3, 2):
        names = [f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight" for x in "AB"]
        save_file({name: torch.zeros(rank, rank) for name in names}, tmp_path / "adapter_model.safetensors")
        if rank == 3:
            check_checkpoint(plan, tmp_path)
        else:
            with pytest.raises(LayerselError, match=r"has rank 2 in model.layers.0.* saved with it gives it 3"):
                check_checkpoint(plan, tmp_path)


@pytest.mark.parametrize(
    ("ranks", "fault"),
    [
        ({"model.layers.1.self_attn.q_proj": 2}, "`ranks` does not name just the modules that are in `modules`"),
        ({"model.layers.0.self_attn.q_proj": 0}, "q_proj rank 0, less than 1, the lowest of its settings"),
    ],
)
def test_ranks_that_contradict_the_plan_are_found(tmp_path, ranks, fault):
    settings = asdict(SelectionConfig(method="cka", rank_allocation="score").resolve(run_seed=1))
    budget = Budget(lora=80, lora_r=8, allowed=80, spent=80)
    write_plan(make_plan(ranks=ranks, settings=settings, budget=budget), tmp_path / "plan.json")
    with pytest.raises(LayerselError, match=rf"contradicts itself: .*{fault}"):
        read_plan(tmp_path / "plan.json")


def make_sided_plan(names: list[str], selected: str = "encoder.1", **values) -> Plan:
    stack = {"encoder": "encoder.block", "decoder": "decoder.block"}
    layers = [LayerChoice(layer=name, score=0.5, selected=name == selected) for name in names]
    side, number = selected.split(".")
    modules = [f"{stack[side]}.{number}.layer.0.SelfAttention.q"]
    return make_plan().model_copy(update={"stack": stack, "layers": layers, "modules": modules, **values})


SIDED = ["encoder.0", "encoder.1", "decoder.0"]


def test_layers_of_two_sides_keep_their_names_in_the_file(tmp_path):
    plan = make_sided_plan(SIDED, unscored={"decoder.0": "why"}, token={"encoder": "mean", "decoder": "ending"})
    write_plan(plan, tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan
    assert list_model_differences(plan, ModelFacts(plan.stack, SIDED, {"encoder.1": plan.modules})) == []
    other = ModelFacts(plan.stack, ["encoder.0", "decoder.0", "decoder.1"], {"encoder.1": plan.modules})
    assert list_model_differences(plan, other) == ["the plan has a layer encoder.1, which the model has not"]
    (first, *_) = list_model_differences(plan, ModelFacts("model", range(3), {}))
    assert first == "the plan's layers are at 'encoder.block' and 'decoder.block', the model's at 'model'"


def test_layers_of_one_list_are_numbers_in_the_file_as_they_ever_were(tmp_path):
    write_plan(make_plan(unscored={1: "why"}), tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["layers"][1] == {"layer": 1, "score": None, "selected": False}
    assert (content["unscored"], content["stack"], content["token"]) == ({"1": "why"}, "model.layers", None)
    assert read_plan(tmp_path / "plan.json").unscored == {1: "why"}


@pytest.mark.parametrize(
    "names",
    [
        ["encoder.0", "encoder.1", "decoder.1"],
        ["decoder.0", "encoder.0", "encoder.1"],
        ["encoder.1", "decoder.0"],
        ["encoder.0", "encoder.1", "vision.0"],
        ["encoder.0", "encoder.1", 2],
        ["encoder.0", "encoder.1", "encoder.x"],
    ],
)
def test_names_that_are_not_those_of_all_layers_are_found(names, tmp_path):
    write_plan(make_sided_plan(names), tmp_path / "plan.json")
    with pytest.raises(LayerselError, match=r"`layers` does not list every layer at .* once, in order"):
        read_plan(tmp_path / "plan.json")


def test_a_plan_for_this_model_is_accepted():
    modules = {0: ["model.layers.0.self_attn.q_proj"], 1: ["other"]}
    assert list_model_differences(make_plan(), ModelFacts("model.layers", range(3), modules)) == []


def test_a_plan_whose_ranks_were_given_for_another_lora_r_is_refused():
    plan, block = make_plan(budget=Budget(lora=80, lora_r=8, allowed=80, spent=80)), SelectionConfig(method="cka")
    assert list_setting_differences(plan, block, lora_r=8) == []
    assert list_setting_differences(make_plan(), block, lora_r=16) == []
    (difference,) = list_setting_differences(plan, block, lora_r=16)
    assert difference.startswith("lora_r: 16 is not the 8 for which it gave modules their ranks")
