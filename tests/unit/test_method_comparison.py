"""Experiments for PEFT's method comparison, as its script would train them, on a small model."""

import json
import math

import pytest
import yaml
from helpers.axolotl_files import PLUGIN, find_unknown_keys, validate, without_plugins
from helpers.models import make_lora, make_small_llama
from helpers.places import ROOT
from peft import PeftConfig, get_peft_model

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.lora.modules import find_lora_modules
from axolotl_layersel.selection.plan import Budget, LayerChoice, Plan
from axolotl_layersel.selection.plan_file import write_plan
from benchmarks.peft_method_comparison.write_experiment import write_experiment

FILE = ROOT / "benchmarks" / "peft_method_comparison" / "plan.yml"
# Ranks of a plan, by layer and projection.
RANKS = {(1, "q"): 48, (1, "v"): 3, (3, "q"): 32, (10, "v"): 5}
DEFAULTS = {"lr": 0.0001, "weight_decay": 0.1}


def name(layer: int, projection: str) -> str:
    return f"model.layers.{layer}.self_attn.{projection}_proj"


def make_plan(**changes) -> Plan:
    """Return a plan with ``RANKS`` for a model of 12 layers."""
    ranks = {name(*place): rank for place, rank in RANKS.items()}
    kept = {layer for layer, _ in RANKS}
    fields = {
        "method": "gradient",
        "layers": [LayerChoice(layer=layer, score=1.0, selected=layer in kept) for layer in range(12)],
        "unselected": "remove",
        "stack": "model.layers",
        "modules": sorted(ranks),
        "granularity": "module",
        "module_scores": {name(layer, kind): 1.0 for layer in range(12) for kind in "qv"},
        "ranks": ranks,
        "budget": Budget(lora=100_000, lora_r=32, allowed=100_000, spent=50_000),
        "settings": {"method": "gradient"},
        "seed": 0,
        "calibration_rows": [0],
        "dataset_fingerprint": None,
        "base_model": None,
        "versions": {},
        "engine": "single",
        "processes": 1,
        "seconds": 1.0,
    }
    return Plan(**{**fields, **changes})


@pytest.fixture
def run() -> dict:
    """The content of the file that makes the plan."""
    return yaml.safe_load(FILE.read_text())


@pytest.fixture
def experiment(tmp_path):
    """The folder of an experiment, where PEFT's script looks for it."""
    return tmp_path / "experiments" / "lora" / "llama-layersel"


def build(experiment) -> dict[str, tuple[int, float]]:
    """Return rank and scaling of every LoRA module that PEFT puts into a new model for an experiment."""
    config = PeftConfig.from_pretrained(str(experiment))
    assert config.base_model_name_or_path is None and config.task_type == "CAUSAL_LM" and not config.inference_mode
    model = get_peft_model(make_small_llama(layers=12), config)
    assert any(parameter.requires_grad for parameter in model.parameters())
    modules = find_lora_modules(model.base_model.model)
    return {name: (module.r["default"], module.scaling["default"]) for name, module in modules.items()}


def test_axolotl_accepts_the_file_that_makes_the_plan(run):
    with without_plugins():
        cfg = validate(run)
        assert run["plugins"] == [PLUGIN] and find_unknown_keys(run) == set()
    assert LayerselConfig.model_validate(cfg.layersel.to_dict()) == LayerselConfig(**run["layersel"])


def test_a_row_of_the_plan_is_the_comparisons(run):
    (dataset,) = run["datasets"]
    # PEFT's query_template, with its own name of the question.
    expected = "Question: {query} Think step by step.\nAnswer:".replace("{query}", "{instruction}")
    assert dataset["type"]["format"] == dataset["type"]["no_input_format"] == expected
    assert run["train_on_inputs"] and run["sequence_len"] == 768


def test_peft_builds_the_modules_of_a_plan_with_its_ranks_at_the_scaling_of_the_run(run, experiment, tmp_path):
    write_plan(make_plan(), tmp_path / "plan.json")
    write_experiment(run, tmp_path / "plan.json", experiment)
    assert build(experiment) == {name(*place): (rank, pytest.approx(2.0)) for place, rank in RANKS.items()}
    assert json.loads((experiment / "training_params.json").read_text()) == {"optimizer_kwargs": DEFAULTS}
    assert sorted(path.name for path in experiment.iterdir()) == ["adapter_config.json", "training_params.json"]


def test_a_plan_without_ranks_has_lora_r_in_its_layers_and_rslora_keeps_its_scaling(run, experiment, tmp_path):
    settings = {"method": "explicit", "layers": [1, 10]}
    modules = [name(layer, kind) for layer in (1, 10) for kind in "qv"]
    choices = [LayerChoice(layer=layer, score=None, selected=layer in (1, 10)) for layer in range(12)]
    plain = {"ranks": {}, "budget": None, "module_scores": {}, "granularity": "layer", "calibration_rows": []}
    plan = make_plan(method="explicit", settings=settings, modules=modules, layers=choices, **plain)
    write_plan(plan, tmp_path / "plan.json")
    write_experiment({**run, "peft_use_rslora": True}, tmp_path / "plan.json", experiment)
    assert build(experiment) == {name: (32, pytest.approx(64 / math.sqrt(32))) for name in modules}


def test_an_adapter_gives_its_ranks_and_not_its_base(run, experiment, tmp_path):
    patterns = {"rank_pattern": {"layers.2.self_attn.q_proj": 7}, "alpha_pattern": {"layers.2.self_attn.q_proj": 14}}
    model = make_lora(make_small_llama(layers=12), ["q_proj", "v_proj"], layers_to_transform=[2, 5], **patterns)
    model.peft_config["default"].task_type = "CAUSAL_LM"
    model.peft_config["default"].base_model_name_or_path = "another/base"
    model.save_pretrained(tmp_path / "adapter")
    write_experiment({**run, "base_model": "small", "learning_rate": 0.0003}, tmp_path / "adapter", experiment)
    ranks = {name(layer, kind): 7 if (layer, kind) == (2, "q") else 4 for layer in (2, 5) for kind in "qv"}
    assert build(experiment) == {key: (rank, 2.0) for key, rank in ranks.items()}
    training = json.loads((experiment / "training_params.json").read_text())
    assert training == {"model_id": "small", "optimizer_kwargs": {**DEFAULTS, "lr": 0.0003}}


def test_what_would_be_another_experiment_is_refused(run, experiment, tmp_path):
    plan = tmp_path / "plan.json"
    write_plan(make_plan(), plan)
    for change, message in (
        ({"lora_r": 16}, "lora_r: 16 is not the 32 of the plan"),
        ({"optimizer": "adamw_bnb_8bit"}, "optimizer: adamw_bnb_8bit is not what the comparison trains with"),
        ({"lr_scheduler": "linear"}, "lr_scheduler: linear is not what"),
        ({"lora_target_parameters": ["experts.w1"]}, "lora_target_parameters: LoRA on experts"),
    ):
        with pytest.raises(LayerselError, match=message):
            write_experiment({**run, **change}, plan, experiment)
    assert not experiment.exists()
    write_experiment(run, plan, experiment)
    with pytest.raises(LayerselError, match="Give the experiment another name"):
        write_experiment(run, plan, experiment)
    with pytest.raises(LayerselError, match="SOURCE: "):
        write_experiment(run, tmp_path / "no.json", tmp_path / "other")
