"""Modules whose ranks a plan gives: their scaling, and the adapter that says so."""

import json
import math
from pathlib import Path

import pytest
import torch
from helpers.models import make_lora, make_small_llama, make_trainer
from peft import PeftModel

from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.config.selection import SelectionConfig
from axolotl_layersel.lora.export import export_adapter
from axolotl_layersel.lora.layouts import LAYOUTS
from axolotl_layersel.lora.patterns import scale_by_rank
from axolotl_layersel.lora.readers import READERS, find_readers, read_adapter_file
from axolotl_layersel.lora.run import Run
from axolotl_layersel.training.prepare import prepare_trainer

TOKENS = torch.arange(3, 33)[None]
EXPONENTS = (None, 0.0, 0.5, 1.0)  # None: the default
# The bounds leave rank to modules of low scores too.
BOUNDS = {"min_rank": 1, "max_rank": 6}
RANKED = {"method": "fisher", "granularity": "module", "rank_allocation": "score", "num_samples": 8, **BOUNDS}


def prepare(
    folder, exponent, chosen: dict | None = None, continues_adapter: bool = False, model=None, l1ra=None, **lora
):
    trainer = make_trainer(model or make_lora(make_small_llama(), **lora), folder, max_steps=3 if l1ra is None else 12)
    settings = SelectionConfig(**(chosen or RANKED))
    block = LayerselConfig(selection=settings, l1ra=l1ra, scaling_exponent=exponent)
    return trainer, prepare_trainer(trainer, block, continues_adapter=continues_adapter)


def read_scalings(trainer) -> dict[str, float]:
    return {name: module.scaling["default"] for name, module in Run.of(trainer).lora_modules.items()}


def compute(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def read_config(folder) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("exponent", EXPONENTS)
def test_the_scaling_of_a_module_follows_its_rank_from_that_of_lora_r(tmp_path, exponent, use_rslora):
    trainer, plan = prepare(tmp_path, exponent, use_rslora=use_rslora)
    assert len(set(plan.ranks.values())) > 2
    exponent = exponent or 0.0
    assert plan.scaling_exponent == exponent
    scaling = 8 / (math.sqrt(4) if use_rslora else 4)
    found = read_scalings(trainer)
    assert found == {name: scale_by_rank(scaling, 4, rank, exponent) for name, rank in plan.ranks.items()}
    for name, rank in plan.ranks.items():
        assert found[name] == pytest.approx(scaling * (4 / rank) ** exponent, rel=1e-12)
        if not exponent:
            assert found[name] == scaling, "to the bit"
        if use_rslora and exponent == 0.5:
            assert found[name] == pytest.approx(8 / math.sqrt(rank)), "this is rsLoRA of every module"


@pytest.mark.trains
@pytest.mark.parametrize("exponent", EXPONENTS[2:])
def test_stock_peft_and_every_layout_compute_what_training_computed(tmp_path, exponent):
    make_small_llama().config.save_pretrained(tmp_path / "base")
    trainer, _ = prepare(tmp_path / "run", exponent)
    trainer.train()
    trainer.save_model()
    logits = compute(trainer.model)
    assert (logits - compute(make_small_llama())).abs().max() > 0.01
    model = PeftModel.from_pretrained(make_small_llama(), str(tmp_path / "run"))
    torch.testing.assert_close(compute(model), logits, atol=1e-6, rtol=0)
    for layout in LAYOUTS:
        export_adapter(tmp_path / "run", layout, tmp_path / layout, str(tmp_path / "base"))
        model = PeftModel.from_pretrained(make_small_llama(), str(tmp_path / layout))
        torch.testing.assert_close(compute(model), logits, atol=1e-5, rtol=0)


def test_an_exponent_of_1_keeps_one_alpha_which_other_programs_read(tmp_path):
    for exponent in (0.0, 0.5, 1.0):
        trainer, _ = prepare(tmp_path / str(exponent), exponent, lora_alpha=7, task_type="CAUSAL_LM")
        trainer.save_model()
        file, config = read_adapter_file(tmp_path / str(exponent)), read_config(tmp_path / str(exponent))
        readers = find_readers(file, [])
        by_rank, by_top = READERS["llama.cpp"].find_fault(file), READERS["vllm<0.32"].find_fault(file)
        assert (by_rank is None, by_top is None) == (exponent == 1, exponent == 0)
        assert bool(config["alpha_pattern"]) == (exponent < 1)
        assert readers.export_for == ("sglang" if exponent == 1 else "llama.cpp")
        assert readers.misscaling == ["llama.cpp", "TensorRT-LLM"] * (exponent < 1)
        assert readers.right[1] == ("vLLM" if exponent == 0 else "vLLM 0.32 or later")
    assert config["lora_alpha"] == 7


@pytest.mark.parametrize("allocation", ["match", "score"])
def test_scores_and_equal_parameters_give_ranks_whose_scaling_follows(tmp_path, allocation):
    chosen = {"method": "fisher", "num_samples": 8, "rank_allocation": allocation, "unselected": "freeze", "ratio": 0.5}
    trainer, plan = prepare(tmp_path, 0.5, chosen)
    found = read_scalings(trainer)
    frozen = found.keys() - plan.ranks.keys()
    assert {found[name] for name in frozen} == {2.0} and frozen
    for name, rank in plan.ranks.items():
        assert found[name] == pytest.approx(2 * (4 / rank) ** 0.5, rel=1e-12)
    assert set(plan.ranks.values()) != {4}


@pytest.mark.trains
def test_dora_of_several_ranks_is_what_stock_peft_loads(tmp_path):
    trainer, _ = prepare(tmp_path, 0.5, use_dora=True)
    trainer.train()
    trainer.save_model()
    assert len(set(read_scalings(trainer).values())) > 2
    model = PeftModel.from_pretrained(make_small_llama(), str(tmp_path))
    torch.testing.assert_close(compute(model), compute(trainer.model), atol=1e-5, rtol=0)


@pytest.mark.trains
@pytest.mark.parametrize("exponent", [0.5, 1.0])  # neither is the default
def test_a_plan_and_an_adapter_that_are_used_again_keep_the_scaling(tmp_path, exponent):
    trainer, _ = prepare(tmp_path / "first", exponent)
    trainer.train()
    trainer.save_model()
    path, scalings = str(tmp_path / "first" / "layersel" / "plan.json"), read_scalings(trainer)
    again, reused = prepare(tmp_path / "again", None, {"method": "fisher", "plan": path})
    assert read_scalings(again) == scalings
    assert reused.scaling_exponent == exponent
    # An adapter that is continued says itself how it is scaled.
    model = PeftModel.from_pretrained(make_small_llama(), str(tmp_path / "first"), is_trainable=True)
    chosen = {"method": "fisher", "plan": path, "unselected": "remove"}
    continued, _ = prepare(tmp_path / "continued", None, chosen, continues_adapter=True, model=model)
    assert read_scalings(continued) == pytest.approx(scalings, rel=1e-12)
    torch.testing.assert_close(compute(continued.model), compute(trainer.model), atol=1e-6, rtol=0)


def test_an_exponent_that_a_plan_without_ranks_leaves_unread_is_named(tmp_path, caplog):
    prepare(tmp_path / "first", 0.25, {"method": "first", "ratio": 0.5}, l1ra={})
    path = str(tmp_path / "first" / "layersel" / "plan.json")
    assert json.loads(Path(path).read_text())["scaling_exponent"] == 0.25
    trainer, reused = prepare(tmp_path / "again", 0.5, {"method": "first", "plan": path})
    assert "layersel.scaling_exponent: 0.5 is not read, because the plan gives every module lora_r" in caplog.text
    assert reused.scaling_exponent == 0
    assert set(read_scalings(trainer).values()) == {2.0}
