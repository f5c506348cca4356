"""Whole runs of Axolotl on every engine: selection, training and saving."""

import shutil
from pathlib import Path

import pytest
from helpers.checkpoints import find_fault
from helpers.launched import MadeOnce, Run, difference, load_with_stock_peft
from helpers.places import ENGINES
from helpers.settings import BEST_IS_FIRST, selection
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from axolotl_layersel import engines
from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.reports.closing import describe_run
from axolotl_layersel.reports.model_card import BEGIN, END

ON_EVERY_ENGINE = True  # see tests/conftest.py
SETTINGS = BEST_IS_FIRST
NOT_RESUMED_FROM = {
    "README.md",
    "shards.safetensors",  # of probe.py
    "tokenizer.json",
    "tokenizer_config.json",
    "training_args.bin",
    "zero_to_fp32.py",
}
# The variables in which accelerate, and Axolotl before it, pass a process its engine.
VARIABLES = {
    "single": {},
    "ddp": {},
    "zero": {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "{stage}",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": "{folder}/deepspeed.json",
    },
    "fsdp2-full": {"ACCELERATE_USE_FSDP": "true", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"},
    "fsdp2-sharded": {"ACCELERATE_USE_FSDP": "true", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
}


@pytest.fixture(scope="module")
def whole_runs(train) -> dict[str, Run]:
    """An uninterrupted run on each engine."""
    return MadeOnce(lambda engine: train(engine, **SETTINGS))


@pytest.mark.parametrize("engine", ENGINES)
def test_the_engine_that_was_asked_for_runs(whole_runs, engine):
    record = whole_runs[engine].engine
    kinds = {"single": "NO", "ddp": "MULTI_CPU", "zero": "DEEPSPEED", "fsdp": "FSDP"}
    assert record["engine"] == engine.split("-")[0]
    assert record["distributed_type"] == next(kind for name, kind in kinds.items() if engine.startswith(name))
    assert record["processes"] == (1 if engine == "single" else 2)


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_every_engine_scores_and_chooses_as_one_process_does(whole_runs, engine):
    alone, together = whole_runs["single"].plan, whole_runs[engine].plan
    assert together["calibration_rows"] == alone["calibration_rows"]
    assert len(alone["calibration_rows"]) == 15
    assert together["modules"] == alone["modules"]
    for one, two in zip(alone["layers"], together["layers"], strict=True):
        assert two["selected"] == one["selected"]
        assert two["score"] == pytest.approx(one["score"], abs=1e-5)


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_every_engine_starts_from_the_same_lora_weights(whole_runs, engine):
    alone = load_file(whole_runs["single"].folder / "weights_at_0.safetensors")
    together = load_file(whole_runs[engine].folder / "weights_at_0.safetensors")
    assert difference(alone, together) == 0
    assert any(float(value.abs().max()) > 0 for value in alone.values())


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_every_engine_trains_as_one_process_does(whole_runs, engine):
    alone, together = whole_runs["single"], whole_runs[engine]
    # Adam divides by the root of the squared gradient: if a gradient is near zero, the order of a sum
    # changes the weight by a share of the learning rate, 5e-3 a step. Seen: 7e-6 after six steps.
    assert together.losses() == pytest.approx(alone.losses(), abs=2e-5)
    assert difference(alone.adapter("checkpoint-6"), together.adapter("checkpoint-6")) <= 5e-5


@pytest.mark.parametrize("engine", ENGINES)
def test_the_adapter_holds_the_selected_layers_alone(whole_runs, engine):
    run = whole_runs[engine]
    assert len(run.selected) == 4
    layers = {int(name.split(".layers.")[1].split(".")[0]) for name in run.adapter()}
    assert layers == set(run.selected)
    assert run.target() == (["down_proj", "q_proj", "v_proj"], run.selected, ["layers"])
    assert len(run.adapter()) == 2 * len(run.plan["modules"])


@pytest.mark.parametrize("engine", ENGINES)
def test_the_engines_optimizer_holds_the_selected_layers_alone(whole_runs, engine):
    run = whole_runs[engine]
    assert run.engine["optimized"] == sum(value.numel() for value in run.adapter().values())


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_counts_the_parameters_that_train_and_ends_with_what_the_run_has_come_to(whole_runs, engine):
    run = whole_runs[engine]
    trained = sum(value.numel() for value in run.adapter().values())
    assert run.plan["parameters"] == {"plain": 2 * trained, "trained": trained}
    closing = describe_run(run.folder, run.folder.with_name("config.yml"))
    assert run.log.count("\n".join(closing)) == 1
    # The log of process 0 comes first. Its streams are one file.
    assert engine != "single" or run.log.splitlines()[-len(closing) :] == closing


@pytest.mark.parametrize("engine", ENGINES)
def test_the_cards_of_checkpoints_and_of_the_end_say_once_what_was_chosen(whole_runs, engine):
    run, sections = whole_runs[engine], {}
    for place in ("checkpoint-2", "checkpoint-6", "."):
        card = ModelCard.load(run.folder / place / "README.md")
        before, begin, section = card.text.partition(BEGIN)
        assert begin and END in section and card.text.count("## Layer selection") == 1
        assert card.data.library_name == "peft" and "lora" in card.data.tags
        sections[place] = section.partition(END)[0]
        assert (place == ".") == ("See axolotl config" in before), "Axolotl writes the card of the end anew"
    assert len(set(sections.values())) == 1
    assert run.plan["dataset_fingerprint"] in sections["."] and "method: cka" in sections["."]


@pytest.mark.parametrize("engine", ENGINES)
def test_every_checkpoint_holds_an_adapter_and_the_plan(whole_runs, engine):
    run = whole_runs[engine]
    for checkpoint in ("checkpoint-2", "checkpoint-4", "checkpoint-6"):
        assert run.adapter(checkpoint).keys() == run.adapter().keys()
        assert run.target(checkpoint) == run.target()
        assert (run.folder / checkpoint / "layersel" / "plan.json").read_text() == (
            run.folder / "layersel" / "plan.json"
        ).read_text()


@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp2-full"])
def test_one_process_alone_writes_what_is_the_same_on_all(whole_runs, engine):
    writers = whole_runs[engine].folder.glob("tokenizer_written_by_*")
    assert [path.name for path in writers] == ["tokenizer_written_by_0"]


@pytest.mark.parametrize("engine", ENGINES)
def test_every_run_says_once_that_it_reads_its_adapters_back(whole_runs, engine):
    run = whole_runs[engine]
    said = "its modules compute what the model's compute"
    assert run.log.count(f"the adapter in {run.folder}/checkpoint-2 was read back, and {said}") == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_a_checkpoint_of_each_engine_is_complete_until_any_file_that_it_reads_is_gone_or_cut(
    whole_runs, engine, tmp_path, monkeypatch
):
    """A new file in a checkpoint that is neither read nor known to be unused also fails here."""
    for name, value in VARIABLES[engine.rstrip("0123456789")].items():
        monkeypatch.setenv(name, value.format(stage=engine[-1], folder=tmp_path))
    (tmp_path / "deepspeed.json").write_text("{}")
    world = 1 if engine == "single" else 2
    checkpoint = tmp_path / "checkpoint-4"
    shutil.copytree(whole_runs[engine].folder / checkpoint.name, checkpoint)
    settings = LayerselConfig.model_validate(selection()["layersel"])

    def find_faults() -> list[str | None]:
        return [find_fault(checkpoint, settings, rank, world) for rank in range(world)]

    assert find_faults() == [None] * world
    files = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    for name in sorted(files - NOT_RESUMED_FROM):
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).unlink()
        # Axolotl counts tokens again if its file is missing.
        assert any(find_faults()) == (name != "tokens_state.json"), name
        # Not in the middle, which may be the boundary between two archives in a file of shards.
        (checkpoint / name).write_bytes(b"" if Path(name).suffix == "" else content[: len(content) // 3])
        assert any(fault is not None and fault.startswith(name) for fault in find_faults()), name
        (checkpoint / name).write_bytes(content)
    assert find_faults() == [None] * world


@pytest.mark.parametrize("engine", ENGINES)
def test_the_best_model_is_what_is_saved_at_the_end(whole_runs, engine):
    run = whole_runs[engine]
    assert difference(run.adapter(), run.adapter("checkpoint-2")) == 0
    assert difference(run.adapter(), run.adapter("checkpoint-6")) > 1e-4


def test_stock_peft_computes_what_the_trained_model_computes(whole_runs, base_model, tmp_path):
    folders = {engine: whole_runs[engine].folder for engine in ENGINES}
    stock = load_with_stock_peft(base_model, list(folders.values()), tmp_path)
    for engine, folder in folders.items():
        trained = load_file(folder / "logits.safetensors")["logits"]
        assert float((stock[str(folder)] - trained).abs().max()) <= 1e-5, engine


def test_the_first_stage_of_deepspeed_runs_by_the_class_of_the_second(train, whole_runs):
    run = train("zero1", **SETTINGS)
    assert (run.engine["engine"], run.engine["processes"]) == ("zero1", 2)
    assert engines.ENGINES["zero1"] == engines.ENGINES["zero2"]
    assert run.selected == whole_runs["zero2"].selected
    assert difference(run.adapter(), whole_runs["zero2"].adapter()) <= 1e-6
