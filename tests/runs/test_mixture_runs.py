"""l1ra and flexora on mixtures of experts with the usual target modules, which PEFT maps to expert parameters."""

import pytest
import torch
import transformers
from helpers.launched import MadeOnce
from helpers.launched import Run as Launched
from helpers.mixtures import FAMILIES, STAYS, compute, find_ranks, make_base
from helpers.settings import engine_settings, l1ra
from peft import PeftModel


@pytest.fixture(scope="module")
def runs(train, base_model, tmp_path_factory):
    """A run by engine that moves rank in a mixture with the usual target modules, and the mixture."""
    folder = tmp_path_factory.mktemp("mixture")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base_model)
    tokenizer.save_pretrained(folder)
    make_base("Qwen3Moe", vocab_size=len(tokenizer)).save_pretrained(folder)

    def run(engine: str, expect: int = 0) -> Launched:
        chosen, _ = engine_settings(engine, folder)
        if "fsdp_config" in chosen:
            chosen["fsdp_config"]["transformer_layer_cls_to_wrap"] = "Qwen3MoeDecoderLayer"
        settings = {
            **l1ra(update_ratio=0.16, move_ratio=0.3),
            "base_model": str(folder),
            "lora_target_modules": FAMILIES["Qwen3Moe"][1],
            "max_steps": 6,
            **chosen,
        }
        return train(engine, **settings, expect=expect)

    return MadeOnce(run), folder


@pytest.mark.parametrize("engine", ["ddp", "zero2", "fsdp2-full"])
def test_engines_move_rank_in_a_mixture_as_one_process_does(runs, engine):
    runs, folder = runs
    alone, shared = runs["single"], runs[engine]
    assert alone.log.count(STAYS) == 1 and shared.log.count(STAYS) == 1
    assert shared.ranks() == alone.ranks()
    assert len({tuple(ranks.values()) for ranks in alone.ranks().values()}) > 1
    one, other = alone.adapter(), shared.adapter()
    assert one.keys() == other.keys() and any("experts" in name for name in one)
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=2e-4, rtol=1e-3)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    plain = compute(base)
    model = PeftModel.from_pretrained(base, shared.folder)
    assert not torch.allclose(compute(model), plain, atol=1e-3)
    trained = [value for name, value in model.named_parameters() if "experts" in name and "lora_B" in name]
    assert len(trained) == 8 and all(value.any() for value in trained)
    assert find_ranks(model, experts=False) == shared.ranks()[6]


def test_experts_under_zero3_are_refused_before_the_model_loads(runs):
    run = runs[0].make("zero3", expect=1)
    message = (
        "LayerselError: lora_target_modules: 'gate_proj' is of a mixture's experts: PEFT cannot put LoRA on expert"
    )
    assert message in run.log
    assert "Loading weights" not in run.log
