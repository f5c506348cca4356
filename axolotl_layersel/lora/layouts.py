"""Lay out, write and read plain PEFT adapters whose modules have different ranks; no engine, no model."""

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
from axolotl_layersel.lora.factors import Factors, fold, pad
from axolotl_layersel.lora.names import DOWN, PREFIX, UP, WAY_OUT
from axolotl_layersel.lora.patterns import write_pattern

MOST_ALPHA = 1e9
# The name of a module before, at and after the number of its layer.
LAYER = re.compile(r"(.*?\.)(\d+)(\..*)")


def join(factors: Mapping[str, Factors]) -> dict[str, torch.Tensor]:
    """Return the adapter file's tensors of the factors of modules, which are named as in the base model."""
    parts = ((name, part) for name, pair in factors.items() for part in ((DOWN, pair.down), (UP, pair.up)))
    return {f"{PREFIX}{name}{end}": value for name, (end, value) in parts}


def lay_out(
    factors: dict[str, Factors],
    rest: dict[str, torch.Tensor],
    config: LoraConfig,
    layout: str,
    fixed: Mapping[str, int] | None = None,
    layer_count: int | None = None,
    rank: int | None = None,
) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """Return the tensors and the configuration of a plain adapter, from factors with folded scaling and gates.

    PEFT computes the same from each layout of ``LAYOUTS``, and ``use_rslora`` is off in all of them.

    * ``ragged``: each module has its own rank, in ``rank_pattern`` and, with the same number, in ``alpha_pattern``.
      ``lora_alpha`` equals ``r``. Programs that follow the patterns, or take both from the top level, scale by 1. Those
      that divide ``lora_alpha`` by the rank of a module's tensors scale by r over that rank, which is wrong.
    * ``const``: each module has its own rank, all have one alpha, r, and B is multiplied by the module's rank over r.
      Programs that divide ``lora_alpha`` by the rank of a module's tensors are right, those that divide it by r wrong.
    * ``uniform``: all modules are padded to the highest rank. Every program scales by 1.
    * ``full``: as ``uniform``, and every type of module is in every layer, with zeros where the adapter has none.

    Args:
        factors: factors of the linear modules, by module, without unused components.
        rest: all other tensors of the file, among them folded factors of LoRA on parameters.
        config: the configuration to adapt; it is copied.
        layout: one of ``LAYOUTS``.
        fixed: the ranks of LoRA on parameters, by their names in PEFT's patterns.
        layer_count: the number of layers of the base model, for ``full``.
        rank: the rank to pad to; default: the highest one.

    Raises:
        LayerselError: if modules of ``full`` cannot be added.
    """
    fixed = dict(fixed or {})
    ranks = {**{module: pair.rank for module, pair in factors.items()}, **fixed}
    highest = max(ranks.values())
    config = copy.copy(config)
    config.use_rslora = False
    if layout == "full":
        assert layer_count is not None, "the layout full needs the number of layers"
        factors = add_modules(factors, layer_count)
        config.target_modules = sorted({name.rpartition(".")[2] for name in factors})
        config.layers_to_transform = config.layers_pattern = None
    if LAYOUTS[layout].is_padded:
        highest = rank or highest
        factors = {module: pad(pair, highest) for module, pair in factors.items()}
        ranks = fixed
    elif not LAYOUTS[layout].has_alphas:
        factors = {module: fold(pair, pair.rank / highest) for module, pair in factors.items()}
    config.r = config.lora_alpha = highest
    config.rank_pattern = write_pattern(ranks)
    config.alpha_pattern = write_pattern(ranks if LAYOUTS[layout].has_alphas else fixed)
    return {**rest, **join(factors)}, config


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a layout does to the modules of an adapter, see ``lay_out``.

    Attributes:
        is_padded: whether all modules have one rank.
        has_alphas: whether modules of different ranks have alphas of their own.
    """

    is_padded: bool
    has_alphas: bool


# From the smallest file to the largest one.
LAYOUTS = {
    "ragged": Layout(is_padded=False, has_alphas=True),
    "const": Layout(is_padded=False, has_alphas=False),
    "uniform": Layout(is_padded=True, has_alphas=False),
    "full": Layout(is_padded=True, has_alphas=False),
}


def add_modules(factors: Mapping[str, Factors], layer_count: int) -> dict[str, Factors]:
    """Return the factors with one component of zeros for each module that some layer has and another one lacks.

    Raises:
        LayerselError: if modules are not in numbered layers, or the size of one that is added cannot be known.
    """
    kinds: dict[tuple[str, str], dict[int, Factors]] = {}
    for name, pair in factors.items():
        found = LAYER.fullmatch(name)
        if not found or int(found[2]) >= layer_count:
            raise LayerselError(
                f"ADAPTER: {name} has LoRA and is not in one of the {layer_count} layers of the base model, so the "
                "layout full cannot be made. Choose another layout, or give the right --base-model."
            )
        kinds.setdefault((found[1], found[3]), {})[int(found[2])] = pair
    completed = dict(factors)
    for (start, end), pairs in kinds.items():
        missing = set(range(layer_count)).difference(pairs)
        sizes = {(pair.down.shape[1], pair.up.shape[0]) for pair in pairs.values()}
        if missing and len(sizes) > 1:
            raise LayerselError(
                f"ADAPTER: {end} has different sizes in different layers, so that of layer {min(missing)} is not known "
                "and the layout full cannot be made. Choose another layout."
            )
        model = next(iter(pairs.values()))
        for number in missing:
            zeros = Factors(torch.zeros_like(model.down[:1]), torch.zeros_like(model.up[:, :1]))
            completed[f"{start}{number}{end}"] = zeros
    return completed


# Checks the tensors and the configuration that were read back, before the files are moved into place.
Check = Callable[[dict[str, torch.Tensor], LoraConfig], None]


def write_adapter(
    folder: str | Path, tensors: dict[str, torch.Tensor], config: LoraConfig, check: Check | None = None
) -> None:
    """Write an adapter to ``folder``; the same adapter always gives the same bytes.

    Both files are read back and checked in a temporary folder, and then moved into place atomically.

    Raises:
        LayerselError: naming the file, if it cannot be written or fails the check. Earlier files stay.
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
    """Replace the sets in ``config`` by sorted lists: PEFT writes a set in an order that changes from run to run."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, set):
            setattr(config, field.name, sorted(value))


def read_adapter(folder: str | Path) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """Return the tensors and the configuration of the LoRA adapter in ``folder``.

    Raises:
        LayerselError: if it holds no such adapter, or one of another kind.
    """
    folder = Path(folder)
    # Unlike Path.is_file, os.path.isfile does not raise for an overlong name.
    missing = [name for name in (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME) if not os.path.isfile(folder / name)]
    if missing:
        raise LayerselError(f"{folder} holds no {missing[0]}. Give the folder of a LoRA adapter.")
    config = read_config(folder / CONFIG_NAME)
    tensors, _ = load_tensors("ADAPTER", folder / SAFETENSORS_WEIGHTS_NAME, WAY_OUT)
    if not isinstance(config, LoraConfig):
        raise LayerselError(f"{folder} holds a {config.peft_type} adapter. Give the folder of a LoRA adapter.")
    if config.target_parameters:
        raise LayerselError(
            f"{folder}: its LoRA is on expert parameters ({config.target_parameters[0]}), which only PEFT reads. "
            "Give an adapter without target_parameters."
        )
    if config.use_dora:
        raise LayerselError(f"{folder}: use_dora: true. A DoRA adapter cannot be laid out anew. Give a LoRA adapter.")
    foreign = [name for name in tensors if name.endswith((DOWN, UP)) and not name.startswith(PREFIX)]
    if foreign:
        raise LayerselError(
            f"ADAPTER: {folder} has a tensor {min(foreign)} ({len(foreign)} such tensors). PEFT loads only tensors "
            f"whose names begin with {PREFIX}. Rename them, or give an adapter that PEFT has saved."
        )
    other = [name for name in tensors if ".lora_" in name and not name.endswith((DOWN, UP))]
    if other:
        raise LayerselError(f"{folder}: {min(other)} is not of a linear LoRA module. Only those are supported.")
    return tensors, config


def read_config(path: Path) -> PeftConfig:
    """Return an adapter's configuration.

    Raises:
        LayerselError: if PEFT cannot read it, or its ranks or scalings are impossible.
    """
    read_json("ADAPTER", path, WAY_OUT)
    # PEFT lets through any exception of the configuration's class.
    try:
        config = PeftConfig.from_pretrained(str(path.parent))
    except Exception as error:
        raise refuse("ADAPTER", path, f"cannot be read by PEFT ({type(error).__name__}: {error})", WAY_OUT) from error
    fault = find_config_fault(config) if isinstance(config, LoraConfig) else None
    if fault:
        raise refuse("ADAPTER", path, f"is damaged ({fault})", WAY_OUT)
    return config


def find_config_fault(config: LoraConfig) -> str | None:
    """Return which rank, scaling or pattern of a configuration is impossible, None if none is."""
    read: Any = config  # its fields are as in the file, of any type
    ranks, alphas = read.rank_pattern or {}, read.alpha_pattern or {}
    if not isinstance(ranks, dict) or not isinstance(alphas, dict):
        return "a pattern is not a mapping"
    for pattern in (*ranks, *alphas):
        try:
            re.compile(pattern)
        except re.error as error:
            return f"the pattern {pattern!r} is not a regular expression: {error}"
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    sets = {name: value for name, value in values.items() if isinstance(value, set)}
    mixed = [name for name, value in sets.items() if not all(isinstance(entry, str) for entry in value)]
    if mixed:
        return f"{mixed[0]} contains something other than names"
    for rank in (read.r, *ranks.values()):
        if type(rank) is not int or rank < 1:
            return f"{rank!r} is not a rank"
    for alpha in (read.lora_alpha, *alphas.values()):
        if type(alpha) not in (int, float) or abs(alpha) > MOST_ALPHA:
            return f"{alpha!r} is not a lora_alpha"
    if type(read.use_rslora) is not bool or type(read.use_dora) is not bool:
        return "use_rslora or use_dora is neither true nor false"
    return None
