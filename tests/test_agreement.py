"""Ranks that were not started alike: every one ends with the sentence that names rank and key, and none hangs."""

import json
import sys
import time
from pathlib import Path

import pytest
from conftest import l1ra, make_lora, make_rows, make_small_llama, make_trainer, selection
from safetensors.torch import load_file, save_file

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.root import LayerselBlock
from axolotl_layersel.engines import collectives, find_engine
from axolotl_layersel.training import process_agreement
from axolotl_layersel.training.prepare import prepare_trainer

MODEL_LOADS = "Loading weights"
SECONDS = 120  # an agreed run takes less, on a busy machine too
UP = "base_model.model.model.layers.2.self_attn.q_proj.lora_B.weight"
STARTED = {
    "ddp": (selection(ratio=0.5), selection(ratio=0.25), "layersel.selection.ratio: 0.25 on rank 1, 0.5 on rank 0."),
    "zero1": (selection("random"), selection("cka"), "layersel.selection.method: 'cka' on rank 1, 'random' on rank 0."),
    "zero2": (
        l1ra(update_ratio=0.2),
        l1ra(update_ratio=0.25),
        "layersel.l1ra.update_ratio: 0.25 on rank 1, 0.2 on rank 0.",
    ),
    "zero3": (selection("last"), l1ra(), "layersel.selection: None on rank 1, {'method': 'last', 'ratio': None"),
    "fsdp2-full": ({"seed": 7}, {"seed": 8}, "seed: 8 on rank 1, 7 on rank 0."),
    "fsdp2-sharded": ({"learning_rate": 0.005}, {"learning_rate": 0.01}, "learning_rate: 0.01 on rank 1, 0.005 on"),
}


@pytest.mark.parametrize("engine", STARTED)
def test_ranks_with_other_settings_end_before_the_model_loads(train, engine):
    settings, elsewhere, message = STARTED[engine]
    run = train(engine, expect=1, elsewhere=elsewhere, timeout=SECONDS, **settings)
    assert run.log.count(f"LayerselError: {message}") == 2, run.log[-3000:]
    assert MODEL_LOADS not in run.log


def test_a_rank_with_another_engine_ends_all(train):
    run = train("zero2", expect=1, elsewhere={"deepspeed": None}, timeout=SECONDS)
    assert run.log.count("LayerselError: deepspeed: None on rank 1, {'zero_optimization'") == 2, run.log[-3000:]


def test_a_rank_with_other_rows_ends_all(train, data, tmp_path):
    lines = data.read_text().splitlines()
    path = tmp_path / "train.jsonl"
    path.write_text("".join(f"{line}\n" for line in [*lines[1:], lines[0]]))
    other = {"datasets": [{"path": str(path), "type": "alpaca", "ds_type": "json"}]}
    run = train("ddp", expect=1, elsewhere=other, timeout=SECONDS)
    assert run.log.count("LayerselError: datasets.hash of some rows: '") == 2, run.log[-3000:]
    assert "Starting trainer" not in run.log


@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp2-sharded"])
def test_a_rank_with_another_adapter_ends_all(train, plain_runs, engine, tmp_path):
    trained = plain_runs["single"].folder
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / file).write_bytes((trained / file).read_bytes())
    weights = load_file(tmp_path / "adapter_model.safetensors")
    weights[UP][0, 0] += 0.1
    save_file(weights, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {"lora_model_dir": str(trained), **selection("last", unselected="freeze")}
    run = train(engine, expect=1, elsewhere={"lora_model_dir": str(tmp_path)}, timeout=SECONDS, **settings)
    assert run.engine["engine"] == engine.partition("-")[0]
    assert run.log.count(f"LayerselError: initial LoRA weights.{UP}: '") == 2, run.log[-3000:]


# --- Without Axolotl, two processes -------------------------------------------------------------------------------


def prepare(folder: Path, rows: list[dict], moved: float = 0, moved_below: float = 0, **arguments) -> None:
    """Prepare a trainer whose adapter is continued; a weight of it is ``moved``, and one of its base."""
    model = make_lora(make_small_llama())
    projection = model.base_model.model.model.layers[2].self_attn.q_proj
    projection.lora_B["default"].weight.data[0, 0] += moved
    projection.base_layer.weight.data[0, 0] += moved_below
    trainer = make_trainer(model, folder, rows, **arguments)
    assert find_engine(trainer).name == "ddp"
    block = LayerselBlock(selection={"method": "last", "unselected": "freeze"})
    prepare_trainer(trainer, block, continues_adapter=True)


def be_a_rank(rank: int, folder: str) -> None:
    """Differ from the other rank in one thing after another, and write what is said of each."""
    import torch
    from accelerate import PartialState

    PartialState(cpu=True)
    rows, said = make_rows(), {}
    torch.manual_seed(1)  # of the adapter that PEFT makes
    differences = {
        "nothing": {},
        "an argument": {"learning_rate": 0.5},
        "rows": {"rows": [*rows[1:], rows[0]]},
        "the number of rows": {"rows": rows[:-1]},
        "a weight": {"moved": 0.1},
        "a base weight": {"moved_below": 0.1},
    }
    for name, difference in differences.items():
        torch.manual_seed(1)
        try:
            prepare(Path(folder), **{"rows": rows, **(difference if rank else {})})
            said[name] = None
        except LayerselError as error:
            said[name] = str(error)
    if rank:
        other = Path(folder) / "packages" / "peft-9.9.dist-info"
        other.mkdir(parents=True)
        (other / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 9.9\n")
        sys.path.insert(0, str(other.parent))
    try:
        process_agreement.check_started_alike({"seed": 1})
    except LayerselError as error:
        said["a package"] = str(error)
    process_agreement.PATIENCE = 3
    if rank == 0:
        started = time.monotonic()
        assert collectives.find_absent_ranks("elsewhere", 1) == [1]
        assert time.monotonic() - started < 10
        (Path(folder) / "waited").touch()
    while not (Path(folder) / "waited").exists():
        time.sleep(0.1)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(said))
    collectives.leave(0)


def test_trainers_that_were_prepared_differently_are_refused_by_rank_and_key(zygote, tmp_path):
    arguments = [{"rank": rank, "folder": str(tmp_path)} for rank in range(2)]
    codes = zygote.run("test_agreement:be_a_rank", arguments, 2, tmp_path / "log", {}, timeout=SECONDS)
    assert codes == [0, 0], (tmp_path / "log.0").read_text()[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["nothing"] is None
    assert first["an argument"].startswith(
        "learning_rate: 0.5 on rank 1, 0.01 on rank 0. Start all ranks from the same"
    )
    assert first["rows"].startswith("datasets.hash of some rows: '")
    assert first["the number of rows"].startswith("datasets.number of rows: 23 on rank 1, 24 on rank 0. Give all nodes")
    assert first["a weight"].startswith(f"initial LoRA weights.{UP}: '")
    assert first["a base weight"].startswith(f"base weights.{UP.replace('.lora_B', '')}: '")
    assert first["a base weight"].endswith("Scores would mix two models: give all nodes the same base model.")
    assert (
        first["a package"]
        == "version of peft: '9.9' on rank 1, '0.20.0' on rank 0. Install the same versions on all nodes."
    )


def test_the_first_difference_is_found_however_deep_it_lies():
    ours = {"layersel": {"selection": {"method": "cka", "seed": None}, "l1ra": None}, "seed": 1}
    assert process_agreement.find_difference(ours, json.loads(json.dumps(ours))) is None
    theirs = {"layersel": {"selection": {"method": "cka", "seed": 3}, "l1ra": None}, "seed": 1}
    assert process_agreement.find_difference(ours, theirs) == ("layersel.selection.seed", None, 3)
    assert process_agreement.find_difference(ours, {**ours, "extra": 1}) == ("extra", None, 1)


def test_a_dataset_is_described_alike_whatever_form_it_gives_its_rows(tmp_path):
    from datasets import Dataset

    rows = make_rows()
    dataset = Dataset.from_list(rows)
    described = process_agreement.describe_rows(dataset, seed=3)
    assert described["number of rows"] == len(rows)
    assert process_agreement.describe_rows(dataset.with_format("torch"), seed=3) == described
    assert process_agreement.describe_rows(Dataset.from_list(rows[::-1]), seed=3) != described
    assert process_agreement.describe_rows(dataset.to_iterable_dataset(), seed=3) is None
    assert process_agreement.describe_rows({"a": rows}, seed=3) == {"a": {"number of rows": len(rows)}}
