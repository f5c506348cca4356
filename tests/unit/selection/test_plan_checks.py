"""A plan against itself, a YAML block and a model: all that differs is told at once, and nothing else is refused."""

import copy
import functools
import json
import logging
from pathlib import Path

import pytest
from helpers.corruptions import JUNK, is_one_line, list_places
from helpers.models import make_llava, make_lora, make_small_llama, make_t5, make_trainer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from axolotl_layersel.cli.main import app
from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.paths import plan_path
from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.config.selection import SelectionConfig
from axolotl_layersel.lora.modules import find_lora_modules
from axolotl_layersel.selection.plan import Plan
from axolotl_layersel.selection.plan_checks import KEYS, list_setting_differences
from axolotl_layersel.selection.plan_file import read_plan
from axolotl_layersel.training.prepare import prepare_trainer

pytestmark = pytest.mark.trains

SCORED = {"num_samples": 8}
# The model of each and its block: every kind of choice that a plan can be of.
PLANS = {
    "layers": (make_small_llama, {"method": "cka", **SCORED}),
    "frozen": (make_small_llama, {"method": "explicit", "layers": [1, 4], "unselected": "freeze"}),
    "ranks": (make_small_llama, {"method": "gradient", **SCORED, "num_units": 9, "max_rank": 8}),
    "timed": (make_small_llama, {"method": "gradient", **SCORED, "time": 0.8}),
    "match": (
        make_small_llama,
        {"method": "first", "num_layers": 2, "rank_allocation": "match", "candidates": [0, 1, 2]},
    ),
    "groups": (make_small_llama, {"method": "fisher", **SCORED, "granularity": "group", "rank_allocation": "score"}),
    "random": (make_small_llama, {"method": "random", "granularity": "module"}),
    "search": (make_small_llama, {"method": "flexora", "ratio": 0.5, "flexora": {"steps": 2, "val_samples": 4}}),
    "towers": (make_llava, {"method": "last", "num_layers": 1}),
    "stacks": (make_llava, {"method": "last", "num_layers": 1, "stacks": "both", "outside_layers": "remove"}),
    "sides": (make_t5, {"method": "random", "seed": 5}),
}
TARGETS = {make_small_llama: ["q_proj", "v_proj", "down_proj"], make_llava: ["q_proj", "v_proj"], make_t5: ["q", "v"]}


def prepare(kind: str, folder: Path, targets: list[str] | None = None, resume=None, model=None, **block):
    make, own = PLANS[kind]
    lora = make_lora(model or make(), targets or TARGETS[make])
    trainer = make_trainer(lora, folder, save_strategy="steps", save_steps=2)
    settings = SelectionConfig(**(block or own))
    return prepare_trainer(trainer, LayerselConfig(selection=settings), resume), trainer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return the content of the plan of a kind, as it was written."""

    @functools.cache
    def make(kind: str) -> str:
        folder = tmp_path_factory.mktemp(kind)
        prepare(kind, folder)
        return plan_path(folder).read_text()

    return make


def write(content: object, folder: Path) -> str:
    path = folder / "plan.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def describe_lora(trainer) -> dict[str, tuple[int, bool]]:
    """Return the rank of every LoRA module of a trainer's model, and whether it trains."""
    modules = find_lora_modules(trainer.model.get_base_model())
    return {
        name: (module.r["default"], module.lora_A["default"].weight.requires_grad) for name, module in modules.items()
    }


def expect_lora(content: dict, everything: set[str]) -> dict[str, tuple[int, bool]]:
    """Return what a plan says in plain words: which of all LoRA modules there are, their rank, and which train."""
    inside, outside = set(content["modules"]), {name for tower in content["outside"] for name in tower["modules"]}
    kept = inside | (outside if content["outside_layers"] == "keep" else set())
    there = kept if content["unselected"] == "remove" else everything
    return {name: (content["ranks"].get(name, 4), name in kept) for name in there}


# --- Any field of any plan ----------------------------------------------------------------------------------------


def mutate(data: st.DataObject, content: dict) -> str:
    """Return a plan in which one field is another one, of a near or of a far value, left out or renamed."""
    holder, key = data.draw(st.sampled_from(list(list_places(content))))
    # Every part of a plan is drawn alike, for there are many modules and few settings.
    part = data.draw(st.sampled_from(sorted(content)))
    if data.draw(st.booleans()):
        inner = [(content, part)]
        if isinstance(content[part], dict | list):
            inner += list_places(content[part])
        holder, key = data.draw(st.sampled_from(inner))
    way = data.draw(st.sampled_from(["near", "near", "junk", "remove", "rename", "long", "copy"]))
    value = holder[key]
    if way == "remove":
        del holder[key]
    elif way == "rename" and isinstance(holder, dict):
        holder[f"{key}_"] = holder.pop(key)
    elif way == "copy":
        other, place = data.draw(st.sampled_from(list(list_places(content))))
        holder[key] = copy.deepcopy(other[place])
    elif way == "long":
        holder[key] = "@long@"
        return json.dumps(content).replace('"@long@"', data.draw(st.sampled_from(["9" * 5000, f'"{"9" * 5000}"'])))
    elif way == "junk" or value is None:
        holder[key] = data.draw(st.sampled_from(JUNK))
    elif isinstance(value, bool):
        holder[key] = not value
    elif isinstance(value, int | float):
        holder[key] = value + data.draw(st.sampled_from([-1, 1, 10**9]))
    elif isinstance(value, str):
        words = ["freeze", "remove", "keep", "same", "match", "score", "layer", "group", "module", "both", "vision"]
        longer = [f"{value}.0", value[:-1], value.replace(".1.", ".2."), value.replace(".1.", f".{'1' * 5000}.")]
        holder[key] = data.draw(st.sampled_from(words + longer))
    else:
        holder[key] = type(value)(list(value.items())[1:] if isinstance(value, dict) else value[1:])
    return json.dumps(content)


@pytest.mark.parametrize("kind", PLANS)
def test_a_changed_plan_means_what_it_says_or_is_refused_in_one_sentence(made, tmp_path, kind):
    content = json.loads(made(kind))
    everything = set(find_lora_modules(make_lora(PLANS[kind][0](), TARGETS[PLANS[kind][0]]).get_base_model()))
    block = {key: value for key, value in PLANS[kind][1].items() if key in ("method", "layers")}
    counts = {"read": 0, "applied": 0}

    @settings(max_examples=50, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def check(data):
        text = mutate(data, json.loads(made(kind)))
        path = write(text, tmp_path)
        shown = CliRunner().invoke(app, ["show", path])
        assert shown.exception is None or isinstance(shown.exception, SystemExit), repr(shown.exception)
        counts["read"] += 1
        if shown.exit_code:
            assert is_one_line(shown.output.splitlines()[-1]) and shown.output.startswith("axolotl-layersel: PATH: ")
            return
        try:
            _, trainer = prepare(kind, tmp_path / "run", **block, plan=path)
        except LayerselError as error:
            assert is_one_line(str(error))
            return
        counts["applied"] += 1
        said = json.loads(text)
        for key, default in (("ranks", {}), ("outside_layers", "keep"), ("outside", content["outside"])):
            said.setdefault(key, default)
        assert describe_lora(trainer) == expect_lora({**said, "outside": content["outside"]}, everything)
        # Ranks may be edited by hand, where the budget pays for them. All else that decides is as it was.
        assert said["unselected"] == content["unselected"]
        # Single modules without scores may be edited by hand too: nothing in the plan contradicts them.
        if kind != "random":
            assert sorted(said["modules"]) == sorted(content["modules"])
        assert said["outside_layers"] == content["outside_layers"] and said["ranks"].keys() == content["ranks"].keys()
        if said["ranks"]:
            assert all(1 <= rank <= (said["settings"].get("max_rank") or 16) for rank in said["ranks"].values())

    check()
    assert 3 < counts["applied"] < counts["read"], counts


# --- One fault of each kind ---------------------------------------------------------------------------------------

CONTRADICTIONS = {
    "no ranks": ("ranks", ["ranks"], {}, "`ranks` is empty, and settings.rank_allocation 'score'"),
    "no budget": ("ranks", ["budget"], None, "`budget` is empty, and settings.rank_allocation 'score'"),
    "ranks that all are the same": (
        "layers",
        ["ranks"],
        {"model.layers.0.mlp.down_proj": 3},
        "settings.rank_allocation is 'same'",
    ),
    "a rank above max_rank": ("ranks", ["ranks", 0], 64, "rank 64, more than 8, the highest of its settings"),
    "a rank beyond measure": ("match", ["ranks", 0], 10**9, "rank 1000000000, more than 1024, the highest"),
    "more spent than allowed": ("match", ["budget", "spent"], 10**9, "`budget` has 1000000000 parameters spent of"),
    "another budget": ("match", ["settings", "budget"], 0.5, "`budget` allows"),
    "frozen": ("layers", ["unselected"], "freeze", "`unselected` is 'freeze', and settings.unselected 'remove'"),
    "removed": ("frozen", ["settings", "unselected"], "remove", "`unselected` is 'freeze', and settings.unselected"),
    "towers": (
        "towers",
        ["outside_layers"],
        "remove",
        "`outside_layers` is 'remove', and settings.outside_layers 'keep'",
    ),
    "granularity": ("layers", ["granularity"], "x", "`granularity` is 'x', and settings.granularity 'layer'"),
    "unknown granularity": ("layers", ["settings", "granularity"], "x", "settings.granularity: 'x' is not known"),
    "no stacks": ("layers", ["settings", "stacks"], [], "settings.stacks: [] is not known"),
    "other stacks": ("stacks", ["settings", "stacks"], "vision", "and settings.stacks 'vision'"),
    "another method": ("layers", ["method"], "cosine", "`method` is 'cosine', and settings.method 'cka'"),
    "another seed": ("layers", ["seed"], 9, "`seed` is 9, and settings.seed 3"),
    "settings of no block": ("layers", ["settings", "ratio"], 7, "settings.ratio: 7.0 is outside (0, 1]"),
    "settings that have no effect": ("layers", ["settings", "budget"], 2, "settings.budget: 2.0 has no effect with"),
    "other layers": ("frozen", ["settings", "layers"], [1, 2], "selects [1, 4], and settings.layers is [1, 2]"),
    "outside of candidates": ("match", ["settings", "candidates"], [0, 2], "selects [1], which are not among"),
    "a layer of 5,000 digits": ("layers", ["modules", 0], f"model.layers.{'9' * 5000}.q", "is not of just the layers"),
    "modules of other layers": ("layers", ["modules", 0], "model.layers.9.mlp.down_proj", "is not of just the layers"),
    "a module twice": ("ranks", ["modules", 0], "@next@", " twice"),
    "scores of other modules": (
        "ranks",
        ["module_scores"],
        {"x": 1.0},
        "`module_scores` names modules that are in none",
    ),
    "no scores": ("groups", ["module_scores"], {}, "`module_scores` is empty, and `granularity` 'group'"),
    "scores of a control": (
        "random",
        ["module_scores"],
        {"x": 1.0},
        "`module_scores` is given, and method 'random' gi",
    ),
    "more rows than asked": ("layers", ["settings", "num_samples"], 7, "8 rows were drawn, and settings.num_samples"),
    "a time without its limit": (
        "layers",
        ["step_time"],
        {"share": 0.7, "gain": 0.9, "checkpointing": False, "tokens": 14.5},
        "`step_time` is given, and settings.time is not",
    ),
    "a limit without its time": ("timed", ["step_time"], None, "`step_time` is empty, and settings.time 0.8"),
    "a time above its limit": (
        "timed",
        ["settings", "time"],
        0.1,
        ", and settings.time is 0.1",
    ),
    "an end in no layer": ("layers", ["backward_end"], 99, "`backward_end` is 99, which `layers` does not list"),
    "a row twice": ("layers", ["rows_left_out"], [1, 1], "have row 1 twice"),
    "a negative row": ("layers", ["calibration_rows", 0], -1, "has a negative row"),
    "rows of a control": ("random", ["calibration_rows"], [1], "rows were drawn, and method 'random' reads none"),
    "another token": ("layers", ["settings", "token"], "mean", "`token` is 'ending', and settings.token 'mean'"),
    "a score that is none": ("layers", ["layers", 0, "score"], 10**400, "layers.0.score: Input should be a finite"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_plan_that_contradicts_itself_is_refused(made, tmp_path, case):
    kind, keys, value, message = CONTRADICTIONS[case]
    content = json.loads(made(kind))
    holder = functools.reduce(lambda inner, key: inner[key], keys[:-1], content)
    last = list(holder)[keys[-1]] if isinstance(holder, dict) and isinstance(keys[-1], int) else keys[-1]
    holder[last] = holder[1] if value == "@next@" else value
    with pytest.raises(LayerselError) as refused:
        read_plan(write(content, tmp_path))
    assert message in str(refused.value)
    assert len(str(refused.value)) < 1000 or case == "a score that is none"


def test_all_contradictions_are_told_the_most_important_first(made, tmp_path):
    content = json.loads(made("ranks"))
    content |= {"granularity": "x", "ranks": {}, "rows_left_out": [-1]}
    content["layers"][0]["selected"] ^= True
    with pytest.raises(LayerselError) as refused:
        read_plan(write(content, tmp_path))
    told = (
        "contradicts itself: (1) `granularity` is 'x', and settings.granularity 'module'; "
        "(2) `modules` is not of just the layers that are selected at 'model.layers'; "
        "(3) `ranks` is empty, and settings.rank_allocation 'score'; "
        "(4) `calibration_rows` or `rows_left_out` has a negative row; "
        "(5) 9 rows were drawn, and settings.num_samples is 8. "
    )
    assert told in str(refused.value)


def test_every_key_of_the_block_is_compared():
    assert {*KEYS, "plan", "plan_check"} == set(SelectionConfig.model_fields)


# --- The YAML block and the model ---------------------------------------------------------------------------------


def test_all_differences_from_a_run_are_told_the_most_important_first(made, tmp_path):
    path = write({**json.loads(made("ranks")), "base_model": "org/Base-1B"}, tmp_path)
    other = make_small_llama(5, intermediate_size=64)
    other.name_or_path = "org/Other-1B"
    block = {"method": "gradient", "plan": path, "num_samples": 9, "max_rank": 7, "unselected": "freeze"}
    with pytest.raises(LayerselError) as refused:
        prepare("ranks", tmp_path / "run", ["q_proj", "v_proj", "up_proj"], model=other, **block)
    told = [
        f"layersel.selection.plan: the plan from {path} does not fit this run: ",
        "(1) base_model: org/Other-1B is not org/Base-1B, which it was made for; ",
        "has num_hidden_layers: 5, and org/Base-1B, which it was made for, has 6; ",
        "has intermediate_size: 64, and org/Base-1B, which it was made for, has 48; ",
        "the plan has 6 layers, the model 5; ",
        "the model has no LoRA on model.layers.0.mlp.down_proj (8 such modules); ",
        "the model has LoRA on model.layers.0.mlp.up_proj, unknown to the plan (5 such modules); ",
        "layersel.selection.unselected: 'freeze' is not the 'remove' that it was made with; ",
        "layersel.selection.max_rank: 7 is not the 8 that it was made with; ",
        "layersel.selection.num_samples: 9 is not the 8 that it was made with. ",
        "Restore what it was made with, or make a new plan. If the two base models are the same, set `layersel.sel",
    ]
    places = [str(refused.value).find(part) for part in told]
    assert -1 not in places and places == sorted(places), str(refused.value)
    with pytest.raises(LayerselError) as refused:
        prepare("ranks", tmp_path / "run", model=other, **block, plan_check="ignore")
    assert "base_model" not in str(refused.value)
    assert "(1) the plan has 6 layers, the model 5; " in str(refused.value)


def test_ranks_of_a_plan_are_compared_with_those_of_the_run(made, tmp_path):
    plan = read_plan(write(made("match"), tmp_path))
    block = SelectionConfig(method="first")
    highest = max(plan.ranks.values())
    assert list_setting_differences(plan, block, lora_r=4, room=highest, rank_pattern={}) == []
    lora_r, pattern, room = list_setting_differences(plan, block, 5, highest - 1, {"q_proj": 2})
    assert lora_r.startswith("lora_r: 5 is not the 4 for which it gave modules their ranks")
    assert pattern == "lora_rank_pattern: {'q_proj': 2} gives modules ranks, and so does the plan"
    assert room.startswith(
        f"layersel.l1ra.max_rank: {highest - 1} is less than the rank {highest} that the plan gives "
    )


def test_an_exponent_of_the_scaling_must_be_the_one_of_the_ranks(made, tmp_path):
    block, without = SelectionConfig(method="first"), read_plan(write(made("match"), tmp_path))
    assert without.scaling_exponent == 0
    plan = without.model_copy(update={"scaling_exponent": 0.5})
    assert list_setting_differences(plan, block) == list_setting_differences(plan, block, exponent=0.5) == []
    assert list_setting_differences(without, block, exponent=0) == []
    (difference,) = list_setting_differences(plan, block, exponent=1)
    assert difference == "layersel.scaling_exponent: 1 is not the 0.5 that it was made with"
    assert list_setting_differences(plan.model_copy(update={"ranks": {}}), block, exponent=1) == []
    for wrong in (1.5, -0.5, "0.5", None):
        content = {**json.loads(made("match")), "scaling_exponent": wrong}
        with pytest.raises(LayerselError, match=r"plan\.json is not a plan: scaling_exponent: Input should be"):
            read_plan(write(json.dumps(content), tmp_path))


def test_ranks_that_the_budget_does_not_pay_for_are_refused(made, tmp_path):
    content = json.loads(made("match"))
    name, rank = max(content["ranks"].items(), key=lambda item: item[1])
    content["ranks"][name] = rank + 1
    with pytest.raises(
        LayerselError, match=r"the plan's ranks take [\d,]+ parameters, and its budget allows [\d,]+\. R"
    ):
        prepare("match", tmp_path / "run", method="first", plan=write(content, tmp_path))


def test_ranks_that_were_lowered_by_hand_are_applied_and_counted(made, tmp_path, caplog):
    content = json.loads(made("match"))
    name, rank = max(content["ranks"].items(), key=lambda item: item[1])
    content["ranks"][name] = rank - 1
    with caplog.at_level(logging.WARNING, "axolotl.layersel"):
        plan, trainer = prepare("match", tmp_path / "run", method="first", plan=write(content, tmp_path))
    assert "they were edited by hand" in caplog.text
    lora = describe_lora(trainer)
    assert lora[name][0] == rank - 1
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert trained == plan.budget.spent < content["budget"]["spent"]
    assert read_plan(plan_path(tmp_path / "run")).budget.spent == trained


def edit_choice(text: str, layer: int) -> dict:
    """Return a plan of whole layers in which one more is chosen by hand, as the README says."""
    content = json.loads(text)
    content["layers"][layer]["selected"] = True
    content["modules"] += [
        f"model.layers.{layer}.{name}" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    ]
    return content


def test_a_choice_may_be_edited_by_hand_but_not_against_the_block(made, tmp_path):
    text = made("layers")
    layer = next(choice["layer"] for choice in json.loads(text)["layers"] if not choice["selected"])
    path = write(edit_choice(text, layer), tmp_path)
    plan, trainer = prepare("layers", tmp_path / "run", method="cka", plan=path)
    assert layer in plan.selected and len(plan.selected) == 4
    assert set(describe_lora(trainer)) == set(plan.modules) and len(plan.modules) == 12
    assert read_plan(plan_path(tmp_path / "run")) == plan
    message = r"layersel\.selection\.ratio: 0\.5 keeps 3 layers, and the plan 4; leave the key out to apply a plan that"
    with pytest.raises(LayerselError, match=message):
        prepare("layers", tmp_path / "other", method="cka", ratio=0.5, plan=path)


def test_a_group_is_kept_whole(made, tmp_path):
    content = json.loads(made("groups"))
    name = next(name for name in content["modules"] if name.endswith("v_proj"))
    content["modules"].remove(name)
    del content["ranks"][name]
    with pytest.raises(LayerselError, match=rf"keeps modules of a group without {name}, and granularity: group keeps"):
        prepare("groups", tmp_path / "run", method="fisher", rank_allocation="score", plan=write(content, tmp_path))


@pytest.mark.parametrize("kind", PLANS)
def test_a_plan_is_applied_again_as_it_is(made, tmp_path, kind):
    content = json.loads(made(kind))
    plan, trainer = prepare(kind, tmp_path / "run", **{**PLANS[kind][1], "plan": write(content, tmp_path)})
    everything = set(find_lora_modules(make_lora(PLANS[kind][0](), TARGETS[PLANS[kind][0]]).get_base_model()))
    assert describe_lora(trainer) == expect_lora(content, everything)
    assert Plan.model_validate_json(made(kind)) == plan
