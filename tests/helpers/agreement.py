"""Processes that are started with different settings, rows or weights."""

import json
import sys
import time
from pathlib import Path

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.engines import collectives, find_engine
from axolotl_layersel.training import process_agreement
from axolotl_layersel.training.prepare import prepare_trainer
from helpers.models import make_lora, make_rows, make_small_llama, make_trainer


def prepare(
    folder: Path, rows: list[dict], moved: float = 0, moved_below: float = 0, layers: int = 6, **arguments
) -> None:
    """Prepare a trainer that continues an adapter, with one LoRA weight and one base weight changed."""
    model = make_lora(make_small_llama(layers))
    projection = model.base_model.model.model.layers[2].self_attn.q_proj
    projection.lora_B["default"].weight.data[0, 0] += moved
    projection.base_layer.weight.data[0, 0] += moved_below
    trainer = make_trainer(model, folder, rows, **arguments)
    assert find_engine(trainer).name == "ddp"
    block = LayerselConfig(selection={"method": "last", "unselected": "freeze"})
    prepare_trainer(trainer, block, continues_adapter=True)


def run_process(rank: int, folder: str) -> None:
    """Differ from the other process in one thing after another, and write the error message for each."""
    import torch
    from accelerate import PartialState

    PartialState(cpu=True)
    rows, said = make_rows(), {}
    torch.manual_seed(1)  # for the adapter that PEFT makes
    differences = {
        "nothing": {},
        "an argument": {"learning_rate": 0.5},
        "rows": {"rows": [*rows[1:], rows[0]]},
        "the number of rows": {"rows": rows[:-1]},
        "a weight": {"moved": 0.1},
        "a base weight": {"moved_below": 0.1},
        "fewer layers": {"layers": 5},
        "more layers": {"layers": 7},
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
