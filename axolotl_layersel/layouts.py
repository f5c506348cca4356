"""Plain PEFT adapters whose modules have different ranks: fold, drop, pad and describe them. No engine, no model."""

import copy
import dataclasses
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from axolotl_layersel import verification
from axolotl_layersel.errors import LayerselError
from axolotl_layersel.files import flush, read_json, refuse, writing
from axolotl_layersel.tensors import load_tensors, save_tensors

LAYOUTS = ("ragged", "uniform")
WAY_OUT = "Give the folder of a LoRA adapter."
MOST_ALPHA = 1e9
PREFIX = "base_model.model."
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
# vLLM allocates for one of these; its --max-lora-rank accepts no other number.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Factors:
    """The two matrices of one LoRA module: ``down`` is A, (rank, inputs); ``up`` is B, (outputs, rank)."""

    down: torch.Tensor
    up: torch.Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[0]


def fold(factors: Factors, scaling: float, gates: torch.Tensor | None = None) -> Factors:
    """Return factors that need no scaling and no gates: B becomes B·diag(gates)·scaling, in its own dtype.

    The product is computed in fp32. ``gates``: (rank,), or None where there are none.
    """
    factor = scaling if gates is None else gates.to(torch.float32) * scaling
    return Factors(factors.down, (factors.up.float() * factor).to(factors.up.dtype))


def find_used(factors: Factors) -> torch.Tensor:
    """Return which components are more than padding, (rank,), bool: a row of A or a column of B that is not zero."""
    return factors.down.ne(0).any(dim=1) | factors.up.ne(0).any(dim=0)


def drop_unused(factors: Factors) -> Factors:
    """Return the factors without padding, but with one component at least: PEFT knows no rank 0."""
    used = find_used(factors)
    used[0] |= ~used.any()
    return Factors(factors.down[used].contiguous(), factors.up[:, used].contiguous())


def pad(factors: Factors, rank: int) -> Factors:
    """Return the factors with zeros up to ``rank``."""
    missing = rank - factors.rank
    down = torch.nn.functional.pad(factors.down, (0, 0, 0, missing))
    return Factors(down.contiguous(), torch.nn.functional.pad(factors.up, (0, missing)).contiguous())


def split(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, Factors], dict[str, torch.Tensor]]:
    """Return the LoRA factors in an adapter file's tensors, by module name in the base model, and all the rest."""
    modules = [name.removeprefix(PREFIX).removesuffix(DOWN) for name in tensors if name.endswith(DOWN)]
    factors = {module: Factors(*(tensors[f"{PREFIX}{module}{part}"] for part in (DOWN, UP))) for module in modules}
    rest = {name: value for name, value in tensors.items() if not name.endswith((DOWN, UP))}
    return factors, rest


def join(factors: Mapping[str, Factors]) -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter file that hold the factors of modules, by name in the base model."""
    parts = {name: {DOWN: pair.down, UP: pair.up} for name, pair in factors.items()}
    return {f"{PREFIX}{name}{part}": value for name, pair in parts.items() for part, value in pair.items()}


def lay_out(
    factors: dict[str, Factors],
    rest: dict[str, torch.Tensor],
    config: LoraConfig,
    layout: str,
    fixed: Mapping[str, int] | None = None,
) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """Return the tensors and the configuration of a plain adapter, from factors with scaling and gates folded in.

    ``ragged``: every module has its own rank, named in ``rank_pattern`` and, with the same number, in
    ``alpha_pattern``. ``uniform``: all are padded with zeros to the highest rank. In both, ``lora_alpha`` is
    ``r``, so that the scaling is 1 for every reader: of the patterns, of the top level, or of the tensors' own rank.

    ``fixed``: the ranks of LoRA on parameters, whose tensors, with a scaling of 1 too, are in ``rest``, by the name
    that PEFT's patterns have for each.
    """
    factors = {module: drop_unused(pair) for module, pair in factors.items()}
    ranks = {**{module: pair.rank for module, pair in factors.items()}, **(fixed or {})}
    highest = max(ranks.values())
    padded = {"ragged": None, "uniform": highest}[layout]
    if padded is not None:
        factors = {module: pad(pair, padded) for module, pair in factors.items()}
    tensors = {**rest, **join(factors)}
    config = copy.copy(config)
    config.r = config.lora_alpha = highest
    config.use_rslora = False
    config.rank_pattern = write_pattern(ranks) if padded is None else {}
    config.alpha_pattern = dict(config.rank_pattern)
    return tensors, config


def write_pattern(values: Mapping[str, float]) -> dict[str, float]:
    """Return a ``rank_pattern`` or ``alpha_pattern`` that gives each module, by its full name, its value.

    It has one pattern for each distinct value, not for each module: PEFT matches every module against every pattern,
    and Python keeps 512 compiled ones; past that each match is compiled anew. PEFT also takes a name as the end of a
    longer one, so a name that another one ends in is tied to the beginning.
    """
    ends = {end for name in values for end in list_ends(name)}
    names: dict[float, list[str]] = {}
    for name in sorted(values):
        names.setdefault(values[name], []).append(f"{'^' if name in ends else ''}{re.escape(name)}")
    return {"|".join(names[value]): value for value in sorted(names)}


def read_pattern(patterns: dict[str, float], modules: Iterable[str]) -> dict[str, float]:
    """Return the values that PEFT reads from a ``rank_pattern`` or ``alpha_pattern``, of the modules that it names."""
    compiled = [(re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in patterns.items()]
    found = {name: next((value for pattern, value in compiled if pattern.match(name)), None) for name in modules}
    return {name: value for name, value in found.items() if value is not None}


def list_ends(name: str) -> list[str]:
    """Return what a module's name ends in after each of its dots: ``a.b.c`` ends in ``b.c`` and ``c``."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(1, len(parts))]


# Looks at the tensors and the configuration of an adapter that was written, before it takes its place.
Check = Callable[[dict[str, torch.Tensor], LoraConfig], None]


def write_adapter(
    folder: str | Path, tensors: dict[str, torch.Tensor], config: LoraConfig, check: Check | None = None
) -> None:
    """Write an adapter to ``folder``. The same adapter always gives the same bytes.

    Each of its two files appears there at once and complete, once both have been read back and found to be right.

    Raises:
        LayerselError: if they cannot be written, or are not right, naming the file; those that were there stay.
    """
    folder = Path(folder)
    config = copy.copy(config)
    config.inference_mode = True
    sort_sets(config)
    size = sum(tensor.nbytes for tensor in tensors.values())
    with writing(folder / SAFETENSORS_WEIGHTS_NAME, size):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".layersel-") as place:
            temporary = Path(place)
            save_tensors(tensors, temporary / SAFETENSORS_WEIGHTS_NAME)
            config.save_pretrained(str(temporary))
            for file in (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME):
                flush(temporary / file)
            stored = verification.check_files(temporary, folder, tensors, config)
            if check:
                check(stored, verification.read_config(temporary, folder))
            for file in (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME):
                os.replace(temporary / file, folder / file)


def sort_sets(config: LoraConfig) -> None:
    """Make ordered lists of the sets in ``config``: PEFT writes a set in an order that changes from run to run."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, set):
            setattr(config, field.name, sorted(value))


def read_adapter(folder: str | Path) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """Return the tensors and the configuration of the LoRA adapter in ``folder``.

    Raises:
        LayerselError: if there is none, or one of another kind.
    """
    folder = Path(folder)
    # Unlike Path.is_file, this raises for no name, however long.
    missing = [name for name in (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME) if not os.path.isfile(folder / name)]
    if missing:
        raise LayerselError(f"{folder} holds no {missing[0]}. Give the folder of a LoRA adapter.")
    config = read_config(folder / CONFIG_NAME)
    tensors, _ = load_tensors("ADAPTER", folder / SAFETENSORS_WEIGHTS_NAME, WAY_OUT)
    if not isinstance(config, LoraConfig):
        raise LayerselError(f"{folder} holds a {config.peft_type} adapter. Give the folder of a LoRA adapter.")
    if config.target_parameters:
        raise LayerselError(
            f"{folder}: its LoRA is on expert parameters ({config.target_parameters[0]}), which programs other than "
            "PEFT do not read in other layouts. Give an adapter without target_parameters."
        )
    if config.use_dora:
        raise LayerselError(f"{folder}: use_dora: true. A DoRA adapter cannot be laid out anew. Give a LoRA adapter.")
    foreign = [name for name in tensors if name.endswith((DOWN, UP)) and not name.startswith(PREFIX)]
    if foreign:
        raise LayerselError(
            f"ADAPTER: {folder} has a tensor {min(foreign)}, and those of PEFT begin with {PREFIX} "
            f"({len(foreign)} such tensors), without which PEFT would load none of it. Rename them, or give an adapter "
            "that PEFT has saved."
        )
    other = [name for name in tensors if ".lora_" in name and not name.endswith((DOWN, UP))]
    if other:
        raise LayerselError(f"{folder}: {min(other)} is not of a linear LoRA module, the only kind that is supported.")
    return tensors, config


def read_config(path: Path) -> PeftConfig:
    """Return an adapter's configuration.

    Raises:
        LayerselError: if PEFT cannot read it, or it says of ranks and scaling what no adapter can have.
    """
    read_json("ADAPTER", path, WAY_OUT)
    # PEFT raises whatever its own code and that of the configuration's class come upon.
    try:
        config = PeftConfig.from_pretrained(str(path.parent))
    except Exception as error:
        raise refuse("ADAPTER", path, f"cannot be read by PEFT ({type(error).__name__}: {error})", WAY_OUT) from error
    fault = find_config_fault(config) if isinstance(config, LoraConfig) else None
    if fault:
        raise refuse("ADAPTER", path, f"is damaged ({fault})", WAY_OUT)
    return config


def find_config_fault(config: LoraConfig) -> str | None:
    """Return what a configuration says of ranks and scaling that no adapter can have, None where nothing is wrong."""
    read: Any = config  # its fields are what the file says, of any type
    ranks, alphas = read.rank_pattern or {}, read.alpha_pattern or {}
    if not isinstance(ranks, dict) or not isinstance(alphas, dict):
        return "a pattern is no mapping"
    for pattern in (*ranks, *alphas):
        try:
            re.compile(pattern)
        except re.error as error:
            return f"the pattern {pattern!r} is no regular expression: {error}"
    sets = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    mixed = [name for name, value in sets.items() if isinstance(value, set) and not all(map(is_text, value))]
    if mixed:
        return f"{mixed[0]} holds other than names"
    for rank in (read.r, *ranks.values()):
        if type(rank) is not int or rank < 1:
            return f"{rank!r} is no rank"
    for alpha in (read.lora_alpha, *alphas.values()):
        if type(alpha) not in (int, float) or abs(alpha) > MOST_ALPHA:
            return f"{alpha!r} is no lora_alpha"
    if type(read.use_rslora) is not bool or type(read.use_dora) is not bool:
        return "use_rslora or use_dora is neither true nor false"
    return None


def is_text(value: object) -> bool:
    """Return whether ``value`` is text."""
    return isinstance(value, str)


def find_factor_fault(config: LoraConfig, factors: dict[str, Factors]) -> str | None:
    """Return why PEFT could not load these matrices under ``config``, None where it can."""
    ranks = read_pattern(config.rank_pattern or {}, factors)
    for name, pair in factors.items():
        rank = ranks.get(name, config.r)
        if pair.down.dim() != 2 or pair.up.dim() != 2 or (pair.down.shape[0], pair.up.shape[1]) != (rank, rank):
            shapes = f"{tuple(pair.down.shape)} and {tuple(pair.up.shape)}"
            return f"the matrices of {name} have the shapes {shapes}, and its rank is {rank}"
        if not (pair.down.is_floating_point() and pair.up.is_floating_point()):
            return f"the matrices of {name} are no floating-point numbers"
    return None


def export_adapter(folder: str | Path, layout: str, output: str | Path) -> int:
    """Write the adapter in ``folder`` to ``output`` in one of the two layouts, and return its highest rank.

    Raises:
        LayerselError: if ``folder`` holds no LoRA adapter of linear modules.
    """
    tensors, config = read_adapter(folder)
    halves = {name.removesuffix(DOWN).removesuffix(UP) for name in tensors if name.endswith((DOWN, UP))}
    lacking = next((name for name in sorted(halves) if not {f"{name}{DOWN}", f"{name}{UP}"} <= tensors.keys()), None)
    if lacking:
        raise LayerselError(f"ADAPTER: {folder} is damaged (of {lacking} it holds one matrix of two). {WAY_OUT}")
    factors, rest = split(tensors)
    if not factors:
        raise LayerselError(f"ADAPTER: {folder} holds no LoRA matrices. {WAY_OUT}")
    fault = find_factor_fault(config, factors)
    if fault:
        raise LayerselError(f"ADAPTER: {folder} is damaged ({fault}). {WAY_OUT}")
    scalings = find_scalings(config, factors)
    folded = {module: fold(pair, scalings[module]) for module, pair in factors.items()}
    tensors, config = lay_out(folded, rest, config, layout)
    write_adapter(output, tensors, config)
    return config.r


def find_scalings(config: LoraConfig, modules: Iterable[str]) -> dict[str, float]:
    """Return the scaling that PEFT gives each of ``modules``."""
    modules = list(modules)
    ranks, alphas = (read_pattern(pattern or {}, modules) for pattern in (config.rank_pattern, config.alpha_pattern))
    scalings = {}
    for name in modules:
        rank, alpha = ranks.get(name, config.r), alphas.get(name, config.lora_alpha)
        scalings[name] = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    return scalings


def find_vllm_rank(rank: int) -> int | None:
    """Return the ``max_lora_rank`` that vLLM needs for adapters of ``rank``, None where none is enough."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)
