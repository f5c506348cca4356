"""What a block leaves open fits itself to the run and says so; keys that nothing reads are named once."""

import logging

import pytest
import torch
from axolotl.utils.dict import DictDefault
from helpers.defaults import UNREAD, choose
from helpers.models import make_lora, make_rows, make_small_llama, make_trainer
from helpers.places import at_night
from safetensors.torch import load_file

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.paths import plan_path
from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.config.selection import SelectionConfig
from axolotl_layersel.l1ra.records import RankHistory
from axolotl_layersel.lora.modules import find_lora_modules
from axolotl_layersel.selection import select
from axolotl_layersel.training.preflight import check_layers
from axolotl_layersel.training.prepare import prepare_trainer


@pytest.fixture
def logged(caplog) -> list[str]:
    """Return a function's worth of what this package has logged since the last call."""

    def take() -> list[str]:
        said = [record.getMessage() for record in caplog.records if record.name == "axolotl.layersel"]
        caplog.clear()
        return said

    caplog.set_level(logging.INFO, logger="axolotl.layersel")
    return take


# --- Few rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["cka", "cosine", "fisher", "gradient"])
def test_all_rows_of_a_small_set_are_scored_by_default(tmp_path, logged, method):
    _, plan = choose(tmp_path / "made", 24, method=method)
    said = "layersel: num_samples is 24 in place of 128 by default: all rows of the training set"
    assert logged().count(said) == 1
    assert plan.settings["num_samples"] == 24 and sorted(plan.calibration_rows) == list(range(24))
    path = str(plan_path(tmp_path / "made"))
    for asked in ({}, {"num_samples": 24}):
        _, again = choose(tmp_path / "again", 24, method=method, plan=path, **asked)
        assert again.ranks == plan.ranks and again.modules == plan.modules
    with pytest.raises(LayerselError, match=r"num_samples: 128 is not the 24 that it was made with"):
        choose(tmp_path / "other", 24, method=method, plan=path, num_samples=128)


def test_a_large_set_is_scored_in_part_and_a_number_that_is_written_stays(tmp_path, logged):
    _, plan = choose(tmp_path / "large", 130, method="cosine")
    assert plan.settings["num_samples"] == 128 == len(set(plan.calibration_rows))
    assert not any("num_samples" in said for said in logged())
    with pytest.raises(
        LayerselError, match=r"num_samples: 25 is more than the 24 rows .*Set it to at most 24, or leave"
    ):
        choose(tmp_path / "written", 24, method="cosine", num_samples=25)


@pytest.mark.parametrize(("method", "fewest"), [("cka", 3), ("relative", 2), ("gradient", 2)])
def test_sets_of_one_to_three_rows_are_scored_or_refused_by_their_size(tmp_path, method, fewest):
    for rows in (1, 2, 3):
        if rows < fewest:
            message = f"^datasets: the training set has too few rows to be compared by {method}: {rows} where it needs"
            with pytest.raises(LayerselError, match=message):
                choose(tmp_path, rows, method=method)
        else:
            assert len(choose(tmp_path, make_rows(rows, seed=2), method=method)[1].calibration_rows) == rows


@pytest.mark.trains
@pytest.mark.parametrize(("rows", "labelled", "held"), [(40, 12, 4), (2, 2, 1), *at_night((40, 40, 13), (3, 3, 1))])
def test_a_search_holds_a_third_of_a_small_set_out_by_default(tmp_path, logged, rows, labelled, held):
    data = make_rows(rows)
    for row in data[labelled:]:
        row["labels"] = [-100] * len(row["input_ids"])
    search = {"steps": 3, "gate_lr": 0.05}
    _, plan = choose(tmp_path / "made", data, method="flexora", ratio=0.5, flexora=search)
    said = (
        f"layersel: flexora.val_samples is {held} in place of 200 by default: a third of the {labelled} training rows"
    )
    assert sum(line.startswith(said) for line in logged()) == 1
    assert plan.settings["flexora"]["val_samples"] == len(plan.calibration_rows) == held
    assert max(plan.calibration_rows) < labelled
    written = {**search, "val_samples": held}
    _, same = choose(tmp_path / "written", data, method="flexora", ratio=0.5, flexora=written)
    assert same.calibration_rows == plan.calibration_rows and same.layers == plan.layers
    choose(tmp_path / "again", data, method="flexora", plan=str(plan_path(tmp_path / "made")), flexora=written)


def test_a_set_that_cannot_be_parted_is_refused_by_its_size(tmp_path):
    with pytest.raises(LayerselError, match=r"^datasets: the training set has too few rows, 1, to be parted"):
        choose(tmp_path, 1, method="flexora")
    with pytest.raises(
        LayerselError, match=r"val_samples: 198 of the 200 .* leaves 2 .* Set it to 66, which leaves most"
    ):
        choose(tmp_path, 200, method="flexora", flexora={"val_samples": 198})


# --- Few layers, few steps, much rank -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["cosine", "random", "last"])
def test_the_only_candidate_is_kept_by_default(tmp_path, method):
    assert choose(tmp_path, 24, method=method, candidates=[2])[1].selected == [2]
    with pytest.raises(LayerselError, match=r"ratio: 0.5 of 1 layers keeps none"):
        choose(tmp_path, 24, method=method, candidates=[2], ratio=0.5)


KINDS = ("q_proj", "v_proj", "down_proj")


def test_the_only_candidate_is_not_refused_before_the_model_loads(tmp_path):
    make_small_llama().config.save_pretrained(tmp_path)
    cfg = DictDefault(base_model=str(tmp_path), base_model_config=str(tmp_path))
    check_layers(cfg, SelectionConfig(method="cka", candidates=[2]))
    with pytest.raises(LayerselError, match=r"ratio: 0.5 of 1 layers keeps none"):
        check_layers(cfg, SelectionConfig(method="cka", candidates=[2], ratio=0.5))


@pytest.mark.trains
@pytest.mark.parametrize(
    "block", [{"method": "gradient", "max_rank": 14}, {"method": "cka", "ratio": 0.5, "rank_allocation": "match"}]
)
def test_a_resumed_run_has_the_room_of_the_run_that_it_resumes(tmp_path, block):
    checkpoint = str(tmp_path / "checkpoint-10")

    def train(resume_from: str | None = None) -> dict[str, torch.Tensor]:
        model = make_lora(make_small_llama())
        trainer = make_trainer(model, tmp_path, make_rows(24), max_steps=20, save_strategy="steps", save_steps=10)
        plan = prepare_trainer(trainer, LayerselConfig(selection=block, l1ra={}), resume_from)
        room = {module.r["default"] for module in find_lora_modules(model.get_base_model()).values()}
        assert room == {14 if "max_rank" in block else 2 * max(plan.ranks.values())}
        trainer.train(resume_from_checkpoint=resume_from)
        return load_file(tmp_path / "checkpoint-20" / "adapter_model.safetensors")

    whole = train()
    resumed = train(checkpoint)
    assert whole.keys() == resumed.keys() and all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_room_for_rank_follows_what_is_asked_for_unless_it_is_written(tmp_path):
    _, plan = choose(tmp_path / "made", 24, method="gradient", max_rank=14, budget=3)
    highest = max(plan.ranks.values())
    assert highest > 8, "more than twice lora_r"
    path = str(plan_path(tmp_path / "made"))

    def find_room(trainer) -> set[int]:
        modules = trainer.model.base_model.model.named_modules()
        return {module.lora_A["default"].weight.shape[0] for _, module in modules if hasattr(module, "lora_A")}

    planned, _ = choose(tmp_path / "planned", 24, {}, method="gradient", plan=path)
    assert find_room(planned) == {highest if len(set(plan.ranks.values())) > 1 else 2 * highest}
    asked, _ = choose(tmp_path / "asked", 24, {}, method="gradient", max_rank=14, budget=3)
    assert find_room(asked) == {14}
    continued, _ = choose(
        tmp_path / "continued", 24, {}, model=make_lora(make_small_llama(), rank_pattern={"v_proj": 11})
    )
    assert find_room(continued) == {11}
    even, _ = choose(
        tmp_path / "even", 24, {}, model=make_lora(make_small_llama(), rank_pattern=dict.fromkeys(KINDS, 11))
    )
    assert find_room(even) == {22}
    for written in ({"plan": path}, {"max_rank": 14}):
        with pytest.raises(LayerselError, match="max_rank"):
            choose(tmp_path / "written", 24, {"max_rank": 8}, method="gradient", **written)


# --- Settings under which nothing can happen ----------------------------------------------------------------------


def lone_module():
    """Return a model with one LoRA module."""
    return make_lora(make_small_llama(), r".*layers\.3\.self_attn\.q_proj")


@pytest.mark.parametrize(
    ("moving", "model", "message"),
    [
        (
            {},
            lambda: make_lora(make_small_llama(), r=1),
            r"^lora_r: modules start with rank 1, .* so no rank could move",
        ),
        (
            {"max_rank": 4},
            lambda: make_lora(make_small_llama()),
            r"max_rank: 4 is the rank that all modules start with",
        ),
        ({}, lone_module, r"^layersel\.l1ra: only one LoRA module trains, and rank moves between modules"),
        (
            {"move_ratio": 0.01},
            lambda: make_lora(make_small_llama()),
            r"move_ratio: 0\.01 of the rank in use is less than one component.* Set 0\.01\d or more",
        ),
    ],
)
def test_rank_that_could_never_move_is_refused_before_training(tmp_path, moving, model, message):
    with pytest.raises(LayerselError, match=message):
        choose(tmp_path, 24, moving, model=model())
    assert not (tmp_path / "layersel").exists()


def test_rank_that_differs_can_move_without_room_above_the_highest(tmp_path):
    model = make_lora(make_small_llama(), r=1, rank_pattern={"v_proj": 2})
    choose(tmp_path, 24, {"max_rank": 2}, model=model)


@pytest.mark.trains
def test_rank_moves_in_an_adapter_of_which_a_tenth_is_less_than_a_component(tmp_path):
    model = make_lora(make_small_llama(), r".*layers\.[35]\.self_attn\.[qv]_proj", r=2)
    trainer, _ = choose(tmp_path, 24, {}, model=model)
    trainer.train()
    ranks = RankHistory.read(tmp_path).ranks
    assert len({tuple(each.values()) for each in ranks.values()}) > 1
    assert all(sum(each.values()) <= 8 for each in ranks.values())


KEPT = "all that may be chosen is kept"


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"method": "cosine", "ratio": 1.0}, f"{KEPT} (6 × layer), so the scores of cosine decide nothing"),
        ({"method": "cosine", "candidates": [1, 2], "num_layers": 2}, f"{KEPT} (2 × layer)"),
        (
            {
                "method": "cosine",
                "granularity": "group",
                "ratio": 1.0,
                "unselected": "freeze",
                "rank_allocation": "match",
            },
            f"{KEPT} (12 × group), so the scores of cosine decide nothing; `unselected: freeze` freezes nothing",
        ),
        ({"method": "gradient", "granularity": "layer", "candidates": [3]}, f"{KEPT} (1 × layer), so the scores of gr"),
        ({"method": "cosine", "ratio": 1.0, "candidates": [1], "unselected": "freeze"}, f"{KEPT} (1 × layer)"),
        (
            {"method": "random", "ratio": 1.0, "unselected": "freeze"},
            "`unselected: freeze` freezes nothing, for LoRA is",
        ),
        ({"method": "random", "ratio": 1.0}, None),
        ({"method": "explicit", "layers": [1], "unselected": "freeze"}, None),
        ({"method": "cosine", "ratio": 0.9}, None),
        ({"method": "gradient"}, None),
    ],
)
def test_scores_that_decide_nothing_are_said_to(tmp_path, logged, block, said):
    choose(tmp_path, 24, **block)
    warned = [line for line in logged() if "nothing" in line]
    assert len(warned) == (said is not None)
    assert all(line.startswith(f"layersel: {said}") for line in warned)
    freezes = block.get("unselected") == "freeze" and "candidates" not in block
    assert all(("freezes" in line) == freezes for line in warned)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            {"method": "gradient", "budget_parameters": 10**6},
            r"budget: it allows rank .* max_rank: 16, so all ranks would",
        ),
        ({"method": "gradient", "max_rank": 3}, "budget: it allows rank 4 in every unit, which is not below max_rank"),
        (
            {"method": "cosine", "rank_allocation": "score", "min_rank": 4},
            r"min_rank: 4 in every unit uses the whole budget",
        ),
        (
            {"method": "cosine", "rank_allocation": "score", "min_rank": 4, "budget": 0.5},
            r"budget: .* do not pay for rank 4 in all",
        ),
    ],
)
def test_ranks_that_are_equal_by_force_are_refused_before_anything_is_scored(tmp_path, monkeypatch, block, message):
    scored = []
    monkeypatch.setattr(select, "make_plan", lambda selection: scored.append(selection))
    with pytest.raises(LayerselError, match=message):
        choose(tmp_path, 24, **block)
    assert not scored


# --- Keys that nothing reads --------------------------------------------------------------------------------------


def test_a_method_is_exchanged_by_one_word_and_what_it_does_not_read_is_named_once(tmp_path, logged):
    _, plan = choose(tmp_path / "compared", 24, method="random", num_samples=999, token="last", flexora={"steps": 3})
    (said,) = [line for line in logged() if UNREAD in line]
    assert said.endswith(
        "layersel.selection.flexora, layersel.selection.num_samples: 999, layersel.selection.token: 'last' "
        "(with method: random)"
    )
    _, bare = choose(tmp_path / "bare", 24, method="random")
    assert not any(UNREAD in line for line in logged())
    assert plan.modules == bare.modules and plan.settings == bare.settings
    path = str(plan_path(tmp_path / "bare"))
    _, again = choose(tmp_path / "again", 24, method="random", num_samples=5, plan=path)
    assert again.modules == plan.modules
