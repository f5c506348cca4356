"""Export an adapter in a layout that other programs read."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.lora import formats
from axolotl_layersel.lora.factors import Factors, drop_unused, fold, split
from axolotl_layersel.lora.layouts import LAYOUTS, lay_out, read_adapter, write_adapter
from axolotl_layersel.lora.names import DOWN, UP, WAY_OUT
from axolotl_layersel.lora.patterns import resolve
from axolotl_layersel.lora.readers import (
    BASE,
    GGUF,
    LIMITS,
    MODELFILE,
    AdapterFile,
    Reader,
    find_changed_base,
    read_adapter_file,
    round_for_kernels,
)

MERGE = "Merge the adapter into its base model with `axolotl merge-lora`, and serve the merged model"
GIVE_BASE = "Give its path or its name on the hub with --base-model."
GIVE_OTHER_BASE = "Give a folder with the config.json of a language model, or a name on the hub that can be reached."


@dataclass(frozen=True)
class Adapter:
    """An adapter to export, with its scaling folded in.

    Attributes:
        folder: its folder.
        factors: the factors of its linear modules, by module.
        rest: all other tensors of its file.
        config: its configuration.
    """

    folder: Path
    factors: dict[str, Factors]
    rest: dict[str, torch.Tensor]
    config: LoraConfig

    def lay_out(
        self, layout: str, layer_count: int | None, rank: int | None = None
    ) -> tuple[dict[str, torch.Tensor], LoraConfig]:
        """Return the tensors and the configuration in a layout, see ``layouts.lay_out``."""
        tensors, config = lay_out(self.factors, self.rest, self.config, layout, None, layer_count, rank)
        # A and B hold all of it, and some programs refuse the names of initialisations that they do not know.
        config.init_lora_weights = True
        if isinstance(config.target_modules, str):
            config.target_modules = sorted(self.factors)
        return tensors, config

    @property
    def highest(self) -> int:
        """The highest rank of a module."""
        return max(pair.rank for pair in self.factors.values())


@dataclass(frozen=True)
class Exported:
    """What an export has written.

    Attributes:
        layout: its layout.
        rank: the highest rank of a module.
        base: the path or name of the base model.
    """

    layout: str
    rank: int
    base: str


def find_factor_fault(factors: dict[str, Factors], ranks: dict[str, int]) -> str | None:
    """Return why PEFT could not load these matrices into modules of these ranks, None if it can."""
    for name, pair in factors.items():
        rank = ranks[name]
        if pair.down.dim() != 2 or pair.up.dim() != 2 or (pair.down.shape[0], pair.up.shape[1]) != (rank, rank):
            shapes = f"{tuple(pair.down.shape)} and {tuple(pair.up.shape)}"
            return f"the matrices of {name} have the shapes {shapes}, and its rank is {rank}"
        if not (pair.down.is_floating_point() and pair.up.is_floating_point()):
            return f"the matrices of {name} are not of a floating-point dtype"
    return None


def read_folded(folder: str | Path) -> Adapter:
    """Return the adapter in ``folder``, without unused components.

    Raises:
        LayerselError: if it does not hold a LoRA adapter of linear modules that adds to unchanged base weights.
    """
    tensors, config = read_adapter(folder)
    halves = {name.removesuffix(DOWN).removesuffix(UP) for name in tensors if name.endswith((DOWN, UP))}
    lacking = next((name for name in sorted(halves) if not {f"{name}{DOWN}", f"{name}{UP}"} <= tensors.keys()), None)
    if lacking:
        raise LayerselError(f"ADAPTER: {folder} is damaged ({lacking} lacks one of its two matrices). {WAY_OUT}")
    factors, rest = split(tensors)
    if not factors:
        raise LayerselError(f"ADAPTER: {folder} holds no LoRA matrices. {WAY_OUT}")
    resolved = resolve(config, factors)
    fault = find_factor_fault(factors, {module: rank for module, (rank, _) in resolved.items()})
    if fault:
        raise LayerselError(f"ADAPTER: {folder} is damaged ({fault}). {WAY_OUT}")
    changed = find_changed_base(AdapterFile({"init_lora_weights": config.init_lora_weights}, {}))
    if changed:
        raise LayerselError(
            f"ADAPTER: {folder} has {changed}, and PEFT changes them again only for the ranks as they are. {MERGE}."
        )
    folded = {module: drop_unused(fold(pair, resolved[module][1])) for module, pair in factors.items()}
    return Adapter(Path(folder), folded, rest, config)


def export_adapter(folder: str | Path, layout: str, output: str | Path, base_model: str | None = None) -> int:
    """Write the adapter in ``folder`` to ``output`` in one of ``LAYOUTS``, and return its highest rank.

    ``base_model``: the path or hub name of the base model, for ``full``; default: the one that the adapter names.

    Raises:
        LayerselError: if ``folder`` does not hold a LoRA adapter of linear modules, or ``full`` cannot be made.
    """
    adapter = read_folded(folder)
    layer_count = count_layers(adapter, base_model) if layout == "full" else None
    tensors, config = adapter.lay_out(layout, layer_count, find_full_rank(adapter, layout))
    write_adapter(output, tensors, config)
    return config.r


def find_full_rank(adapter: Adapter, layout: str, pads: bool = True) -> int | None:
    """Return the rank of the layout ``full``, None for another layout; ``pads``: it must be one that kernels have."""
    if layout != "full":
        return None
    return round_for_kernels(adapter.highest) if pads else adapter.highest


def export_for(folder: str | Path, reader: Reader, output: str | Path, base_model: str | None = None) -> Exported:
    """Write the adapter in ``folder`` to ``output`` as ``reader`` reads it: the smallest file that is right there.

    Args:
        folder: the folder of the adapter.
        reader: the program that will read it.
        output: the folder to write to.
        base_model: the path or hub name of the base model; default: the one that the adapter names.

    Raises:
        LayerselError: in one sentence, if no layout is right in that program.
    """
    folder, output = Path(folder), Path(output)
    if os.path.isdir(folder):  # read_folded says what is wrong with others
        file = read_adapter_file(folder)
        limit = reader.find_limit(file)
        if limit:
            raise LayerselError(f"ADAPTER: {folder} has {limit}. {MERGE}.")
        special = next((found for rule in LIMITS if (found := rule(file))), None)
        if special:
            raise LayerselError(f"ADAPTER: {folder} has {special}. {reader.title} reads it without an export.")
    adapter = read_folded(folder)
    base = base_model or adapter.config.base_model_name_or_path
    if reader.form == "gguf" and not base:
        raise LayerselError(f"ADAPTER: {folder} names no base model, which llama.cpp's converter reads. {GIVE_BASE}")
    layout, tensors, config = choose_layout(adapter, reader, base_model)
    if reader.form == "mlx":
        formats.write_mlx(output, tensors, config)
    else:
        write_adapter(output, tensors, config)
    return Exported(layout, config.r, base or BASE)


def convert_export(reader: Reader, output: Path, base: str) -> str | None:
    """Write the GGUF file of an export for ``reader`` if it reads one, and Ollama's file with it.

    Returns:
        The command that writes the GGUF file, if llama.cpp's converter was not found; otherwise None.

    Raises:
        LayerselError: if the converter fails.
    """
    if reader.form != "gguf":
        return None
    command = formats.write_gguf(output, base, output / GGUF)
    if reader.name == "ollama":
        formats.write_modelfile(output / MODELFILE, GGUF, base)
    return command


def choose_layout(
    adapter: Adapter, reader: Reader, base_model: str | None
) -> tuple[str, dict[str, torch.Tensor], LoraConfig]:
    """Return the first of ``LAYOUTS`` that is right in ``reader``, with its tensors and configuration.

    Raises:
        LayerselError: if none is, with what the program does with the last one.
    """
    fault, layer_count = None, None
    # On the meta device, because only shapes count.
    light = Adapter(
        adapter.folder,
        {name: Factors(pair.down.to("meta"), pair.up.to("meta")) for name, pair in adapter.factors.items()},
        {},
        adapter.config,
    )
    if reader.pads:
        layer_count = count_layers(adapter, base_model)
    for layout in LAYOUTS:
        if layout == "full" and layer_count is None:
            layer_count = count_layers(adapter, base_model)
        rank = find_full_rank(adapter, layout, reader.pads)
        tensors, config = light.lay_out(layout, layer_count, rank)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        fault = reader.find_fault(AdapterFile(config.to_dict(), shapes, layer_count))
        if fault is None:
            return layout, *adapter.lay_out(layout, layer_count, rank)
    raise LayerselError(f"ADAPTER: {adapter.folder} cannot be laid out for {reader.title}, which {fault}. {MERGE}.")


def count_layers(adapter: Adapter, base_model: str | None) -> int:
    """Return the number of layers of the base model, from its configuration.

    Raises:
        LayerselError: if it cannot be known.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    name = base_model or adapter.config.base_model_name_or_path
    key = "--base-model" if base_model else f"ADAPTER: the base model of {adapter.folder}"
    if not name:
        raise LayerselError(f"{key} is not named there, and the layout full needs its number of layers. {GIVE_BASE}")
    unread = f"{key}: the number of layers of {name}, which the layout full needs, cannot be read"
    # transformers lets through any exception of the configuration's class.
    try:
        content, _ = PreTrainedConfig.get_config_dict(name)
        needs_code = "AutoConfig" in content.get("auto_map", {}) and content.get("model_type") not in CONFIG_MAPPING
        if not needs_code:
            # Not None, with which transformers would ask in a terminal whether it may run the model's code.
            return int(AutoConfig.from_pretrained(name, trust_remote_code=False).get_text_config().num_hidden_layers)
    except Exception as error:
        # Its first sentence: the others advise what to do in Python.
        reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
        advice = GIVE_OTHER_BASE if base_model else GIVE_BASE
        raise LayerselError(f"{unread} ({type(error).__name__}: {reason}). {advice}") from error
    raise LayerselError(
        f"{unread}, because its configuration is code that comes with the model, which export does not run. {MERGE}."
    )
