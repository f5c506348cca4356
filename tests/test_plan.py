import json
from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from axolotl_layersel.errors import LayerselError
from axolotl_layersel.plan import (
    Budget,
    LayerChoice,
    Plan,
    check_checkpoint,
    check_lora_rank,
    check_model,
    check_settings,
    read_plan,
    write_plan,
)
from axolotl_layersel.selection.args import SelectionArgs


def make_plan(scores: list[float | None] = (0.5, None, 0.1), selected: tuple[int, ...] = (0,), **values) -> Plan:
    layers = [LayerChoice(layer=i, score=score, selected=i in selected) for i, score in enumerate(scores)]
    settings = asdict(SelectionArgs(method="cka").resolve(run_seed=1))
    default = {
        "method": "cka",
        "unselected": "remove",
        "stack": "model.layers",
        "modules": [f"model.layers.{i}.self_attn.q_proj" for i in selected],
        "settings": settings,
        "seed": 1,
        "calibration_rows": [3, 1],
        "dataset_fingerprint": "sha256:00",
        "base_model": "some/model",
        "versions": {},
        "engine": "single",
        "processes": 1,
        "seconds": 0.5,
    }
    return Plan(layers=layers, **{**default, **values})


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
        ('{"schema_version": 1, "meth', "not valid JSON, truncated or damaged"),
        ("[]", "schema_version None, this version of axolotl-layersel reads 1 to 2"),
        ('{"schema_version": 7}', "schema_version 7"),
        ('{"schema_version": 1, "method": "cka"}', r"is not a plan: layers: Field required \(\d+ problems\)"),
    ],
)
def test_a_file_that_is_no_plan_is_an_error_that_names_the_key_and_the_file(tmp_path, content, message):
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(LayerselError, match=rf"^layersel.selection.plan: .*plan.json.*{message}"):
        read_plan(path)


def test_a_plan_that_selects_nothing_or_skips_a_layer_is_refused(tmp_path):
    for plan in (make_plan(selected=()), make_plan()):
        plan.layers = plan.layers if not plan.selected else plan.layers[::2]
        write_plan(plan, tmp_path / "plan.json")
        with pytest.raises(LayerselError, match="does not list every layer once, or selects none"):
            read_plan(tmp_path / "plan.json")


def test_settings_left_alone_do_not_contradict_a_plan_but_others_do():
    plan = make_plan()
    check_settings(plan, SelectionArgs(method="cka"), "there")
    check_settings(plan, SelectionArgs(method="cka", ratio=0.5, unselected="remove", num_samples=128), "there")
    with pytest.raises(LayerselError, match=r"ratio: 0.25 contradicts the plan from there, which was made with 0.5"):
        check_settings(plan, SelectionArgs(method="cka", ratio=0.25), "there")
    with pytest.raises(LayerselError, match=r"num_samples: 64 contradicts .* made with 128"):
        check_settings(plan, SelectionArgs(method="cka", num_samples=64), "there")
    with pytest.raises(LayerselError, match=r"unselected: 'freeze' contradicts .* made with 'remove'"):
        check_settings(plan, SelectionArgs(method="cka", unselected="freeze"), "there")
    with pytest.raises(LayerselError, match=r"method: 'last' contradicts .* made with 'cka'"):
        check_settings(plan, SelectionArgs(method="last"), "there")


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
    with pytest.raises(LayerselError, match=difference):
        check_model(make_plan(), stack, range(layers), modules, [], "there")


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
            with pytest.raises(LayerselError, match=r"has rank 2 in model.layers.0.* the plan beside it gives it 3"):
                check_checkpoint(plan, tmp_path)


@pytest.mark.parametrize(
    ("ranks", "fault"),
    [
        ({"model.layers.1.self_attn.q_proj": 2}, "does not give just the modules that it keeps a rank"),
        ({"model.layers.0.self_attn.q_proj": 0}, "gives a module that it keeps no rank"),
    ],
)
def test_ranks_that_contradict_the_plan_are_found(tmp_path, ranks, fault):
    write_plan(make_plan(ranks=ranks), tmp_path / "plan.json")
    with pytest.raises(LayerselError, match=fault):
        read_plan(tmp_path / "plan.json")


@pytest.mark.parametrize("search", [None, {"steps": 9, "granularity": "module"}])
def test_a_plan_of_schema_1_is_still_read(tmp_path, search):
    content = json.loads(make_plan().model_dump_json())
    for key in ("granularity", "ranks", "budget"):
        del content[key]
    for key in ("granularity", "rank", "budget", "min_rank", "max_rank"):
        del content["settings"][key]
    content |= {"schema_version": 1, "settings": {**content["settings"], "flexora": search}}
    (tmp_path / "plan.json").write_text(json.dumps(content))
    plan = read_plan(tmp_path / "plan.json")
    granularity = "layer" if search is None else "module"
    assert (plan.schema_version, plan.granularity, plan.ranks) == (2, granularity, {})
    assert plan.settings["granularity"] == granularity and plan.settings["rank"] == "same"
    assert plan.settings["flexora"] == (search and {"steps": 9})


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
    check_model(plan, plan.stack, SIDED, {"encoder.1": plan.modules}, [], "there")
    with pytest.raises(LayerselError, match=r"has a layer encoder\.1, which the model has not"):
        check_model(plan, plan.stack, ["encoder.0", "decoder.0", "decoder.1"], {}, [], "there")
    with pytest.raises(
        LayerselError, match=r"layers are at 'encoder\.block' and 'decoder\.block', the model's at 'model'"
    ):
        check_model(plan, "model", range(3), {}, [], "there")


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
    with pytest.raises(LayerselError, match="does not list every layer once, or selects none"):
        read_plan(tmp_path / "plan.json")


def test_a_plan_for_this_model_is_accepted():
    check_model(
        make_plan(), "model.layers", range(3), {0: ["model.layers.0.self_attn.q_proj"], 1: ["other"]}, [], "there"
    )


def test_a_plan_whose_ranks_were_given_for_another_lora_r_is_refused():
    plan = make_plan(budget=Budget(lora=80, lora_r=8, allowed=80, spent=80))
    check_lora_rank(plan, 8, "old/plan.json")
    check_lora_rank(make_plan(), 16, "old/plan.json")
    with pytest.raises(LayerselError, match=r"lora_r: 16 is not the 8 for which the plan from old/plan\.json gave"):
        check_lora_rank(plan, 16, "old/plan.json")
