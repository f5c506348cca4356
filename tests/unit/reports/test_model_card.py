"""The section of a model card: what it says, and that it leaves the card of other libraries alone."""

import inspect
import logging

import pytest
import yaml
from axolotl import train as axolotl_train
from helpers.experts import make_experts
from helpers.models import make_lora, make_small_llama, make_trainer
from helpers.writing import MOVING
from huggingface_hub import ModelCard
from transformers import Trainer

from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.config.selection import SelectionConfig
from axolotl_layersel.l1ra.records import RankHistory
from axolotl_layersel.lora.readers import AdapterFile, read_adapter_file
from axolotl_layersel.reports.model_card import BEGIN, END, Recipe, complete_card, describe_layers, find_hub_name
from axolotl_layersel.reports.outcome import Outcome
from axolotl_layersel.training import saving
from axolotl_layersel.training.prepare import prepare_trainer

CHOSEN = LayerselConfig(selection=SelectionConfig(method="relative", ratio=0.5, num_samples=12))
HEADING = "## Layer selection"


def prepare(folder, block=CHOSEN, **settings):
    """Return a prepared trainer, and its plan."""
    model = make_lora(make_small_llama(), task_type="CAUSAL_LM", **settings)
    trainer = make_trainer(model, folder, max_steps=12, save_strategy="no")
    return trainer, prepare_trainer(trainer, block)


def read(folder) -> str:
    return (folder / "README.md").read_text()


def split(card: str) -> tuple[str, str]:
    """Return a card without its section, and the section."""
    before, begin, rest = card.partition(BEGIN)
    section, end, after = rest.partition(END)
    assert begin and end and not after.strip(), card
    return before, section


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A prepared trainer that has saved its adapter, and its plan."""
    folder = tmp_path_factory.mktemp("card")
    trainer, plan = prepare(folder)
    trainer.save_model()
    return trainer, plan, folder


def test_the_card_says_what_was_chosen_by_what_and_how_to_make_it_again(saved):
    trainer, plan, folder = saved
    _, section = split(read(folder))
    chosen = ", ".join(map(str, plan.selected))
    for fact in (
        f"by method `relative` from 12 rows, whose tokens have the hash `{plan.dataset_fingerprint}`",
        f"- Method relative keeps 3 of 6 layers ({chosen}); the others are without an adapter.",
        "- Rank 4 in every module.",
        "- 2,304 of plain LoRA's 4,608 parameters train.",
        "PEFT, vLLM and llama.cpp read the adapter as it is.",
        "vllm serve BASE_MODEL --enable-lora --max-lora-rank 8 --lora-modules NAME=ADAPTER",
    ):
        assert fact in section, section
    assert all(f"{name} {version}" in section for name, version in plan.versions.items())
    again = yaml.safe_load(section.partition("```yaml\n")[2].partition("```")[0])
    assert again["seed"] == trainer.args.seed == plan.seed
    assert again["plugins"] == ["axolotl_layersel.LayerSelectionPlugin"]
    assert LayerselConfig.model_validate(again["layersel"]) == CHOSEN
    assert str(folder) not in section, "the card is pushed to the hub"


def test_the_card_of_peft_is_as_it_would_be_without_the_section(saved, tmp_path):
    trainer, _, folder = saved
    trainer.model.create_or_update_model_card(str(tmp_path))
    before, section = split(read(folder))
    assert before.rstrip("\n") == read(tmp_path).rstrip("\n")
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict() == ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert card.data.library_name == "peft" and "lora" in card.data.tags
    assert section.count(HEADING) == 1


def test_the_section_is_written_once_and_survives_the_card_of_the_end_and_of_a_push(saved):
    trainer, _, folder = saved
    _, section = split(read(folder))
    (folder / "README.md").write_text(read(folder).replace("# Model Card", "# My words\n\n# Model Card"))
    trainer.save_model()
    assert split(read(folder))[1] == section and "# My words" in read(folder)
    first = read(folder)
    trainer.save_model()
    assert read(folder) == first
    # As Axolotl ends a run, and a push begins.
    for _ in range(2):
        trainer.create_model_card(model_name="run", dataset_tags=["some/data"])
        before, again = split(read(folder))
        assert again == section
        assert "# My words" not in before and "This model card has been generated automatically" in before
        data = ModelCard.load(folder / "README.md").data
        assert data.library_name == "peft" and data.datasets == ["some/data"]
    trainer.model.save_pretrained(str(folder / "alone"))
    assert split(read(folder / "alone"))[1] == section


def test_cards_are_written_by_the_methods_that_are_relied_on_before_anything_is_pushed():
    push, end = inspect.getsource(Trainer.push_to_hub), inspect.getsource(axolotl_train.create_model_card)
    assert 0 < push.index("self.save_model(") < push.index("self.create_model_card(") < push.index("upload_folder(")
    assert "trainer.create_model_card(" in end and "trainer.push_to_hub()" in end


@pytest.mark.trains
def test_moved_ranks_are_a_table_and_each_checkpoint_has_its_own(tmp_path):
    trainer, plan = prepare(tmp_path, MOVING)
    assert plan is None
    trainer.save_adapter(tmp_path / "checkpoint-1")
    _, section = split(read(tmp_path / "checkpoint-1"))
    assert "moved rank between LoRA modules while this adapter trained" in section
    assert "- Rank 4 in every module after l1ra." in section and "| layer |" not in section
    trainer.train()
    trainer.save_adapter(tmp_path / "checkpoint-12")
    _, section = split(read(tmp_path / "checkpoint-12"))
    (rows,) = [part for part in section.split("\n\n") if part.startswith("| layer |")]
    assert rows.splitlines()[0] == "| layer | q_proj | v_proj | down_proj |"
    assert len(rows.splitlines()) == 2 + 6
    assert "axolotl-layersel export ADAPTER --for llama.cpp" in section


def test_a_reused_plan_is_named_by_its_place_next_to_the_card(saved, tmp_path):
    _, plan, folder = saved
    path = str(folder / "layersel" / "plan.json")
    trainer, again = prepare(tmp_path, LayerselConfig(selection=SelectionConfig(method="relative", plan=path)))
    trainer.save_model()
    assert again.selected == plan.selected
    _, section = split(read(tmp_path))
    assert "plan: layersel/plan.json" in section and path not in section


def test_lora_on_experts_is_merged_by_the_method_that_knows_it(tmp_path):
    make_experts("Mixtral").save_pretrained(str(tmp_path))
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(3)]
    history = RankHistory({0: dict.fromkeys(names, 2)})
    section = describe_layers(Outcome(None, history, read_adapter_file(tmp_path)), Recipe({}, 1, {}))
    assert "axolotl merge-lora CONFIG.yml --lora-model-dir ADAPTER --merge-method legacy\n" in section
    assert "- Rank 2 in every linear module after l1ra." in section


def test_a_card_names_a_base_of_the_hub_and_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "base").mkdir(parents=True)
    bases = ["org/Base-1.5B", "models/base", str(tmp_path / "models"), "../base", "~/base", "a b/c", "", None]
    named = [find_hub_name(AdapterFile({"base_model_name_or_path": base}, {})) for base in bases]
    assert named == ["org/Base-1.5B"] + ["BASE_MODEL"] * 7


def test_text_after_the_section_stays_and_a_folder_without_a_card_gets_none(tmp_path):
    complete_card(tmp_path, f"{BEGIN}\nx\n{END}")
    assert list(tmp_path.iterdir()) == []
    card = f"---\na: 1\n---\nmine\n\n{BEGIN}\nold\n{END}\n\nof another\r\n"
    (tmp_path / "README.md").write_bytes(card.encode())
    complete_card(tmp_path, f"{BEGIN}\nnew\n{END}")
    expected = f"---\na: 1\n---\nmine\n\nof another\r\n\n{BEGIN}\nnew\n{END}\n"
    assert (tmp_path / "README.md").read_bytes() == expected.encode()


def test_a_card_that_cannot_be_completed_costs_a_warning_and_no_adapter(tmp_path, caplog):
    trainer, _ = prepare(tmp_path)
    trainer.save_model()
    adapter = tmp_path / "adapter_model.safetensors"
    saves = trainer.save_adapter.__self__
    assert isinstance(saves, saving.RunSaves)
    # Latin-1, which is not UTF-8.
    (tmp_path / "README.md").write_bytes("---\na: 1\n---\nä".encode("latin-1"))
    with caplog.at_level(logging.WARNING, logger="axolotl.layersel"):
        saves.complete_card(tmp_path, reads=True)
    (record,) = [record for record in caplog.records if "model card" in record.message]
    assert "lacks the section on layers" in record.message and adapter.exists()


def test_a_card_that_peft_cannot_read_costs_a_warning_and_no_adapter(tmp_path, caplog):
    trainer, _ = prepare(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\nmine")
    with caplog.at_level(logging.WARNING, logger="axolotl.layersel"):
        trainer.save_model()
    assert any("the model card in" in message and "cannot be written" in message for message in caplog.messages)
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert (tmp_path / "README.md").read_text().startswith("---\nlicense: [\n---\nmine")
