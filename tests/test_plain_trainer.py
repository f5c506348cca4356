"""The public function on a plain Trainer: the README's example and the example script, and what importing loads."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, ROOT, make_lora, make_small_llama, make_trainer
from peft import PeftModel
from ranks import OPTIMIZER_STATES, launch_ranks
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, BertTokenizer

import axolotl_layersel
from axolotl_layersel import FlexoraConfig, L1RAConfig, LayerselConfig, LayerselError, SelectionConfig, prepare_trainer
from axolotl_layersel.common.paths import plan_path
from axolotl_layersel.common.versions import find_version
from axolotl_layersel.l1ra.records import RankHistory
from axolotl_layersel.lora.modules import find_lora_modules
from axolotl_layersel.selection.plan_file import read_plan

WORDS = ["a", "bad", "good", "film", "play", "story", "with", "fine", "actors"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """A folder with a random BERT of 4 layers and its tokenizer, and files in the format of GLUE's SST-2."""
    folder = tmp_path_factory.mktemp("glue")
    model = folder / "google-bert" / "bert-base-uncased"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(model)
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 4}
    config = BertConfig(vocab_size=len(vocabulary), initializer_range=0.1, **size)
    BertForSequenceClassification(config).save_pretrained(model)
    rows = [(f"a {WORDS[1 + i % 2]} {WORDS[3 + i % 3]}{' with fine actors' * (i % 5 < 2)}", i % 2) for i in range(24)]
    text = "sentence\tlabel\n" + "".join(f"{sentence}\t{label}\n" for sentence, label in rows)
    (folder / "train.tsv").write_text(text)
    (folder / "dev.tsv").write_text(text)
    return folder


def check_adapter(folder: Path, model: Path, chosen: int) -> None:
    """Check that stock PEFT rebuilds the adapter, in ``chosen`` of the layers, and its classifier."""
    plan = json.loads((folder / "layersel" / "plan.json").read_text())
    selected = [choice["layer"] for choice in plan["layers"] if choice["selected"]]
    assert len(selected) == chosen
    base = AutoModelForSequenceClassification.from_pretrained(model)
    new = base.classifier.weight.clone()
    rebuilt = PeftModel.from_pretrained(base, folder)
    layers = {int(name.split(".")[3]) for name in find_lora_modules(base) if ".layer." in name}
    assert layers == set(selected)
    assert not torch.equal(rebuilt.get_base_model().classifier.modules_to_save["default"].weight, new)


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


@pytest.mark.launches
def test_the_example_of_the_readme_runs_where_there_is_no_axolotl(bert, tmp_path):
    section = (ROOT / "README.md").read_text().split("\n## Without Axolotl\n")[1].split("\n## ")[0]
    (example,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    for name in ("google-bert", "train.tsv"):
        (tmp_path / name).symlink_to(bert / name)
    code = (
        "import sys, time; sys.modules['axolotl'] = None; start = time.perf_counter(); import axolotl_layersel;"
        "print('seconds', time.perf_counter() - start, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{example}"],
        cwd=tmp_path,
        env={**ENVIRONMENT, "HF_HOME": str(tmp_path / "cache"), "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (seconds, torch_too), *_ = re.findall(r"^seconds (\S+) (\S+)$", done.stdout, flags=re.MULTILINE)
    assert float(seconds) < 1
    assert torch_too == "False"
    assert "method cka keeps 2 of 4 layers" in done.stdout
    check_adapter(tmp_path / "out", tmp_path / "google-bert" / "bert-base-uncased", 2)


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
    with pytest.raises(LayerselError, match=rf"^resume_from: {given!r} is no path. Give the folder of a checkpoint"):
        prepare_trainer(trainer, LayerselConfig(selection=SelectionConfig(method="last")), resume_from=given)


@pytest.mark.parametrize("engine", OPTIMIZER_STATES)
def test_a_plain_trainer_searches_and_resumes_on_engines_and_all_ranks_miss_what_one_lacks(engine, zygote, tmp_path):
    base = make_small_llama(layers=4)
    folder = launch_ranks(zygote, "ranks:train_and_resume", engine, tmp_path, base)
    assert len({choice.score for choice in read_plan(plan_path(folder / "searched")).layers}) == 4
    whole, resumed = (RankHistory.read(folder / place).ranks for place in ("whole", "resumed"))
    assert whole == resumed and len({tuple(ranks.values()) for ranks in whole.values()}) > 1
    one, other = (load_file(folder / place / "adapter_model.safetensors") for place in ("whole", "resumed"))
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=1e-6, rtol=0)
    refusals = {(folder / f"refusal-{rank}").read_text() for rank in (0, 1)}
    (refusal,) = refusals
    checkpoint = folder / "whole" / "checkpoint-2"
    assert refusal.startswith(f"resume_from_checkpoint: {checkpoint} cannot be resumed from: ")
    assert " is missing" in refusal
