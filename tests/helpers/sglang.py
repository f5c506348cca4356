"""SGLang's own code that loads an adapter, without the server, which needs a GPU.

``make test-serving`` installs the package without its dependencies. The four modules that read an adapter run as they
are. The others, which they import for servers, kernels and processes, are empty here. What is left of the server is
three attributes of the memory pool and the layout of its buffers, seen in SGLang 0.5.23, srt/lora/mem_pool.py.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from helpers.places import ROOT

PLACE = ROOT / "build" / "sglang"
LORA = "sglang.srt.lora"
RUN = {*(f"{LORA}.{name}" for name in ("lora", "lora_config", "utils", "mem_pool")), "sglang.srt.layers.utils.common"}
# Sizes of a small model, and the modules that SGLang stacks: their input size, and the output sizes of their parts.
WIDTH, KEYS, INNER, LAYER_COUNT, MAX_RANK = 8, 4, 12, 3, 16
STACKS: dict[str, tuple[int, dict[str, int]]] = {
    "self_attn.qkv_proj": (WIDTH, {"self_attn.q_proj": WIDTH, "self_attn.k_proj": KEYS, "self_attn.v_proj": KEYS}),
    "self_attn.o_proj": (WIDTH, {"self_attn.o_proj": WIDTH}),
    "mlp.gate_up_proj": (WIDTH, {"mlp.gate_proj": INNER, "mlp.up_proj": INNER}),
    "mlp.down_proj": (INNER, {"mlp.down_proj": WIDTH}),
}
SHAPES = {part: (given, size) for given, parts in STACKS.values() for part, size in parts.items()}
STALE = 7.0  # what an earlier adapter has left in the buffers


class Empty(types.ModuleType):
    """A module whose classes are empty, and whose functions and settings are false."""

    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {}) if name[0].isupper() else Setting()


class Setting:
    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *args: object, **kwargs: object) -> bool:
        return False


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of ``RUN`` in the package, and empty ones in place of its others."""

    def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != "sglang":
            return None
        if name in RUN:
            return importlib.util.spec_from_file_location(name, PLACE / f"{name.replace('.', '/')}.py")
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def load_code() -> dict[str, Any]:
    """Return the modules that read an adapter, by the ends of their names."""
    assert PLACE.is_dir(), f"{PLACE} is missing. Run `make test-serving`."
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())
        common = importlib.import_module("sglang.srt.layers.utils.common")
        importlib.import_module("sglang.srt.layers.utils").get_layer_id = common.get_layer_id
    return {name.rpartition(".")[2]: importlib.import_module(name) for name in RUN}


class Module:
    """A module on one GPU, which keeps all of its weights."""

    def slice_lora_a_weights(self, weight: torch.Tensor) -> torch.Tensor:
        return weight

    slice_lora_b_weights = slice_lora_a_weights


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Return the change of each weight in all layers that SGLang would compute with an adapter.

    Raises:
        Exception: what SGLang raises where it refuses the adapter.
    """
    code = load_code()
    config = code["lora_config"].LoRAConfig(str(folder))
    targets = code["utils"].get_normalized_target_modules(config.target_modules)
    base = types.SimpleNamespace(num_hidden_layers=LAYER_COUNT, architectures=["LlamaForCausalLM"], model_type="llama")
    adapter = code["lora"].LoRAAdapter("adapter", config, base, None, None)
    adapter.initialize_weights_from_tensors(load_file(folder / "adapter_model.safetensors"))
    stacks = {stack: stack.rpartition(".")[2] for stack in STACKS if stack.rpartition(".")[2] in targets}
    pool = make_pool(code["mem_pool"].LoRAMemoryPool, stacks, targets)
    modules = [{f"model.layers.{layer}.{stack}": Module() for stack in stacks} for layer in range(LAYER_COUNT)]
    pool.load_lora_weight_to_buffer("adapter", 0, adapter, modules, None, None)
    updates = {}
    for stack, kind in stacks.items():
        for layer in range(LAYER_COUNT):
            down, up = pool.A_buffer[kind][layer][0], pool.B_buffer[kind][layer][0, :, : config.r]
            halves = zip(down.split(config.r), up.split(list(STACKS[stack][1].values())))
            for part, (one, other) in zip(STACKS[stack][1], halves):
                updates[f"model.layers.{layer}.{part}"] = other @ one * adapter.scaling
    return updates


def make_pool(kind: type, stacks: dict[str, str], targets: set[str]) -> Any:
    """Return SGLang's memory pool for the modules of ``stacks``, with buffers of one adapter."""
    pool = object.__new__(kind)
    pool.__dict__ |= {
        "target_modules": targets,
        "num_layer": LAYER_COUNT,
        "max_lora_rank": MAX_RANK,
        "lora_added_tokens_size": 0,
        "tp_rank": 0,
        "base_model": None,
        "strict_loading": False,
        "experts_shared_outer_loras": False,
        "_get_maybe_cached_weight_for_transfer": lambda pinned, key, weight: weight,
        "A_buffer": {},
        "B_buffer": {},
        "embedding_A_buffer": {},
        "embedding_B_buffer": {},
        "lm_head_A_buffer": {},
        "lm_head_B_buffer": {},
        "new_embeddings_buffer": {},
    }
    for stack, name in stacks.items():
        given, parts = STACKS[stack]
        for buffer, shape in (
            (pool.A_buffer, (1, len(parts) * MAX_RANK, given)),
            (pool.B_buffer, (1, sum(parts.values()), MAX_RANK)),
        ):
            buffer[name] = [torch.full(shape, STALE) for _ in range(LAYER_COUNT)]
    return pool
