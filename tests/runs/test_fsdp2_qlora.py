"""Whole runs of Axolotl on FSDP2 with a 4-bit base, which every process loads whole and then shards."""

import subprocess
import sys

import pytest
from helpers.launched import KILLED, MadeOnce, Run, difference, scores
from helpers.places import ROOT, WITHOUT_PACKAGE, at_night
from helpers.settings import l1ra, selection
from safetensors.torch import load_file

ENGINES = ["fsdp2-full-everywhere", "fsdp2-sharded"]
QLORA = {"adapter": "qlora", "load_in_4bit": True, "max_steps": 4}
BLOCKS = {
    "last": selection("last"),
    # Updates after steps 1, 2 and 3, which the scaling follows.
    "cka and l1ra": {
        "layersel": {
            **selection("cka")["layersel"],
            **l1ra(update_ratio=0.25, last_update_ratio=0.8)["layersel"],
            "scaling_exponent": 0.5,
        }
    },
    "flexora": selection("flexora", flexora={"steps": 4, "val_samples": 8}),
}
RUNS = [
    *at_night(*(("last", engine) for engine in ENGINES)),
    *(("cka and l1ra", engine) for engine in ENGINES),
    *at_night(("flexora", "fsdp2-sharded")),
]
# The model stays in training mode, without dropout: in evaluation mode some CPUs would pack 4-bit weights again, see
# cpu_engines.py.
STOCK_SCRIPT = """
import sys
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

base, output, *folders = sys.argv[1:]
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
results = {}
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=config, device_map={"": "cpu"}
    )
    model = PeftModel.from_pretrained(model, folder).train()
    with torch.no_grad():
        results[folder] = model(input_ids=torch.arange(40).reshape(2, 20) + 300).logits.contiguous()
assert "axolotl_layersel" not in sys.modules
save_file(results, output)
"""


@pytest.fixture(scope="module")
def runs(train) -> dict[tuple[str, str], Run]:
    """A run with each block on each engine."""
    return MadeOnce(lambda case: train(case[1], **BLOCKS[case[0]], **QLORA))


@pytest.mark.parametrize(("block", "engine"), RUNS)
def test_each_of_two_processes_holds_half_of_the_weights_in_half_a_byte_each(runs, block, engine):
    alone, together = runs[block, "single"].engine, runs[block, engine].engine
    assert (together["engine"], together["processes"], alone["processes"]) == ("fsdp2", 2, 1)
    weights = alone["quantised"]["weights"]
    assert alone["quantised"]["bytes"] == weights // 2 > 100_000
    assert together["quantised"] == {"weights": weights, "bytes": weights // 4}


@pytest.mark.parametrize(("block", "engine"), RUNS)
def test_it_chooses_moves_rank_and_trains_as_one_process_does(runs, block, engine):
    alone, together = runs[block, "single"], runs[block, engine]
    assert together.plan["modules"] == alone.plan["modules"]
    if block != "last":
        assert scores(together.plan) == pytest.approx(scores(alone.plan), abs=1e-6)
        assert len(set(scores(alone.plan))) == 8
    if "l1ra" in block:
        assert together.ranks() == alone.ranks()
        assert len({tuple(ranks.values()) for ranks in alone.ranks().values()}) > 2, "ranks moved more than once"
    # As in test_runs.py, the order of a sum changes a weight whose gradient is near zero. Seen: 5e-7 and 1.2e-5.
    assert together.losses() == pytest.approx(alone.losses(), abs=2e-5)
    assert difference(together.adapter(), alone.adapter()) <= 5e-5


@pytest.mark.nightly
@pytest.mark.parametrize("method", ["fisher", "gradient"])
def test_methods_that_go_back_through_weights_of_four_bits_score_as_on_one_process(make_plan, method):
    alone = make_plan(**selection(method), **QLORA)
    together = make_plan("fsdp2-sharded", **selection(method), **QLORA)
    assert scores(together) == pytest.approx(scores(alone), rel=1e-5)
    assert together["modules"] == alone["modules"]
    assert together.get("ranks") == alone.get("ranks")
    assert len(set(scores(alone))) == 8


@pytest.mark.nightly
def test_a_killed_run_that_is_resumed_ends_as_if_it_had_not_been_killed(train, runs):
    engine, settings = "fsdp2-full-everywhere", {**BLOCKS["cka and l1ra"], **QLORA}
    killed = train(engine, expect=KILLED, env={"LAYERSEL_TEST_SIGNAL": "KILL:3"}, **settings)
    resumed = train(engine, output=killed.folder, auto_resume_from_checkpoints=True, **settings)
    assert (resumed.folder / "weights_at_2.safetensors").exists(), "it did not resume at step 2"
    assert "nothing is scored" in resumed.log
    whole = runs["cka and l1ra", engine]
    assert resumed.ranks() == whole.ranks()
    # As on the other engines with several processes; seen: 0.
    assert difference(whole.adapter(), resumed.adapter()) <= 1e-6


@pytest.mark.nightly
def test_stock_peft_computes_on_the_same_base_what_the_trained_model_computes(runs, base_model, tmp_path):
    folders = {(block, "fsdp2-sharded"): runs[block, "fsdp2-sharded"].folder for block in ("cka and l1ra", "flexora")}
    output = tmp_path / "stock.safetensors"
    command = [sys.executable, "-c", STOCK_SCRIPT, str(base_model), str(output), *map(str, folders.values())]
    subprocess.run(command, check=True, cwd=ROOT.parent, env=WITHOUT_PACKAGE)
    stock = load_file(output)
    for case, folder in folders.items():
        trained = load_file(folder / "logits.safetensors")["logits"]
        assert float((stock[str(folder)] - trained).abs().max()) <= 1e-5, case
