"""Whole runs of Axolotl whose modules have ranks by score, on every engine."""

import json

import pytest
from helpers.launched import MadeOnce, Run, difference, load_merged, load_with_stock_peft
from helpers.places import ENGINES, sets_of_engines
from helpers.settings import PACKED_QLORA, l1ra, selection

SHARDED_BY = "zero3"  # in `make test`

SETTINGS = {**selection("gradient"), "max_steps": 4, "save_steps": 2}


@pytest.fixture(scope="module")
def whole_runs(train) -> dict[str, Run]:
    return MadeOnce(lambda engine: train(engine, **SETTINGS))


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_gives_the_ranks_that_one_process_gives(whole_runs, engine):
    alone, run = whole_runs["single"], whole_runs[engine]
    assert run.engine["engine"] == engine.split("-")[0]
    assert run.plan["ranks"] == alone.plan["ranks"]
    for name, score in alone.plan["module_scores"].items():
        assert run.plan["module_scores"][name] == pytest.approx(score, rel=1e-3, abs=1e-4)
    assert len(set(run.plan["ranks"].values())) > 2
    budget = run.plan["budget"]
    assert budget["spent"] <= budget["allowed"] == budget["lora"]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_adapter_and_the_optimizer_have_these_ranks_and_no_others(whole_runs, engine):
    run = whole_runs[engine]
    for place in (".", "checkpoint-2"):
        adapter = run.adapter(place)
        ranks = {name: adapter[f"base_model.model.{name}.lora_A.weight"].shape[0] for name in run.plan["ranks"]}
        assert ranks == run.plan["ranks"]
        assert len(adapter) == 2 * len(ranks)
        config = run.config(place)
        assert config["lora_alpha"] == 2 * config["r"] == 2 * max(ranks.values())
    assert run.engine["optimized"] == run.plan["budget"]["spent"]


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_every_engine_trains_them_as_one_process_does(whole_runs, engine):
    assert difference(whole_runs[engine].adapter(), whole_runs["single"].adapter()) < 1e-3


@pytest.mark.parametrize("engines", sets_of_engines(SHARDED_BY))
@pytest.mark.nightly
def test_stock_peft_computes_the_same_from_every_engines_adapter(whole_runs, engines, base_model, tmp_path):
    folders = {engine: whole_runs[engine].folder for engine in engines}
    logits = load_with_stock_peft(base_model, list(folders.values()), tmp_path)
    first = logits[str(folders["single"])]
    for engine in engines:
        assert float((logits[str(folders[engine])] - first).abs().max()) < 1e-2


@pytest.mark.nightly
def test_axolotl_merges_an_adapter_whose_modules_have_other_ranks(
    whole_runs, make_config, zygote, base_model, tmp_path
):
    run = whole_runs["single"]
    path, _, _ = make_config(output=run.folder, **SETTINGS)
    codes = zygote.run("axolotl.cli.merge_lora:do_cli", {"config": str(path)}, 1, path.with_suffix(".log"), {})
    assert codes == [0], (path.parent / "config.log.0").read_text()[-3000:]
    stock = load_with_stock_peft(base_model, [run.folder], tmp_path)[str(run.folder)]
    merged = load_merged(run.folder, tmp_path)
    assert float((merged - stock).abs().max()) <= 1e-4, "merging adds B·A to the weight, which rounds once more"


def test_a_run_that_is_given_the_plan_is_the_run_that_made_it(train, whole_runs):
    plan = whole_runs["single"].folder / "layersel" / "plan.json"
    settings = {**SETTINGS, "layersel": {"selection": {"method": "gradient", "plan": str(plan)}}}
    assert difference(train(**settings).adapter(), whole_runs["single"].adapter()) == 0


@pytest.mark.parametrize("engine", ["single", "zero3"])
def test_rank_moves_on_from_the_ranks_of_the_plan(train, whole_runs, engine):
    blocks = {
        **selection("gradient", max_rank=8)["layersel"],
        **l1ra(update_ratio=0.25, budget_unit="rank")["layersel"],
    }
    run = train(engine, **{**SETTINGS, "layersel": blocks, "max_steps": 8})
    history = run.ranks()
    assert history[0] == run.plan["ranks"]
    assert max(history[0].values()) <= 8
    assert sum(history[2].values()) <= sum(history[0].values())


@pytest.fixture(scope="module")
def limited_runs(train) -> dict[str, Run]:
    """Runs with a limit on the time of a step, which are long enough for it to be measured."""
    settings = {**selection("gradient", time=0.75), "max_steps": 24, "save_steps": 24}
    return MadeOnce(lambda engine: train(engine, **settings))


def check_limited(run: Run) -> None:
    """Check that a run keeps its limit, and tells what was measured once."""
    share = run.plan["step_time"]["share"]
    assert run.plan["backward_end"] == run.selected[0] > 0 and share <= 0.75
    assert run.log.count(f"without the cut, measured in steps 9 to 20 (formula: {share:.2f})") == 1
    assert f"a step takes {share:.2f} of plain LoRA's time, by the operations of its matrix products" in run.log


def test_the_time_of_a_step_is_limited_and_measured(limited_runs):
    check_limited(limited_runs["ddp"])


@pytest.mark.parametrize("engine", ["zero3", "fsdp2-sharded"])
@pytest.mark.nightly
def test_every_engine_trains_the_same_while_it_measures_the_time_of_a_step(limited_runs, engine):
    run, other = limited_runs[engine], limited_runs["ddp"]
    check_limited(run)
    assert run.engine["engine"] == engine.split("-")[0]
    assert run.plan["ranks"] == other.plan["ranks"]
    assert run.plan["step_time"]["share"] == pytest.approx(other.plan["step_time"]["share"])
    assert difference(run.adapter(), other.adapter()) < 1e-3


def test_a_quantised_and_packed_base_is_seen_through_the_same_sketch(train):
    run = train(**{**SETTINGS, **PACKED_QLORA, **selection("gradient", num_samples=8)})
    assert run.plan["ranks"].keys() == set(run.plan["modules"])
    assert len(set(run.plan["ranks"].values())) > 2


def test_the_plan_is_shown_with_its_ranks(whole_runs, capsys):
    from axolotl_layersel.reports.plan_table import print_plan
    from axolotl_layersel.selection.plan import Plan

    print_plan(Plan.model_validate_json(json.dumps(whole_runs["single"].plan)))
    shown = capsys.readouterr().out
    assert "parameters are spent; LoRA in all candidates has" in " ".join(shown.split())
