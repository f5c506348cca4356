"""Run vLLM on a CPU with the adapters in all layouts; ``make test-serving`` installs it apart from the environment."""

import json
from pathlib import Path

import pytest
import torch
from helpers import vllm
from helpers.served import BLOCKS, EXACT, IGNORED, Served, make_served

from axolotl_layersel.lora.export import export_adapter
from axolotl_layersel.lora.layouts import LAYOUTS
from axolotl_layersel.lora.readers import READERS, read_adapter_file

AS_WRITTEN = "as written"
DORA = "dora"


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Served:
    return make_served(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def places(served) -> dict[str, Path]:
    """The folders of the adapters as training wrote them and in all layouts, and one that vLLM does not read."""
    found = {}
    for name, folder in served.adapters.items():
        found[f"{name}, {AS_WRITTEN}"] = folder
        for layout in LAYOUTS:
            found[f"{name}, {layout}"] = folder.with_name(f"{name}-{layout}")
            export_adapter(folder, layout, found[f"{name}, {layout}"])
    dora = served.base.with_name(DORA)
    export_adapter(served.adapters["half"], "uniform", dora)
    config = json.loads((dora / "adapter_config.json").read_text())
    (dora / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    return {**found, DORA: dora}


@pytest.fixture(scope="module")
def answer(served, places) -> dict:
    """What vLLM computes, by adapter."""
    return vllm.read(served, places)


def measure(rows: list[list[float]], expected: torch.Tensor) -> float:
    return float((torch.tensor(rows) - expected).abs().max())


def test_vllm_computes_with_the_base_what_transformers_computes(served, answer):
    assert measure(answer["base"], served.plain) < EXACT


@pytest.mark.parametrize("layout", [AS_WRITTEN, *LAYOUTS])
@pytest.mark.parametrize("name", BLOCKS)
def test_vllm_computes_what_peft_computes(served, places, answer, name, layout):
    key = f"{name}, {layout}"
    assert READERS["vllm"].find_fault(read_adapter_file(places[key])) is None
    assert measure(answer[key], served.expected[name]) < EXACT
    assert measure(answer[key], served.plain) > IGNORED


def test_vllm_refuses_what_is_told_to_be_beyond_it(places, answer):
    assert "vLLM does not yet support DoRA" in answer[DORA]
    limit = READERS["vllm"].find_limit(read_adapter_file(places[DORA]))
    assert limit == "DoRA's magnitudes, which vLLM 0.32 or later does not read"
