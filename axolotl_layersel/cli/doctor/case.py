"""What the sections of the report are given: the file, what refuses it, and its model if that is known."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from axolotl_layersel.cli.doctor.configuration import DEFAULT_OPTIMIZER, DEFAULT_RANK
from axolotl_layersel.config.engines import find_engine_name
from axolotl_layersel.config.l1ra import L1RAConfig, find_max_rank, find_room
from axolotl_layersel.config.methods import METHODS, Method
from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.config.selection import (
    ResolvedSelection,
    SelectionConfig,
    find_budget,
    find_matched_room,
)
from axolotl_layersel.config.strict_block import as_whole, read_choice
from axolotl_layersel.config.textual import find_seed

if TYPE_CHECKING:
    from axolotl_layersel.cli.doctor.model import Model


@dataclass(frozen=True)
class Fact:
    """A fact of the report.

    Attributes:
        key: its key in JSON.
        value: its value in JSON; numbers are exact, and bytes are bytes.
        text: the fact as a sentence.
    """

    key: str
    value: Any
    text: str


@dataclass(frozen=True)
class Case:
    """A YAML file and its model.

    Attributes:
        data: the content of the file.
        block: its ``layersel`` block without the values that are refused and those that nothing reads.
        written: the block with the values that nothing reads.
        processes: the number of processes of the run.
        model: its model without weights, None if its configuration is not at hand.
        lowest: the lowest kept layer that the user asks about, by its position.
    """

    data: Mapping[str, Any]
    block: LayerselConfig
    written: LayerselConfig
    processes: int = 1
    model: Model | None = field(default=None, compare=False)
    lowest: int | None = None

    @property
    def engine(self) -> str:
        """The name of the engine, as in a plan."""
        return find_engine_name(self.data) or ("single" if self.processes == 1 else "ddp")

    @property
    def splits_weights(self) -> bool:
        return self.engine in ("zero3", "fsdp2")

    @property
    def selection(self) -> ResolvedSelection | None:
        """The selection with defaults filled in; None without one."""
        return None if self.block.selection is None else self.block.selection.resolve(find_seed(self.data))

    @property
    def method(self) -> Method | None:
        """The method that scores or draws layers in this run; None if a plan decides, or nothing is selected."""
        chosen = self.block.selection
        return METHODS[chosen.method] if chosen and chosen.plan is None else None

    @property
    def optimizer(self) -> str:
        """The name of the optimizer, as in Axolotl's files."""
        return str(read_choice(self.data, "optimizer") or DEFAULT_OPTIMIZER)

    @property
    def lora_r(self) -> int:
        return max(as_whole(self.data.get("lora_r")) or DEFAULT_RANK, 1)

    @property
    def dtype_bytes(self) -> int:
        """The bytes of a weight of the base model that is not quantised, as Axolotl loads it on a GPU with bf16."""
        return 2 if any(self.data.get(key) for key in ("bf16", "fp16", "bfloat16", "float16", "load_in_8bit")) else 4

    @property
    def lora_bytes(self) -> int:
        """The bytes of a LoRA weight: PEFT makes it fp32, and DeepSpeed casts it back."""
        kept = self.data.get("peft_autocast_adapter_dtype") is False
        return self.dtype_bytes if kept or self.engine.startswith("zero") else 4

    @functools.cached_property
    def max_rank(self) -> int:
        """The rank that every module has memory for: ``lora_r``, or with ``l1ra`` the highest that it can reach."""
        moving, chosen = self.block.l1ra, self.block.selection
        return self.lora_r if moving is None else find_capacity(moving, chosen, self.lora_r)

    @functools.cached_property
    def choice(self) -> Choice | None:
        """What the choice comes to; None without a model."""
        return None if self.model is None else find_choice(self, self.model)


def find_capacity(moving: L1RAConfig, chosen: SelectionConfig | None, lora_r: int) -> int:
    """Return the rank that modules have room for with ``l1ra``, as ``capacity.make_room`` does."""
    least = (chosen.max_rank or find_matched_room(chosen, lora_r)) if chosen else 0
    return find_max_rank(moving, lora_r, max(least, find_room([lora_r])))


@dataclass(frozen=True)
class Choice:
    """What can be known of a choice before layers are scored.

    Attributes:
        kept: the number of units that are kept; None if gates or ranks decide it.
        units: the number of units.
        plain: trainable LoRA parameters of plain LoRA.
        least: the fewest LoRA parameters that the choice can train.
        most: the most.
        modules: the modules that are kept, if the settings name the layers; otherwise those of as many lowest units.
        is_exact: whether the settings name the layers.
        lowest: the position of the lowest kept layer, None if scores decide it.
    """

    kept: int | None
    units: int
    plain: int
    least: int
    most: int
    modules: list[str]
    is_exact: bool
    lowest: int | None


def find_choice(case: Case, model: Model) -> Choice:
    """Return what can be known of the choice of a file in its model."""
    sizes, settings = model.sizes, case.selection
    plain = sum(sizes.values())
    if settings is None or model.units is None:
        everything = list(sizes)
        return Choice(None, 0, plain, plain, plain, everything, True, min(model.stack.lora_modules))
    units, kept = model.units, model.kept
    outside = [name for names in model.stack.towers.values() for name in names]
    outside = outside if settings.outside_layers == "keep" else []
    rest = add_up(sizes, outside)
    costs = sorted(add_up(sizes, unit.modules) for unit in units)
    named = {"first": units[:kept], "last": units[-(kept or 0) :]}.get(settings.method)
    if settings.layers is not None:
        places = [model.stack.names.index(name) for name in settings.layers]
        named = [unit for unit in units if unit.layer in places]
    chosen = named or units[: kept or len(units)]
    if kept is None:
        least, most = costs[0], sum(costs)
    elif named:
        least = most = sum(add_up(sizes, unit.modules) for unit in named)
    else:
        least, most = sum(costs[:kept]), sum(costs[len(costs) - kept :])
    if settings.rank_allocation != "same":
        most = find_budget(settings, sum(costs))
        least = min(min(add_up(model.component_sizes, unit.modules) for unit in units), most)
    modules = [name for unit in chosen for name in unit.modules]
    lowest = min(unit.layer for unit in chosen) if named else None
    if kept == len(units) and settings.rank_allocation == "same":
        lowest = units[0].layer
    return Choice(kept, len(units), plain, least + rest, most + rest, [*modules, *outside], bool(named), lowest)


def add_up(sizes: Mapping[str, int], names: Iterable[str]) -> int:
    return sum(sizes[name] for name in names)
