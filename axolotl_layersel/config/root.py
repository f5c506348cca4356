"""The ``layersel`` block of an Axolotl YAML file, and the checks of the rest of the file against it.

Axolotl merges ``LayerselArgs`` into its own schema. ``preprocess``, ``evaluate``, ``inference`` and ``merge-lora`` read
the same file, so the schema refuses only what is wrong for every command.
"""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, Field, ValidationError, ValidationInfo, model_validator

from axolotl_layersel.common.errors import LayerselError, find_fault, raise_first
from axolotl_layersel.config import l1ra as l1ra
from axolotl_layersel.config import selection as selection
from axolotl_layersel.config.engines import find_engine_faults
from axolotl_layersel.config.experts import find_expert_faults
from axolotl_layersel.config.l1ra import L1RAConfig
from axolotl_layersel.config.methods import get_method
from axolotl_layersel.config.schedule import check_length
from axolotl_layersel.config.selection import SelectionConfig
from axolotl_layersel.config.strict_block import (
    SEEDS,
    Block,
    as_mapping,
    as_number,
    as_whole,
    describe_seeds,
    list_plugins,
    quote,
    settle,
)


class LayerselConfig(Block):
    """``layersel``: the settings of this plugin."""

    path: ClassVar[str] = "layersel"

    selection: SelectionConfig | None = Field(
        default=None, description="Choose the layers that get an adapter before training."
    )
    l1ra: L1RAConfig | None = Field(
        default=None, description="Move rank to the modules that need it during training. `{}` takes the defaults."
    )
    scaling_exponent: float | None = Field(
        default=None,
        ge=0,
        le=1,
        examples=[0.5],
        description="How the scaling of a module follows its rank, where ranks differ. It is the exponent p, from 0 to "
        "1, in s · (`lora_r` / rank)^p, where s is the scaling of plain LoRA. With 0, the default, every module has "
        "the scaling s. The key holds for the ranks of a selection and for those that `l1ra` moves.",
    )

    @model_validator(mode="after")
    def check_parts(self, info: ValidationInfo) -> "LayerselConfig":
        if not info.context:  # where others are told, a part may only be misspelt
            settle(self.find_contradictions(), info)
        return self

    def find_contradictions(self) -> Iterator[str]:
        """Yield why the block, or a key of it, would do nothing."""
        if self.selection is None and self.l1ra is None:
            yield (
                "layersel: the block is empty, so it would do nothing. Add `selection`, `l1ra` (`l1ra: {}` takes the "
                "defaults), or both."
            )
        # As for the keys of ranks in `selection`: without `rank_allocation` in the file, different ranks were meant.
        elif self.scaling_exponent is not None and self.keeps_rank():
            assert self.selection is not None, "without l1ra it sets the ranks"
            if self.selection.rank_allocation is None:
                yield (
                    f"{self.path}.scaling_exponent: {self.scaling_exponent} has no effect with rank_allocation: same, "
                    f"the default of method: {self.selection.method}, which changes no rank. Set "
                    "`rank_allocation: match`, add `l1ra`, or remove the key."
                )

    def find_unread(self) -> dict[str, str]:
        if self.scaling_exponent is None or not self.keeps_rank():
            return {}
        return {"scaling_exponent": "rank_allocation: same"}

    def keeps_rank(self) -> bool:
        """Return whether the file shows that every module keeps ``lora_r``. A plan can have other ranks."""
        chosen = self.selection
        if self.l1ra is not None or chosen is None or chosen.plan is not None:
            return False
        return (chosen.rank_allocation or get_method(chosen.method).rank_allocation) == "same"


def describe_unread(settings: LayerselConfig) -> str | None:
    """Return one sentence that lists the keys in the file that nothing reads; None if everything is read."""
    groups: dict[str, list[str]] = {}
    for key, why in settings.list_unread().items():
        groups.setdefault(why, []).append(key)
    if not groups:
        return None
    shown = "; ".join(f"{', '.join(keys)} (with {why})" for why, keys in groups.items())
    return f"these keys are not read, and the run goes on without them: {shown}"


class LayerselArgs(BaseModel):
    """The keys that the plugin adds to Axolotl's schema."""

    layersel: LayerselConfig | None = Field(default=None, description="Which layers get LoRA, and how much rank.")

    @model_validator(mode="before")
    @classmethod
    def check_run(cls, data: Any) -> Any:
        """Check the rest of the file against the ``layersel`` block.

        Raises:
            ValueError: with the key, its value and what to do.
        """
        # In one process Axolotl keeps the plugins of earlier files: check only files that list this one.
        if not isinstance(data, Mapping) or not any("axolotl_layersel" in name for name in list_plugins(data)):
            return data
        if data.get("layersel") is None:
            raise LayerselError(missing_block(data))
        raise_first(find_run_faults(data))
        try:
            block = LayerselConfig.model_validate(data["layersel"])
        except ValidationError:
            return data  # the validation of the field reports it
        raise_first(find_block_faults(data, block))
        return data


def find_run_faults(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield what no ``layersel`` block can be combined with in the rest of a YAML file."""
    yield from find_adapter_faults(data)
    yield from find_engine_faults(data)
    yield from find_fault(check_seed, data)


def find_block_faults(data: Mapping[str, Any], block: LayerselConfig) -> Iterator[str]:
    """Yield what conflicts with the ``layersel`` block in the rest of a YAML file."""
    block = block.drop_unread()
    if block.l1ra:
        yield from l1ra.find_file_faults(data, block.l1ra)
        yield from find_fault(check_length, data, block.l1ra)
    if block.selection:
        yield from selection.find_file_faults(data, block.selection)
    if block.l1ra:
        yield from find_rank_faults(data, block, block.l1ra)
    elif block.selection:
        yield from find_fault(selection.check_even_ranks, data, block.selection, None)


def find_rank_faults(data: Mapping[str, Any], block: LayerselConfig, moving: L1RAConfig) -> Iterator[str]:
    """Yield where a selection may give more rank than ``l1ra`` has room for, and why no rank could move."""
    chosen, lora_r = block.selection, as_whole(data.get("lora_r"))
    if lora_r is None or lora_r < 1:
        return  # others say so
    most = l1ra.find_max_rank(moving, lora_r, (chosen and chosen.max_rank) or 0)
    if chosen:
        yield from find_fault(selection.check_room, chosen.max_rank, most)
        yield from find_fault(selection.check_even_ranks, data, chosen, most)
    ranked = chosen and (chosen.plan or chosen.resolve(run_seed=0).rank_allocation != "same")
    if not (ranked or data.get("lora_rank_pattern") or data.get("lora_model_dir")):
        yield from find_fault(l1ra.check_movable, moving, [lora_r], most)


# Axolotl itself refuses most values of a wrong type in the keys below, so these checks let them pass.


def missing_block(data: Mapping[str, Any]) -> str:
    """Return the message for a file that lists the plugin but has no ``layersel`` block."""
    near = difflib.get_close_matches("layersel", set(map(str, data)) - {"layersel"}, n=1)
    if near:
        return f"{near[0]} is not a setting, and the file has no `layersel` block. Rename the key to `layersel`."
    return (
        "layersel: the plugin is listed but its block is missing or empty, so it would do nothing. Add "
        "`layersel: {selection: {method: cka, ratio: 0.5}}` or `layersel: {l1ra: {}}`, or remove axolotl_layersel "
        "from `plugins`."
    )


def find_adapter_faults(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield why the plugin does not support the kind of LoRA that the run trains."""
    adapter = data.get("adapter")
    if adapter not in ("lora", "qlora"):
        yield (
            f"adapter: {adapter!r} has no LoRA layers to choose from (full fine-tuning is not supported). "
            "Set `adapter: lora` or `adapter: qlora`, or remove axolotl_layersel from `plugins`."
        )
    if data.get("lora_r") is not None and (as_whole(data["lora_r"]) or 0) < 1:
        yield f"lora_r: {quote(data['lora_r'])} is not a valid rank. Set 1 or more, such as 16."
    block = as_mapping(data.get("layersel"))
    if as_number(data.get("lora_alpha")) == 0 and (not data.get("lora_model_dir") or block.get("l1ra") is not None):
        yield describe_unscaled(data["lora_alpha"])
    if data.get("relora") or data.get("relora_steps"):
        key = "relora" if data.get("relora") else "relora_steps"
        yield (
            f"{key}: {data[key]!r} merges and restarts the adapter, which the plugin does not support. Remove {key}."
        )
    yield from find_expert_faults(data)


def describe_unscaled(alpha: Any) -> str:
    """Return the message for a ``lora_alpha`` under which no LoRA weight gets a gradient."""
    return (
        f"lora_alpha: {quote(alpha)} scales the output of LoRA to 0, so no LoRA weight would train. Set another "
        "number, such as 16."
    )


def check_seed(data: Mapping[str, Any]) -> None:
    """Raise LayerselError for a ``seed`` that NumPy does not accept, before the Trainer fails on it."""
    seed = as_whole(data.get("seed"))
    if seed is not None and seed not in SEEDS:
        raise LayerselError(f"seed: {seed} is {describe_seeds()}")


def check_blank_blocks(block: Mapping[str, Any]) -> None:
    """Raise LayerselError for a blank ``selection`` or ``l1ra`` block."""
    raise_first(find_blank_blocks(block))


def find_blank_blocks(block: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message for each blank ``selection`` or ``l1ra`` block.

    The schema cannot check it: a dumped file holds None for the keys that were not written.
    """
    for key in ("selection", "l1ra"):
        if key in block and block[key] is None:
            yield (
                f"layersel.{key}: the block is blank. Write its settings below the key, or remove the key; "
                "`l1ra: {}` takes the defaults."
            )
