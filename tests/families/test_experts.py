"""LoRA on the experts of a mixture, which are 3-D parameters: scored, chosen, given rank, written and loaded again."""

import pytest
import torch
from helpers.experts import FAMILIES, PARAMETERS, make_base, make_experts
from helpers.models import make_rows, make_selection, make_trainer
from peft import PeftModel

from axolotl_layersel import LayerselConfig, SelectionConfig, prepare_trainer
from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.methods import get_method
from axolotl_layersel.lora.layouts import read_adapter
from axolotl_layersel.lora.modules import find_key, find_lora_modules
from axolotl_layersel.lora.run import Run
from axolotl_layersel.selection.data.calibration import read_samples
from axolotl_layersel.selection.methods import fisher, gradient
from axolotl_layersel.selection.plan_file import read_plan

EXPERTS = "model.layers.{}.mlp.experts"


def compute(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 23)[None]).logits


def find_parameters(model) -> dict[str, torch.nn.Parameter]:
    """Return the weight under each LoRA module."""
    return {
        name: getattr(module.get_base_layer(), getattr(module, "parameter_name", "weight"))
        for name, module in find_lora_modules(model.get_base_model()).items()
    }


def differentiate(model, rows) -> list[dict[str, torch.Tensor]]:
    """Return the gradient of each row's summed loss by the frozen weights, by nothing but autograd."""
    model.eval()
    gradients = []
    with model.disable_adapter():
        for row in rows:
            weights = find_parameters(model)
            for weight in weights.values():
                weight.requires_grad_(True).grad = None
            batch = {key: torch.tensor([value]) for key, value in row.items()}
            logits = model(input_ids=batch["input_ids"]).logits[0, :-1]
            torch.nn.functional.cross_entropy(logits, batch["labels"][0, 1:], reduction="sum").backward()
            gradients.append({name: weight.grad.clone() for name, weight in weights.items()})
    for weight in weights.values():
        weight.requires_grad_(False)
    return gradients


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_experts_are_those_of_their_gradients(tmp_path, family):
    model, rows = make_experts(family), make_rows()
    trainer = make_trainer(model, tmp_path, rows, gradient_checkpointing=family == "Mixtral")
    samples = read_samples(trainer.train_dataset, 5, seed=5)
    expected = differentiate(model, [rows[sample.row] for sample in samples])
    choice = make_selection(trainer, "gradient")
    modules = choice.stack.list_modules(choice.candidates)
    _, sketches = gradient.measure_sketches(choice, samples, modules, 48)  # as wide as the weights: nothing is lost
    choice = make_selection(trainer, "fisher", granularity="module")
    squares = fisher.measure_squared_gradients(choice, samples, modules)
    assert sum(name.endswith("experts.base_layer") for name in modules) == 3
    for place, name in enumerate(modules):
        found = squares[:, place]
        # Sums are in fp64, but the gradients in fp32, where one rounding is 6e-8.
        squared = torch.stack([g[name].double().square().sum() for g in expected])
        torch.testing.assert_close(found, squared, atol=0, rtol=1e-6)
        for parity in (0, 1):
            whole = sum(each[name] for each in expected[parity::2])
            values = torch.linalg.svdvals(sketches[name][parity])
            known = torch.linalg.svdvals(whole)
            assert known.max() > 0
            torch.testing.assert_close(values, known[..., : values.shape[-1]], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_get_rank_and_the_adapter_loads_with_stock_peft(tmp_path, family):
    trainer = make_trainer(make_experts(family), tmp_path, max_steps=2)
    settings = SelectionConfig(method="gradient", num_samples=9, ratio=0.8, budget=0.7, min_rank=1)
    (scaling, lora_r), *others = {(m.scaling["default"], m.r["default"]) for m in Run.of(trainer).lora_modules.values()}
    assert not others
    plan = prepare_trainer(trainer, LayerselConfig(selection=settings, scaling_exponent=0.5))
    run = Run.of(trainer)
    for name, module in run.lora_modules.items():
        assert module.scaling["default"] == pytest.approx(scaling * (lora_r / plan.ranks[name]) ** 0.5)
    assert set(run.lora_modules) == set(plan.modules)
    assert any(name.endswith("experts") for name in plan.modules)
    assert {name: module.r["default"] for name, module in run.lora_modules.items()} == plan.ranks
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert trained == plan.budget.spent <= plan.budget.allowed
    trainer.train()
    trainer.save_model()
    reloaded = PeftModel.from_pretrained(make_base(family), tmp_path)
    assert set(find_lora_modules(reloaded.get_base_model())) == set(plan.modules)
    expected = compute(trainer.model)
    torch.testing.assert_close(compute(reloaded), expected, atol=0, rtol=0)
    assert not torch.equal(compute(make_base(family)), expected)
    torch.testing.assert_close(compute(reloaded.merge_and_unload()), expected, atol=1e-5, rtol=1e-4)

    again = make_trainer(make_experts(family), tmp_path / "again", max_steps=2)
    reused = SelectionConfig(method="gradient", plan=str(tmp_path / "layersel" / "plan.json"))
    assert prepare_trainer(again, LayerselConfig(selection=reused)).ranks == plan.ranks
    again.train()
    torch.testing.assert_close(compute(again.model), expected, atol=0, rtol=0)


@pytest.mark.parametrize("method", ["gradient", "explicit"])
def test_names_of_experts_from_before_they_were_parameters_are_theirs(tmp_path, method):
    # PEFT makes target_parameters of them, with twice the rank where two became one.
    model = make_experts("Mixtral", ["q_proj", "w1", "w2", "w3"], target_parameters=None)
    trainer = make_trainer(model, tmp_path, max_steps=1)
    chosen = {"gradient": {"num_samples": 7}, "explicit": {"layers": [0, 2]}}[method]
    plan = prepare_trainer(trainer, LayerselConfig(selection=SelectionConfig(method=method, **chosen)))
    ranks = {name: module.r["default"] for name, module in Run.of(trainer).lora_modules.items()}
    if method == "gradient":
        assert ranks == plan.ranks
    else:
        assert set(ranks.values()) == {2, 4}
    trainer.train()
    trainer.save_model()
    reloaded = PeftModel.from_pretrained(make_base("Mixtral"), tmp_path)
    assert set(find_lora_modules(reloaded.get_base_model())) == set(plan.modules) == set(ranks)
    torch.testing.assert_close(compute(reloaded), compute(trainer.model), atol=0, rtol=0)


@pytest.mark.parametrize("unselected", ["remove", "freeze"])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], []])
def test_layers_lose_the_lora_of_their_experts_or_it_is_frozen(tmp_path, unselected, targets):
    trainer = make_trainer(make_experts("Qwen3Moe", targets), tmp_path, max_steps=1)
    settings = SelectionConfig(method="explicit", layers=[1], unselected=unselected)
    prepare_trainer(trainer, LayerselConfig(selection=settings))
    base, lora = trainer.model.get_base_model(), Run.of(trainer).lora_modules
    kept = {name for name, module in lora.items() if all(p.requires_grad for p in module.lora_B.parameters())}
    assert {name.split(".")[2] for name in kept} == {"1"}
    assert {EXPERTS.format(1), f"{EXPERTS.format(1)}.base_layer"} <= kept
    bare = type(base.get_submodule(EXPERTS.format(0))).__name__
    assert bare == {"remove": "Qwen3MoeExperts", "freeze": "ParamWrapper"}[unselected]
    trainer.train()
    trainer.save_model()
    reloaded = PeftModel.from_pretrained(make_base("Qwen3Moe"), tmp_path)
    assert set(find_lora_modules(reloaded.get_base_model())) == set(lora)
    torch.testing.assert_close(compute(reloaded), compute(trainer.model), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("method", "granularity"),
    [(name, kind) for name in ("cka", "cosine", "relative", "fisher", "random") for kind in get_method(name).units],
)
def test_every_method_chooses_among_experts_at_its_granularities(tmp_path, method, granularity):
    trainer = make_trainer(make_experts("Mixtral"), tmp_path)
    samples = {} if method == "random" else {"num_samples": 7}
    settings = SelectionConfig(method=method, granularity=granularity, ratio=0.6, **samples)
    plan = prepare_trainer(trainer, LayerselConfig(selection=settings))
    assert set(Run.of(trainer).lora_modules) == set(plan.modules)
    for name in plan.modules:  # what PEFT nests stays together
        assert not name.endswith(".experts") or f"{name}.base_layer" in plan.modules
    assert read_plan(tmp_path / "layersel" / "plan.json", "test").modules == plan.modules


def test_the_first_weights_of_experts_depend_on_the_seed_and_their_names_alone(tmp_path):
    def draw(r: int, parameters: list[str]) -> dict[str, torch.Tensor]:
        model = make_experts("Mixtral", r=r, target_parameters=parameters)
        prepare_trainer(
            make_trainer(model, tmp_path), LayerselConfig(selection=SelectionConfig(method="first", ratio=1.0))
        )
        return {
            find_key(name, module): module.lora_A["default"].weight.detach().unflatten(0, (-1, r))
            for name, module in find_lora_modules(model.get_base_model()).items()
            if hasattr(module, "num_experts")
        }

    few, many = draw(2, PARAMETERS[:1]), draw(3, PARAMETERS)
    assert len(few) == 3 and len(many) == 6
    for key, rows in few.items():
        torch.testing.assert_close(many[key][:, :2], rows, atol=0, rtol=0)
        assert not torch.equal(rows[0], rows[1])


def test_experts_that_something_else_computes_are_not_scored_as_if_they_gained_nothing(tmp_path):
    model = make_experts("Mixtral")
    wrapper = model.get_base_model().get_submodule(EXPERTS.format(1))
    wrapper.forward = wrapper.get_base_layer().forward  # as kernels for experts do
    settings = LayerselConfig(selection=SelectionConfig(method="gradient", num_samples=7))
    with pytest.raises(LayerselError, match="something else than PEFT computes LoRA on experts here"):
        prepare_trainer(make_trainer(model, tmp_path), settings)


def test_a_misspelt_parameter_is_named_with_those_that_there_are(tmp_path):
    model = make_experts("Mixtral", target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_pro"])
    with pytest.raises(LayerselError, match=r"'mlp\.experts\.down_pro' .* mlp\.experts\.down_proj, mlp\.experts\.gate"):
        prepare_trainer(
            make_trainer(model, tmp_path), LayerselConfig(selection=SelectionConfig(method="last", ratio=0.5))
        )


def test_an_adapter_on_experts_is_laid_out_for_no_other_program(tmp_path):
    trainer = make_trainer(make_experts("Mixtral"), tmp_path)
    prepare_trainer(trainer, LayerselConfig(selection=SelectionConfig(method="last", ratio=0.5)))
    trainer.save_model()
    with pytest.raises(LayerselError, match=r"its LoRA is on expert parameters \(model\.layers\.2\.mlp\.experts"):
        read_adapter(tmp_path)


# --- Axolotl's engines ------------------------------------------------------------------------------------------------
