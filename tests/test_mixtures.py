"""l1ra and flexora on mixtures of experts under the usual target modules, which PEFT turns into expert parameters."""

import logging
import shutil

import pytest
import torch
import transformers
from conftest import Run as Launched
from conftest import RunsByEngine, engine_settings, l1ra, make_lora, make_trainer
from families import EXPERTS, GATED_DELTA, LATENT, SIZE
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import ParamWrapper
from test_experts import make_base as make_without_lora
from test_experts import make_experts

from axolotl_layersel import L1RAConfig, LayerselConfig, SelectionConfig, prepare_trainer
from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.l1ra.records import RankHistory
from axolotl_layersel.lora.modules import find_lora_modules, list_linear
from axolotl_layersel.lora.run import Run
from axolotl_layersel.selection.gate_history import GateHistory

pytestmark = pytest.mark.trains

MLP = ["gate_proj", "up_proj", "down_proj"]
SPARSE = {**EXPERTS, "head_dim": 8, "num_experts_per_tok": 2}
SHARED = {"moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
# By the names of transformers' classes: what their configuration needs beyond the size, and what gets LoRA.
FAMILIES = {
    "Qwen3Moe": (SPARSE, ["q_proj", "k_proj", "v_proj", "o_proj", *MLP]),
    "Glm4Moe": ({**SHARED, "head_dim": 8, "first_k_dense_replace": 1}, ["q_proj", "v_proj", *MLP]),
    "DeepseekV3": (LATENT, ["q_b_proj", "kv_b_proj", "o_proj", *MLP]),
    "Qwen3Next": ({**EXPERTS, **GATED_DELTA}, ["q_proj", "v_proj", "in_proj_qkvz", "out_proj", *MLP]),
    "Ernie4_5_Moe": ({**SHARED, "moe_num_experts": 4, "moe_k": 2}, ["q_proj", "v_proj", *MLP]),
    "Mixtral": ({"num_local_experts": 3}, ["q_proj", "v_proj", "w1", "w2", "w3"]),
}
MOVES = L1RAConfig(update_ratio=0.16, move_ratio=0.3)
STAYS = "stays at its rank"


def make_base(family: str, **settings):
    """Return a random mixture of experts of width 32 with 4 layers, the same each time."""
    torch.manual_seed(0)
    kind = getattr(transformers, f"{family}Config")
    config = kind(**{**SIZE, "initializer_range": 0.1, **FAMILIES[family][0], **settings})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():  # some leave their experts uninitialised
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1) if parameter.dim() > 2 else None
    return model


def make_mixture(family: str = "Qwen3Moe", **settings):
    """Return it with LoRA on the modules that users name."""
    return make_lora(make_base(family), FAMILIES[family][1], **settings)


def compute(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 23)[None]).logits


def find_ranks(model, experts: bool) -> dict[str, int]:
    """Return the ranks of LoRA on experts, or on linear modules."""
    modules = find_lora_modules(model.get_base_model())
    return {name: m.r["default"] for name, m in modules.items() if isinstance(m, ParamWrapper) == experts}


def count_parameters(model, names) -> dict[str, int]:
    """Return the parameters of one component of the LoRA modules ``names``."""
    modules = find_lora_modules(model.get_base_model())
    return {name: sum(modules[name].get_base_layer().weight.shape) for name in names}


@pytest.mark.parametrize("family", FAMILIES)
def test_rank_moves_among_linear_modules_and_stock_peft_computes_the_same(family, tmp_path, caplog):
    model = make_mixture(family)
    fixed, linear = find_ranks(model, experts=True), find_ranks(model, experts=False)
    assert fixed and len(set(fixed.values())) == 2, "gate and up, which became one, have twice the rank"
    trainer = make_trainer(model, tmp_path, max_steps=6, save_strategy="no")
    with caplog.at_level(logging.INFO):
        prepare_trainer(trainer, LayerselConfig(l1ra=MOVES))
        trainer.train()
    assert caplog.text.count(STAYS) == 1
    trainer.save_model()
    history = RankHistory.read(tmp_path).ranks
    assert list(history[0]) == list(linear) and history[0] == linear
    assert len({tuple(ranks.values()) for ranks in history.values()}) > 1, "no rank moved"
    assert find_ranks(trainer.model, experts=True) == fixed
    costs = count_parameters(trainer.model, linear)
    spent = [sum(rank * costs[name] for name, rank in ranks.items()) for ranks in history.values()]
    assert max(spent) == spent[0]

    expected, plain = compute(trainer.model), compute(make_base(family))
    reloaded = PeftModel.from_pretrained(make_base(family), tmp_path)
    torch.testing.assert_close(compute(reloaded), expected, atol=1e-5, rtol=1e-4)
    assert find_ranks(reloaded, experts=True) == fixed
    assert find_ranks(reloaded, experts=False) == history[6]
    torch.testing.assert_close(compute(reloaded.merge_and_unload()), expected, atol=1e-4, rtol=1e-3)
    # Experts have trained: without them the adapter computes something else.
    assert not torch.allclose(expected, plain, atol=1e-2)
    rebuilt = PeftModel.from_pretrained(make_base(family), tmp_path)
    for name in find_ranks(rebuilt, experts=True):
        rebuilt.get_base_model().get_submodule(name).lora_B["default"].weight.data.zero_()
    assert not torch.allclose(compute(rebuilt), expected, atol=1e-3)


def test_parameters_that_the_user_names_stay_at_their_rank_too(tmp_path, caplog):
    model = make_experts("Mixtral", target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    fixed = find_ranks(model, experts=True)
    trainer = make_trainer(model, tmp_path, max_steps=6, save_strategy="no")
    with caplog.at_level(logging.INFO):
        prepare_trainer(trainer, LayerselConfig(l1ra=MOVES))
        trainer.train()
    assert caplog.text.count(STAYS) == 1
    trainer.save_model()
    assert len({tuple(ranks.values()) for ranks in RankHistory.read(tmp_path).ranks.values()}) > 1
    reloaded = PeftModel.from_pretrained(make_without_lora("Mixtral"), tmp_path)
    assert find_ranks(reloaded, experts=True) == fixed
    torch.testing.assert_close(compute(reloaded), compute(trainer.model), atol=1e-5, rtol=1e-4)


def test_the_sum_of_ranks_stays_under_pressure_too(tmp_path):
    trainer = make_trainer(make_mixture(r=4), tmp_path, max_steps=10, save_strategy="no")
    settings = L1RAConfig(rule="pressure", budget="rank", update_ratio=0.1, l1_lambda=0.3, gate_lr=0.2)
    prepare_trainer(trainer, LayerselConfig(l1ra=settings))
    trainer.train()
    trainer.save_model()
    history = RankHistory.read(tmp_path).ranks
    assert len({tuple(ranks.values()) for ranks in history.values()}) > 1
    start = sum(history[0].values())
    assert all(sum(ranks.values()) <= start for ranks in history.values())
    assert any(sum(ranks.values()) == start for step, ranks in history.items() if 0 < step < 10)
    reloaded = PeftModel.from_pretrained(make_base("Qwen3Moe"), tmp_path)
    torch.testing.assert_close(compute(reloaded), compute(trainer.model), atol=1e-5, rtol=1e-4)


def test_a_run_that_resumes_ends_as_one_that_did_not_stop(tmp_path):
    def run(folder, resume_from=None):
        trainer = make_trainer(make_mixture(), folder, max_steps=6, save_steps=2)
        prepare_trainer(trainer, LayerselConfig(l1ra=MOVES), resume_from=resume_from)
        trainer.train(resume_from_checkpoint=resume_from)
        trainer.save_model()
        return trainer

    whole = run(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "again" / "checkpoint-4")
    again = run(tmp_path / "again", str(tmp_path / "again" / "checkpoint-4"))
    assert RankHistory.read(tmp_path / "again").ranks == RankHistory.read(tmp_path / "whole").ranks
    one, other = ({n: p for n, p in t.model.named_parameters() if "lora_" in n} for t in (whole, again))
    assert one.keys() == other.keys() and any("experts" in name for name in one)
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=0, rtol=0)


def test_an_adapter_that_was_made_so_is_continued_under_its_scaling(tmp_path):
    trainer = make_trainer(make_mixture(), tmp_path, max_steps=6, save_strategy="no")
    prepare_trainer(trainer, LayerselConfig(l1ra=MOVES))
    trainer.train()
    trainer.save_model()
    expected = compute(trainer.model)
    scalings = {n: m.scaling["default"] for n, m in find_lora_modules(trainer.model.get_base_model()).items()}
    model = PeftModel.from_pretrained(make_base("Qwen3Moe"), tmp_path, is_trainable=True)
    again = make_trainer(model, tmp_path / "again", max_steps=6, save_strategy="no")
    (scaling,) = set(scalings.values())
    lora_r = next(iter(RankHistory.read(tmp_path).ranks[0].values()))
    prepare_trainer(again, LayerselConfig(l1ra=MOVES), continues_adapter=True, lora_r=lora_r, scaling=scaling)
    modules = find_lora_modules(again.model.get_base_model())
    assert {name: module.scaling["default"] for name, module in modules.items()} == scalings
    torch.testing.assert_close(compute(again.model), expected, atol=1e-5, rtol=1e-4)
    again.train()
    again.save_model()
    reloaded = PeftModel.from_pretrained(make_base("Qwen3Moe"), tmp_path / "again")
    torch.testing.assert_close(compute(reloaded), compute(again.model), atol=1e-5, rtol=1e-4)


def test_a_plan_gives_experts_their_rank_and_l1ra_moves_that_of_the_others(tmp_path):
    trainer = make_trainer(make_mixture(), tmp_path, max_steps=6, save_strategy="no")
    selection = SelectionConfig(method="gradient", num_samples=9, ratio=0.8, budget=0.7, min_rank=1)
    plan = prepare_trainer(trainer, LayerselConfig(selection=selection, l1ra=MOVES))
    fixed = {name: rank for name, rank in plan.ranks.items() if "experts" in name}
    assert find_ranks(trainer.model, experts=True) == fixed and len(set(fixed.values())) > 1
    trained = {n: p.numel() for n, p in trainer.model.named_parameters() if p.requires_grad and "experts" in n}
    assert sum(trained.values()) > 0
    trainer.train()
    trainer.save_model()
    history = RankHistory.read(tmp_path).ranks
    assert history[0] == {name: rank for name, rank in plan.ranks.items() if name not in fixed}
    reloaded = PeftModel.from_pretrained(make_base("Qwen3Moe"), tmp_path)
    assert find_ranks(reloaded, experts=True) == fixed
    torch.testing.assert_close(compute(reloaded), compute(trainer.model), atol=1e-5, rtol=1e-4)


def search(**settings) -> LayerselConfig:
    settings = {"ratio": 0.5, "flexora": {"steps": 2, "val_samples": 4}, **settings}
    return LayerselConfig(selection=SelectionConfig(method="flexora", **settings))


@pytest.mark.parametrize("unselected", ["remove", "freeze"])
def test_a_search_has_gates_on_linear_modules_and_experts_go_with_their_layer(tmp_path, caplog, unselected):
    model = make_mixture()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = make_trainer(model, tmp_path, max_steps=2, save_strategy="no")
    with caplog.at_level(logging.INFO):
        plan = prepare_trainer(trainer, search(unselected=unselected))
    assert caplog.text.count("LoRA on experts takes no part in the search") == 1
    assert GateHistory.read(tmp_path).names == ["0", "1", "2", "3"]
    assert len(plan.selected) == 2
    modules = Run.of(trainer).lora_modules
    trained = {name for name, m in modules.items() if m.lora_B["default"].weight.requires_grad}
    assert {int(name.split(".")[2]) for name in trained} == set(plan.selected)
    assert {name for name in plan.modules if name not in list_linear(modules)} == {
        f"model.layers.{layer}.mlp.experts{inner}" for layer in plan.selected for inner in ("", ".base_layer")
    }
    assert trained == set(plan.modules)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            assert not parameter.any()
        elif "experts" in name and "lora_" not in name and unselected == "freeze":
            torch.testing.assert_close(parameter, before[name], atol=0, rtol=0)
    trainer.train()
    trainer.save_model()
    reloaded = PeftModel.from_pretrained(make_base("Qwen3Moe"), tmp_path)
    torch.testing.assert_close(compute(reloaded), compute(trainer.model), atol=0, rtol=0)


def test_what_has_experts_only_cannot_be_searched(tmp_path):
    trainer = make_trainer(make_mixture(), tmp_path)
    with pytest.raises(LayerselError, match=r"granularity: 'module' .* model\.layers\.0\.mlp\.experts has LoRA on exp"):
        prepare_trainer(trainer, search(granularity="module"))
    base = make_without_lora("GptOss")  # of Qwen3-MoE, PEFT makes the ends of the names of a regular expression
    model = make_lora(base, r".*\.[01]\.self_attn\.q_proj", target_parameters=["mlp.experts.down_proj"])
    with pytest.raises(LayerselError, match=r"granularity: 'layer' .*, and 2 has LoRA on experts only.*`candidates`"):
        prepare_trainer(make_trainer(model, tmp_path), search())


@pytest.mark.parametrize("settings", [LayerselConfig(l1ra=MOVES), search()])
def test_gates_are_refused_where_all_lora_is_on_experts(tmp_path, settings):
    config = LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    trainer = make_trainer(get_peft_model(make_base("Qwen3Moe"), config), tmp_path)
    with pytest.raises(LayerselError, match="lora_target_parameters: all LoRA is on the parameters of experts"):
        prepare_trainer(trainer, settings)


# --- Axolotl's engines ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(train, base_model, tmp_path_factory):
    """By engine, runs of Axolotl that move rank in a mixture with the usual target modules, and the mixture."""
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

    return RunsByEngine(run), folder


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
