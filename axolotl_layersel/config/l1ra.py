"""``layersel.l1ra``: its settings, and the checks of the rest of the YAML file against them."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from axolotl_layersel.common.errors import LayerselError, find_fault
from axolotl_layersel.config.engines import find_engine_name, writes_whole_state
from axolotl_layersel.config.gate_requirements import GENERATING_TRAINERS, check_generation, find_gated_file_faults
from axolotl_layersel.config.strict_block import Block, as_mapping, as_number, as_whole, quote, read_choice, settle

# No model has larger matrices, and modules of a higher rank would fill the memory.
HIGHEST_RANK = 2**16
DEFAULT_GATE_LR = 0.02
# In a run of fewer steps a gate with the default learning rate could not move from 1 to 0 and back. With
# `l1_lambda: auto` the pressure would exceed η per step, the most that any gradient can move a gate by, and all gates
# would end at 0.
SHORT_RUN = 200
# By rule: the defaults of the keys that differ between rules. A key that a rule lacks has no effect.
RULE_DEFAULTS: dict[str, dict[str, Any]] = {
    "saliency": {"last_update_ratio": 0.5, "move_ratio": 0.1},
    "pressure": {
        "last_update_ratio": 1.0,
        "l1_lambda": "auto",
        "gate_lr": None,
        "prune_threshold": 1e-10,
        "reassign": True,
        "exclude_pruned": True,
    },
}
# Optimizers whose Adam moments can be cleared for single components, and the library that implements each. These names
# are those of transformers 5.16.1 and axolotl 0.19.0.
OPTIMIZERS = {
    "adamw_torch": "PyTorch",
    "adamw_torch_fused": "PyTorch",
    "adamw_bnb_8bit": "bitsandbytes",
    "adamw_8bit": "bitsandbytes",
    "paged_adamw_8bit": "bitsandbytes",
    "paged_adamw_32bit": "bitsandbytes",
    "adamw_torch_8bit": "torchao",
    "ao_adamw_fp8": "torchao",
}
# By part of the name of another optimizer, the first match counts: the supported one with the same memory use.
NEAREST = {
    "ao_": "adamw_torch_8bit",
    "torch_4bit": "adamw_torch_8bit",
    "paged_": "paged_adamw_8bit",
    "8bit": "adamw_bnb_8bit",
    "": "adamw_torch",
}


@dataclass(frozen=True)
class Conflict:
    """Engines on which a library's optimizers do not work.

    Attributes:
        engines: names of the engines.
        reason: what messages call them, and why the library fails there.
        instead: the supported optimizer with the same memory use there.
    """

    engines: tuple[str, ...]
    reason: str
    instead: str


# By library. FSDP2: bitsandbytes 0.50.2 has no operations for DTensors, and plain LoRA fails with it too. DeepSpeed:
# torchao 0.17.0's moments can be split only between blocks of 256 values, but DeepSpeed 0.18.9 splits them anywhere.
CONFLICTS = {
    "bitsandbytes": Conflict(("fsdp2",), "FSDP2, whose sharded weights bitsandbytes cannot update", "adamw_torch_8bit"),
    "torchao": Conflict(
        ("zero1", "zero2", "zero3"),
        "DeepSpeed, which splits torchao's moments inside their blocks",
        "adamw_bnb_8bit",
    ),
}


class L1RAConfig(Block):
    """``layersel.l1ra``: how rank moves between LoRA modules during training."""

    path: ClassVar[str] = "layersel.l1ra"
    renamed: ClassVar[dict[str, str]] = {"budget": "budget_unit", "last_update": "last_update_ratio"}

    rule: Literal["saliency", "pressure"] = Field(
        default="saliency",
        description="`saliency` (default): rank moves from the components that matter least to the loss to modules "
        "whose components all matter more. `pressure`: the rule of the L1RA paper, in which an L1 penalty shrinks "
        "gates, and components whose gate reaches 0 are pruned.",
    )
    max_rank: int | None = Field(
        default=None,
        ge=1,
        le=HIGHEST_RANK,
        description="Highest rank of a module. Default: 2 × lora_r, or the higher rank that `selection.max_rank`, "
        "`selection.time`, a plan or a continued adapter needs.",
    )
    min_rank: int = Field(
        default=1, ge=1, le=HIGHEST_RANK, description="Lowest rank to which updates reduce a module. Default 1."
    )
    budget_unit: Literal["parameters", "rank"] = Field(
        default="parameters",
        description="What the budget counts. `parameters` (default): the number of trainable parameters never grows. "
        "`rank`: the sum of all ranks is constant.",
    )
    move_ratio: float | None = Field(
        default=None,
        gt=0,
        le=1,
        examples=[0.1],
        description="With `rule: saliency`: the largest share of the rank in use that one update moves. Default 0.1; "
        "in small adapters at least one component.",
    )
    l1_lambda: float | str | None = Field(
        default=None,
        description="With `rule: pressure`: λ, the weight of the L1 penalty on the gates. A number, or `auto` "
        "(default): the penalty would shrink a gate that has no other gradient to zero in a third of the run.",
    )
    gate_lr: float | None = Field(
        default=None,
        ge=0,
        examples=[DEFAULT_GATE_LR],
        description=f"With `rule: pressure`: constant learning rate of the gates. Default {DEFAULT_GATE_LR}; in runs "
        f"of fewer than {SHORT_RUN} optimizer steps {DEFAULT_GATE_LR} × {SHORT_RUN} / steps.",
    )
    update_ratio: float = Field(
        default=0.1,
        gt=0,
        le=1,
        examples=[0.1],
        description="Interval between rank updates, as a share of the optimizer steps. Default 0.1.",
    )
    warmup_ratio: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        examples=[0.1],
        description="Share of the optimizer steps before the first rank update. Default 0.",
    )
    last_update_ratio: float | None = Field(
        default=None,
        gt=0,
        le=1,
        examples=[0.5],
        description="Share of the optimizer steps after which rank no longer moves. Default 0.5 with "
        "`rule: saliency`, or later if two updates need it; 1 with `rule: pressure`.",
    )
    prune_threshold: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        examples=[1e-10],
        description="With `rule: pressure`: an update prunes components whose gate is below this. Default 1e-10.",
    )
    reassign: bool | None = Field(
        default=None,
        description="With `rule: pressure`: whether pruned rank goes to other modules. Default true; with false the "
        "adapter shrinks.",
    )
    exclude_pruned: bool | None = Field(
        default=None,
        description="With `rule: pressure`: whether a module that loses rank in an update is excluded from gaining "
        "rank in the same update. Default true.",
    )

    @field_validator("l1_lambda", mode="before")
    @classmethod
    def check_lambda(cls, value: Any) -> Any:
        if value in ("auto", None):
            return value
        number = as_number(value)
        if number is None or number < 0:
            raise ValueError(
                f"{cls.path}.l1_lambda: {quote(value)} is neither `auto` nor a number of 0 or more. Set `auto`."
            )
        return number

    @field_validator("update_ratio")
    @classmethod
    def check_updates(cls, value: float) -> float:
        if 3 * Fraction(str(value)) > 1:
            raise ValueError(
                f"{cls.path}.update_ratio: {value} leaves fewer than two updates in a run of any length, because the "
                "last interval of a run has none. Set 0.33 or less."
            )
        return value

    @model_validator(mode="after")
    def check_together(self, info: ValidationInfo) -> "L1RAConfig":
        settle(self.find_rule_faults(), info)
        settle(self.find_contradictions(), info)
        return self

    def find_rule_faults(self) -> Iterator[str]:
        """Yield the keys of another rule than the default in a block that sets no rule."""
        # A file that sets a key of one rule and no rule was most likely meant to have that rule.
        for key in () if "rule" in self.model_fields_set else self.find_unread():
            rule = next(rule for rule, keys in RULE_DEFAULTS.items() if key in keys)
            yield (
                f"{self.path}.{key}: {getattr(self, key)} has no effect with the default, rule: {self.rule}. Set "
                f"`rule: {rule}`, or remove the key."
            )

    def find_unread(self) -> dict[str, str]:
        keys = {key for keys in RULE_DEFAULTS.values() for key in keys} - RULE_DEFAULTS[self.rule].keys()
        return {key: f"rule: {self.rule}" for key in sorted(keys) if getattr(self, key) is not None}

    def find_contradictions(self) -> Iterator[str]:
        """Yield the contradictions between keys of the block."""
        if self.max_rank is not None and self.max_rank < self.min_rank:
            yield f"{self.path}.max_rank: {self.max_rank} is less than min_rank: {self.min_rank}."
        if self.last_update_ratio is not None and self.last_update_ratio <= self.warmup_ratio:
            yield (
                f"{self.path}.last_update_ratio: {self.last_update_ratio} is not after "
                f"warmup_ratio: {self.warmup_ratio}, so rank would never move. Raise it."
            )
        if self.drop_unread().gate_lr == 0 and self.get("l1_lambda") != 0:
            yield (
                f"{self.path}.gate_lr: 0 holds the gates constant, so l1_lambda: {self.get('l1_lambda')} has no "
                "effect. Set a gate_lr above 0, or also set `l1_lambda: 0` to train plain LoRA on purpose."
            )

    def get(self, key: str) -> Any:
        """Return the value of ``key`` with its default filled in; None if the rule does not have the key."""
        value = getattr(self, key)
        return RULE_DEFAULTS[self.rule].get(key) if value is None else value


def find_file_faults(data: Mapping[str, Any], settings: L1RAConfig) -> Iterator[str]:
    """Yield what conflicts with ``layersel.l1ra`` in the rest of a YAML file."""
    yield from find_rank_faults(data, settings)
    yield from find_gated_file_faults(data, "layersel.l1ra")
    rl = read_choice(data, "rl")
    if rl == "ebft":
        yield (
            "rl: 'ebft' also reads hidden states of the model in training, which layersel.l1ra is untested with. Use "
            "only `selection` with it, with a saved `plan` or a method that reads no data."
        )
    uses_vllm = rl in GENERATING_TRAINERS and as_mapping(data.get("trl")).get("use_vllm") is True
    yield from find_fault(check_generation, uses_vllm)
    optimizer = read_choice(data, "optimizer")
    yield from find_fault(check_optimizer, optimizer, find_engine_name(data), writes_whole_state(data))


def find_rank_faults(data: Mapping[str, Any], settings: L1RAConfig) -> Iterator[str]:
    """Yield what conflicts with the ranks of ``layersel.l1ra`` in ``lora_r`` and ``lora_alpha``."""
    rank = as_whole(data.get("lora_r"))
    if rank is None:
        yield "lora_r is missing, and layersel.l1ra needs a rank to start from. Set `lora_r`, such as 16."
        return
    alpha = data.get("lora_alpha")
    if as_number(alpha) is None:
        yield f"lora_alpha: {quote(alpha)} is not a number to scale LoRA by. Set a number, such as {rank}."
    yield from find_fault(check_bounds, settings, rank)


def check_movable(settings: L1RAConfig, ranks: Collection[int], max_rank: int, many: bool = True) -> None:
    """Raise LayerselError if no rank could ever move, and the memory of ``max_rank`` would be wasted.

    Args:
        settings: the ``l1ra`` block.
        ranks: the ranks that modules start with.
        max_rank: the rank that each module has memory for.
        many: whether there are two or more modules.
    """
    way_out = f"Modules would use the memory of rank {max_rank} for nothing"
    if max(ranks) <= settings.min_rank:
        raise LayerselError(
            f"lora_r: modules start with rank {max(ranks)}, and layersel.l1ra.min_rank: {settings.min_rank} is the "
            f"rank that each of them keeps, so no rank could move. {way_out}: raise lora_r"
            f"{', lower min_rank,' if settings.min_rank > 1 else ''} or remove the l1ra block."
        )
    if settings.rule != "saliency":
        return  # a pressure also prunes rank that no module has room for
    if min(ranks) >= max_rank:
        raise LayerselError(
            f"layersel.l1ra.max_rank: {max_rank} is the rank that all modules start with, so none has room for more "
            f"and no rank could move. Set a higher one{'' if settings.max_rank is None else ', remove the key'}, or "
            "remove the l1ra block."
        )
    if not many:
        raise LayerselError(
            "layersel.l1ra: only one LoRA module trains, and rank moves between modules, so no rank could move. "
            f"{way_out}: put LoRA on more modules, select more of them, or remove the l1ra block."
        )


def check_share(settings: L1RAConfig, budget: int, cheapest: int) -> None:
    """Raise LayerselError if ``move_ratio`` of the rank in use is less than one component.

    Args:
        settings: the ``l1ra`` block.
        budget: the part of the budget in use, in units of ``budget_unit``.
        cheapest: the cost of the cheapest component, in the same unit.
    """
    if settings.move_ratio is not None and settings.move_ratio * budget < cheapest:
        raise LayerselError(
            f"layersel.l1ra.move_ratio: {settings.move_ratio} of the rank in use is less than one component, so no "
            f"rank could move. Set {math.ceil(1000 * cheapest / budget) / 1000} or more, or remove the key."
        )


def find_max_rank(settings: L1RAConfig, lora_r: int, least: int = 0) -> int:
    """Return the highest rank that a module can reach; ``least`` is a lower bound for the default."""
    return settings.max_rank or max(2 * lora_r, least)


def find_room(ranks: Collection[int]) -> int:
    """Return the ``max_rank`` that lets some modules gain rank if modules start with ``ranks``."""
    highest = max(ranks, default=0)
    return highest if len(set(ranks)) > 1 else 2 * highest


def check_bounds(settings: L1RAConfig, lora_r: int) -> None:
    """Raise LayerselError unless ``lora_r`` lies between ``min_rank`` and ``max_rank``."""
    if settings.max_rank is not None and settings.max_rank < lora_r:
        raise LayerselError(
            f"layersel.l1ra.max_rank: {settings.max_rank} is less than lora_r: {lora_r}, the rank that modules start "
            f"with. Set {lora_r} or more, or remove the key for {2 * lora_r}."
        )
    if settings.min_rank > lora_r:
        raise LayerselError(
            f"layersel.l1ra.min_rank: {settings.min_rank} is more than lora_r: {lora_r}, the rank that modules start "
            f"with. Set {lora_r} or less."
        )


def check_optimizer(name: Any, engine: str | None, whole_state: bool) -> None:
    """Raise LayerselError for an optimizer whose moments cannot be cleared when rank moves.

    Args:
        name: the value of the key ``optimizer``; None is Axolotl's default.
        engine: the name of the engine; None if it splits nothing.
        whole_state: whether FSDP2 writes FULL_STATE_DICT.
    """
    if name is None:
        return
    if not isinstance(name, str) or name not in OPTIMIZERS:
        raise refuse_optimizer(name, engine)
    check_library(name, OPTIMIZERS[name], engine, whole_state)


def check_library(name: str, library: str, engine: str | None, whole_state: bool) -> None:
    """Raise LayerselError if an optimizer of ``library`` does not work on the engine; see ``check_optimizer``."""
    conflict = CONFLICTS.get(library)
    if conflict is not None and engine in conflict.engines:
        raise LayerselError(f"optimizer: {name!r} cannot be combined with {conflict.reason}. Use `{conflict.instead}`.")
    # accelerate 1.13.0 cannot read the moments of torchao that it writes, not even with plain LoRA.
    if library == "torchao" and whole_state:
        raise LayerselError(
            f"fsdp_config.state_dict_type: FULL_STATE_DICT with optimizer: {name!r} writes checkpoints that no run can "
            "resume from. Use `SHARDED_STATE_DICT`."
        )


def refuse_optimizer(name: Any, engine: str | None) -> LayerselError:
    """Return the error for an unsupported optimizer; it suggests the nearest one that works on the engine.

    Args:
        name: the optimizer's name in the YAML file, or its class.
        engine: the name of the engine; None if it splits nothing.
    """
    shown = quote(name)
    nearest = next(supported for mark, supported in NEAREST.items() if mark in shown)
    conflict = CONFLICTS.get(OPTIMIZERS[nearest])
    if conflict is not None and engine in conflict.engines:
        nearest = conflict.instead
    return LayerselError(
        f"optimizer: {shown} is not supported by layersel.l1ra, which clears the Adam moments of the components that "
        f"it moves, and does not know where this optimizer stores them. Use `{nearest}`."
    )


# By `budget_unit`: the cost of one component of each module, from its number of parameters.
BUDGETS: dict[str, Callable[[Mapping[str, int]], dict[str, int]]] = {
    "rank": lambda parameters: dict.fromkeys(parameters, 1),
    "parameters": dict,
}
