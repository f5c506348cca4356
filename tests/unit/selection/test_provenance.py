"""A plan is applied to the model it was made for, wherever that lies, and says when the data are others."""

import json
import logging
from pathlib import Path

import pytest
from helpers.models import make_lora, make_rows, make_small_llama, make_trainer
from helpers.plans import make_plan

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.selection.provenance import compare_data, list_base_differences, shorten
from axolotl_layersel.training.prepare import prepare_trainer

OTHER_DATA = "was made on other data than this run's"


def prepare(folder, base: str = "org/Base-1B", rows=None, resume_from=None, eval_rows=None, model=None, **selection):
    model = make_lora(model or make_small_llama())
    model.peft_config["default"].base_model_name_or_path = base
    trainer = make_trainer(model, folder, rows, save_strategy="steps", save_steps=2)
    if eval_rows:
        trainer.eval_dataset = make_trainer(make_lora(make_small_llama()), folder, eval_rows).train_dataset
    block = {"selection": {"method": "cka", **({"num_samples": 8} if selection.get("method", "cka") == "cka" else {})}}
    block["selection"].update(selection)
    return prepare_trainer(trainer, LayerselConfig.model_validate(block), resume_from), trainer


@pytest.fixture
def plan(tmp_path) -> str:
    prepare(tmp_path / "made")
    return str(tmp_path / "made" / "layersel" / "plan.json")


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("meta-llama/Llama-3.1-8B", "llama-3.1-8b"),
        ("/data/models/Llama-3.1-8B/", "llama-3.1-8b"),
        ("./Llama-3.1-8B", "llama-3.1-8b"),
        ("/c/hub/models--meta-llama--Llama-3.1-8B/snapshots/0e9e39f249a16976918f6564b8830bc894c89659", "llama-3.1-8b"),
        ("/c/hub/models--gpt2/snapshots/607a30d783dfa663caf39e06633721c8d4cfcd7e", "gpt2"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b-instruct"),
    ],
)
def test_a_model_is_known_by_its_name_wherever_it_lies(name, short):
    assert shorten(name) == short


def test_a_plan_of_another_model_is_refused_unless_that_is_ignored(plan, tmp_path):
    prepare(tmp_path / "again", plan=plan)
    prepare(tmp_path / "moved", base="/elsewhere/base-1b/", plan=plan)
    message = (
        r"^layersel\.selection\.plan: the plan from .*plan\.json does not fit this run: base_model: org/Other-1B is "
        r"not org/Base-1B, which it was made for\. .*set `layersel\.selection\.plan_check: ignore`\.$"
    )
    with pytest.raises(LayerselError, match=message):
        prepare(tmp_path / "other", base="org/Other-1B", plan=plan)
    made, _ = prepare(tmp_path / "ignored", base="org/Other-1B", plan=plan, plan_check="ignore")
    assert made.base_model == "org/Base-1B"


def test_a_model_of_the_same_name_and_another_shape_is_refused(plan, tmp_path):
    other = make_small_llama(intermediate_size=64)
    with pytest.raises(LayerselError, match=r"has intermediate_size: 64, and org/Base-1B, which .* has 48\."):
        prepare(tmp_path / "other", model=other, plan=plan)


def test_a_plan_that_was_written_before_shapes_were_is_known_by_its_name(plan, tmp_path):
    content = json.loads(Path(plan).read_text())
    assert content.pop("base_shape")["hidden_size"] == 32
    (tmp_path / "old.json").write_text(json.dumps(content))
    prepare(tmp_path / "same", plan=str(tmp_path / "old.json"))
    with pytest.raises(LayerselError, match="base_model: x/y is not org/Base-1B"):
        prepare(tmp_path / "other", base="x/y", plan=str(tmp_path / "old.json"))
    # Models that were built in memory have no name.
    assert list_base_differences(make_plan(base_model=None), "x/y", None) == []
    assert list_base_differences(make_plan(), "", {}) == []


@pytest.mark.trains
def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    _, trainer = prepare(tmp_path / "run")
    trainer.train()
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    with pytest.raises(
        LayerselError, match=r"^resume_from_checkpoint: the plan .*checkpoint-2.* base_model: x/y is not"
    ):
        prepare(tmp_path / "other", base="x/y", resume_from=checkpoint)
    prepare(tmp_path / "same", resume_from=checkpoint)


def test_other_data_are_told_in_one_warning(plan, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "axolotl.layersel"):
        prepare(tmp_path / "same", plan=plan)
        assert OTHER_DATA not in caplog.text
        prepare(tmp_path / "changed", rows=make_rows(seed=5), plan=plan)
        assert caplog.text.count(OTHER_DATA) == 1
        assert "the 8 rows of the training set that it was made on hold other tokens now" in caplog.text
        caplog.clear()
        prepare(tmp_path / "fewer", rows=make_rows(8), plan=plan)
        assert caplog.text.count(OTHER_DATA) == 1
        assert "of the training set, and this run's has 8 rows" in caplog.text


@pytest.mark.trains
def test_the_rows_of_a_search_on_the_eval_set_are_compared_with_the_eval_set(tmp_path):
    search = {"steps": 2, "val_source": "eval", "val_samples": 4}
    made, trainer = prepare(tmp_path, method="flexora", ratio=0.5, flexora=search, eval_rows=make_rows(9, seed=4))
    assert compare_data(made, trainer.train_dataset, trainer.eval_dataset) is None
    assert compare_data(made, None, {"a": trainer.eval_dataset}) is None
    assert "this run has none that could be compared" in compare_data(made, trainer.train_dataset, None)
    assert "rows of the eval set that it was made on hold" in compare_data(made, None, trainer.train_dataset)


def test_a_plan_that_looked_at_no_data_is_of_any_data(tmp_path):
    made, _ = prepare(tmp_path, method="first")
    assert compare_data(made, None, None) is None
