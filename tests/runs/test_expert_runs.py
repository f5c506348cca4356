"""LoRA on the experts of a mixture, which are 3-D parameters: scored, chosen, given rank, written and loaded again."""

import functools

import pytest
import torch
import transformers
from helpers.experts import PARAMETERS, make_base
from helpers.settings import engine_settings, selection
from peft import PeftModel

from axolotl_layersel.lora.modules import find_lora_modules


@pytest.fixture(scope="module")
def launch(train, base_model, tmp_path_factory):
    """Return a function that chooses among experts and trains with Axolotl, once for each engine."""
    folder = tmp_path_factory.mktemp("mixture")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base_model)
    tokenizer.save_pretrained(folder)
    make_base("Qwen3Moe", vocab_size=len(tokenizer), num_hidden_layers=4).save_pretrained(folder)

    @functools.cache
    def run(engine: str):
        chosen, _ = engine_settings(engine, folder)
        if "fsdp_config" in chosen:
            chosen["fsdp_config"]["transformer_layer_cls_to_wrap"] = "Qwen3MoeDecoderLayer"
        settings = {
            **selection("gradient", num_samples=9, budget=0.6),
            "base_model": str(folder),
            "lora_target_modules": ["q_proj", "v_proj"],
            "lora_target_parameters": PARAMETERS,
            "max_steps": 4,
            **chosen,
        }
        return train(engine, **settings), settings

    return run


@pytest.mark.parametrize("engine", ["ddp", "zero2", "fsdp2-full", "fsdp2-sharded"])
def test_engines_give_experts_rank_and_train_them_as_one_process_does(launch, engine):
    (alone, settings), (shared, _) = launch("single"), launch(engine)
    ranks = alone.plan["ranks"]
    assert shared.plan["ranks"] == ranks and shared.engine["engine"] == engine.partition("-")[0]
    assert {name.rpartition(".")[2] for name in ranks} >= {"experts", "base_layer"}
    one, other = alone.adapter(), shared.adapter()
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=2e-4, rtol=1e-3)
        assert value.abs().max() > 2e-3  # B is no longer zero
    base = transformers.AutoModelForCausalLM.from_pretrained(settings["base_model"])
    model = PeftModel.from_pretrained(base, shared.folder)
    assert set(find_lora_modules(model.get_base_model())) == set(ranks)


@pytest.mark.parametrize("engine", ["single", "fsdp2-sharded"])
@pytest.mark.nightly
def test_a_run_with_experts_resumes_as_if_it_had_not_stopped(launch, train, engine):
    run, settings = launch(engine)
    resumed = train(engine, **settings, resume_from_checkpoint=str(run.folder / "checkpoint-2"))
    assert resumed.plan["ranks"] == run.plan["ranks"]
    one, other = run.adapter(), resumed.adapter()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    early = run.adapter("checkpoint-2")
    assert not all(torch.equal(one[name], early[name]) for name in one)
