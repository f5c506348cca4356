"""The public function on a plain Trainer: the manual's example and the example script, and what importing loads."""

import importlib.util
from pathlib import Path

import pytest
import torch
from helpers.models import make_lora, make_small_llama, make_trainer
from helpers.places import ROOT
from helpers.plain_trainer import check_adapter, make_bert
from peft import PeftModel

import axolotl_layersel
from axolotl_layersel import FlexoraConfig, L1RAConfig, LayerselConfig, LayerselError, SelectionConfig, prepare_trainer
from axolotl_layersel.common.versions import find_version


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return make_bert(tmp_path_factory.mktemp("glue"))


@pytest.mark.trains
def test_the_example_script_trains_on_files_of_glue(bert, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("bert_glue", ROOT / "example_configs" / "bert_glue.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    model = bert / "google-bert" / "bert-base-uncased"
    files = ["--model", str(model), "--train", str(bert / "train.tsv"), "--dev", str(bert / "dev.tsv")]
    short = ["--num-samples", "12", "--batch-size", "4", "--epochs", "12", "--learning-rate", "0.005"]
    metrics = script.main([*files, *short, "--output", str(tmp_path)])
    assert metrics["eval_accuracy"] == 1.0, "a word says the class of a row, and these rows were trained on"
    assert "method cka keeps 2 of 4 layers" in capsys.readouterr().out
    check_adapter(tmp_path, model, 2)


def test_the_public_names_are_those_of_the_package():
    assert sorted(axolotl_layersel.__all__) == axolotl_layersel.__all__ == sorted(axolotl_layersel.SOURCES)
    for name in axolotl_layersel.__all__:
        assert getattr(axolotl_layersel, name).__module__.startswith("axolotl_layersel.")
        assert name in dir(axolotl_layersel)
    with pytest.raises(AttributeError, match="has no attribute 'prepare'"):
        _ = axolotl_layersel.__getattr__("prepare")


def test_the_plugin_prepares_a_trainer_by_the_public_function():
    from axolotl_layersel.training import prepare

    assert prepare_trainer is prepare.prepare_trainer
    assert (
        "from axolotl_layersel.training.prepare import prepare_trainer"
        in (ROOT / "axolotl_layersel/plugin.py").read_text()
    )


def test_settings_are_given_in_parts_or_as_a_yaml_file_holds_them():
    parts = LayerselConfig(
        selection=SelectionConfig(method="flexora", flexora=FlexoraConfig(steps=5)), l1ra=L1RAConfig(max_rank=12)
    )
    block = {"selection": {"method": "flexora", "flexora": {"steps": 5}}, "l1ra": {"max_rank": 12}}
    assert parts == LayerselConfig.model_validate(block)
    with pytest.raises(ValueError, match=r"layersel\.selection\.methd is not a setting: did you mean 'method'\?"):
        LayerselConfig.model_validate({"selection": {"methd": "cka"}})


def test_a_trainer_is_prepared_once(tmp_path):
    trainer = make_trainer(make_lora(make_small_llama()), tmp_path)
    config = LayerselConfig(selection=SelectionConfig(method="last"))
    prepare_trainer(trainer, config)
    with pytest.raises(LayerselError, match="prepare_trainer was called for it before"):
        prepare_trainer(trainer, config)


def test_a_model_without_lora_is_refused(tmp_path):
    trainer = make_trainer(make_small_llama(), tmp_path)
    with pytest.raises(LayerselError, match="the trainer's model is a LlamaForCausalLM, not a PEFT model with LoRA"):
        prepare_trainer(trainer, LayerselConfig(selection=SelectionConfig(method="last")))


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["embed_tokens"]])
def test_a_trained_adapter_is_not_drawn_anew(tmp_path, targets):
    def load():
        return PeftModel.from_pretrained(make_small_llama(), tmp_path / "trained", is_trainable=True)

    config = LayerselConfig(selection=SelectionConfig(method="last", unselected="freeze"))
    trained = make_lora(make_small_llama(), ["q_proj", *targets])
    first = trained.base_model.model.model.embed_tokens if "embed_tokens" in targets else None
    with torch.no_grad():
        if first is None:
            trained.base_model.model.model.layers[1].self_attn.v_proj.lora_B["default"].weight[0, 0] = 0.5
        else:
            first.lora_embedding_A["default"][0, 0] = 0.5
    trained.save_pretrained(tmp_path / "trained")
    name = "model.layers.1.self_attn.v_proj" if first is None else "model.embed_tokens"
    message = f"^continues_adapter: False draws the LoRA weights anew, and those of {name} are trained already. Give"
    model = load()
    before = {name: weight.clone() for name, weight in model.named_parameters() if "lora_" in name}
    with pytest.raises(LayerselError, match=message):
        prepare_trainer(make_trainer(model, tmp_path), config)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters() if name in before)
    prepare_trainer(make_trainer(model, tmp_path), config, continues_adapter=True)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters() if name in before)


def test_a_package_that_is_not_installed_has_no_version():
    assert find_version("axolotl-layersel-is-not-called-so") is None
    assert find_version("torch") == torch.__version__


@pytest.mark.trains
def test_a_checkpoint_without_the_optimizers_state_is_refused_before_anything_is_drawn(tmp_path):
    block = LayerselConfig(selection=SelectionConfig(method="last", ratio=0.5))
    trainer = make_trainer(make_lora(make_small_llama()), tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    prepare_trainer(trainer, block)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    (checkpoint / "optimizer.pt").unlink()
    again = make_trainer(make_lora(make_small_llama()), tmp_path / "again")
    message = rf"^resume_from_checkpoint: {checkpoint} cannot be resumed from: optimizer\.pt is missing"
    with pytest.raises(LayerselError, match=message):
        prepare_trainer(again, block, resume_from=str(checkpoint))


BLOCKED = {
    "layersel is a file": lambda folder: (folder / "layersel").write_text("mine"),
    "layersel cannot be made": lambda folder: (folder / "layersel").symlink_to(folder / "layersel"),
    "layersel/plan.json is a folder": lambda folder: (folder / "layersel" / "plan.json").mkdir(parents=True),
    "layersel/gates.csv is a folder": lambda folder: (folder / "layersel" / "gates.csv").mkdir(parents=True),
    "layersel/ranks.csv is a folder": lambda folder: (folder / "layersel" / "ranks.csv").mkdir(parents=True),
}


@pytest.mark.parametrize("case", BLOCKED)
def test_what_is_in_the_way_of_the_plan_is_named_before_anything_is_scored(case, tmp_path):
    model = make_lora(make_small_llama())
    trainer = make_trainer(model, tmp_path)
    BLOCKED[case](tmp_path)
    before = sorted(tmp_path.rglob("*"))
    passes = []
    model.get_base_model().model.layers[0].register_forward_pre_hook(lambda *inputs: passes.append(inputs))
    with pytest.raises(LayerselError, match=rf"^output_dir: {tmp_path}/{case}(, where a f\w+ is | \(Too many levels)"):
        prepare_trainer(trainer, LayerselConfig(selection=SelectionConfig(method="cka", num_samples=8)))
    assert not passes and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("given", [True, ""])
def test_what_is_no_path_is_not_resumed_from(given, tmp_path):
    trainer = make_trainer(make_lora(make_small_llama()), tmp_path)
    with pytest.raises(LayerselError, match=rf"^resume_from: {given!r} is not a path. Give the folder of a checkpoint"):
        prepare_trainer(trainer, LayerselConfig(selection=SelectionConfig(method="last")), resume_from=given)
