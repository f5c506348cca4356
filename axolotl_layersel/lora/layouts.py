"""Plain PEFT adapters whose modules have different ranks: fold, drop, pad and describe them. No engine, no model."""

import copy
import dataclasses
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.files import flush, read_json, refuse, writing
from axolotl_layersel.common.tensors import load_tensors, save_tensors
from axolotl_layersel.lora import verification
from axolotl_layersel.lora.factors import DOWN, PREFIX, UP, Factors, drop_unused, pad
from axolotl_layersel.lora.patterns import write_pattern

WAY_OUT = "Give the folder of a LoRA adapter."
MOST_ALPHA = 1e9


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
