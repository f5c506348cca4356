"""``layersel.l1ra``: its settings, and what in the rest of the YAML file contradicts them."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.engines import find_engine_name, writes_whole_state
from axolotl_layersel.config.gate_requirements import GENERATING_TRAINERS, check_gated_file, check_generation
from axolotl_layersel.config.strict_block import Block, as_mapping, as_number, as_whole, quote, read_choice

# No model has matrices with more rows and columns; room for such a rank would take all memory.
HIGHEST_RANK = 2**16
DEFAULT_GATE_LR = 0.02
# In a shorter run gates of that learning rate could not get from 1 to 0 and back: with `l1_lambda: auto` the pressure
# would exceed what any gradient can move a gate by, η a step, and all of them would end at 0.
SHORT_RUN = 200
# The rules, and the defaults of those keys that not all rules have, or not with the same default.
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
# Optimizers with Adam moments that can be cleared for some components alone, and the library that each one is of:
# transformers 5.16.1 and axolotl 0.19.0 make them from these names.
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
# By what is in the name of another optimizer, the first that is: the supported one that takes as much memory.
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
        engines: their names.
        reason: what they are called, and why.
        instead: the supported optimizer that takes as much memory there.
    """

    engines: tuple[str, ...]
    reason: str
    instead: str


# By library. FSDP2: bitsandbytes 0.50.2 registers no way to compute on DTensors, and plain LoRA fails there too.
# DeepSpeed: torchao 0.17.0's moments can be cut only between their blocks of 256, and DeepSpeed 0.18.9 cuts anywhere.
CONFLICTS = {
    "bitsandbytes": Conflict(("fsdp2",), "FSDP2, on whose weights bitsandbytes cannot compute", "adamw_torch_8bit"),
    "torchao": Conflict(
        ("zero1", "zero2", "zero3"),
        "DeepSpeed, which cuts torchao's moments where they cannot be cut",
        "adamw_bnb_8bit",
    ),
}


class L1RAConfig(Block):
    """``layersel.l1ra``: how much rank each LoRA module gets while the model trains."""

    path: ClassVar[str] = "layersel.l1ra"
    renamed: ClassVar[dict[str, str]] = {"budget": "budget_unit", "last_update": "last_update_ratio"}

    rule: Literal["saliency", "pressure"] = Field(
        default="saliency",
        description="`saliency`: components that the loss would miss least give their rank to modules in which all "
        "are worth more; `pressure`: the L1RA paper's rule, by which a pressure shrinks gates until some are 0.",
    )
    max_rank: int | None = Field(
        default=None,
        ge=1,
        le=HIGHEST_RANK,
        description="The highest rank that a module can reach. Default: 2 × lora_r, or the rank that "
        "`selection.max_rank`, a plan or a continued adapter asks for, where that is more.",
    )
    min_rank: int = Field(default=1, ge=1, le=HIGHEST_RANK, description="The rank that pruning leaves every module.")
    budget_unit: Literal["parameters", "rank"] = Field(
        default="parameters",
        description="What the budget counts. `parameters`: the trainable parameters never grow; `rank`: the sum of all "
        "ranks stays.",
    )
    move_ratio: float | None = Field(
        default=None,
        gt=0,
        le=1,
        examples=[0.1],
        description="With `rule: saliency`: share of the rank in use that an update moves at most. Default 0.1, and in "
        "small adapters what it takes for one component to move.",
    )
    l1_lambda: float | str | None = Field(
        default=None,
        description="With `rule: pressure`: λ, the pressure on the gates: `auto` (default), with which the pressure "
        "alone would take a gate to zero in a third of the run, or a number.",
    )
    gate_lr: float | None = Field(
        default=None,
        ge=0,
        examples=[DEFAULT_GATE_LR],
        description=f"With `rule: pressure`: learning rate of the gates, constant. Default {DEFAULT_GATE_LR}, and more "
        f"in runs of fewer than {SHORT_RUN} optimizer steps: {DEFAULT_GATE_LR} × {SHORT_RUN} / steps.",
    )
    update_ratio: float = Field(
        default=0.1, gt=0, le=1, examples=[0.1], description="Share of the optimizer steps between two updates of rank."
    )
    warmup_ratio: float = Field(
        default=0.0, ge=0, lt=1, examples=[0.1], description="Share of the optimizer steps before the first update."
    )
    last_update_ratio: float | None = Field(
        default=None,
        gt=0,
        le=1,
        examples=[0.5],
        description="Share of the optimizer steps after which rank stays where it is. Default 0.5 with "
        "`rule: saliency`, or as late as the second update of a short run or a long warmup; 1 with `rule: pressure`.",
    )
    prune_threshold: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        examples=[1e-10],
        description="With `rule: pressure`: an update prunes components with a gate below this. Default 1e-10.",
    )
    reassign: bool | None = Field(
        default=None,
        description="With `rule: pressure`: `true` (default), or false: pruned rank is not placed again, the adapter "
        "shrinks.",
    )
    exclude_pruned: bool | None = Field(
        default=None,
        description="With `rule: pressure`: `true` (default), or false: a module that lost rank in an update may gain "
        "some in the same update.",
    )

    @field_validator("l1_lambda", mode="before")
    @classmethod
    def check_lambda(cls, value: Any) -> Any:
        if value in ("auto", None):
            return value
        number = as_number(value)
        if number is None or number < 0:
            raise ValueError(f"{cls.path}.l1_lambda: {quote(value)} is not `auto` or a number from 0. Set `auto`.")
        return number

    @field_validator("update_ratio")
    @classmethod
    def check_updates(cls, value: float) -> float:
        if 3 * Fraction(str(value)) > 1:
            raise ValueError(
                f"{cls.path}.update_ratio: {value} leaves fewer than two updates in a run of any length, for there is "
                "none in the last such share of it. Set 0.33 or less."
            )
        return value

    @model_validator(mode="after")
    def check_keys_of_rule(self) -> "L1RAConfig":
        # Who writes the key of a rule and no rule wants that one.
        for key in () if "rule" in self.model_fields_set else self.find_unread():
            rule = next(rule for rule, keys in RULE_DEFAULTS.items() if key in keys)
            raise ValueError(
                f"{self.path}.{key}: {getattr(self, key)} has no effect with rule: {self.rule}, the default. Set "
                f"`rule: {rule}`, or remove the key."
            )
        return self

    def find_unread(self) -> dict[str, str]:
        keys = {key for keys in RULE_DEFAULTS.values() for key in keys} - RULE_DEFAULTS[self.rule].keys()
        return {key: f"rule: {self.rule}" for key in sorted(keys) if getattr(self, key) is not None}

    @model_validator(mode="after")
    def check_ranks_and_gates(self) -> "L1RAConfig":
        if self.max_rank is not None and self.max_rank < self.min_rank:
            raise ValueError(f"{self.path}.max_rank: {self.max_rank} is less than min_rank: {self.min_rank}.")
        if self.last_update_ratio is not None and self.last_update_ratio <= self.warmup_ratio:
            raise ValueError(
                f"{self.path}.last_update_ratio: {self.last_update_ratio} is before the first update, which is after "
                f"warmup_ratio: {self.warmup_ratio}. Raise it."
            )
        if self.drop_unread().gate_lr == 0 and self.get("l1_lambda") != 0:
            raise ValueError(
                f"{self.path}.gate_lr: 0 holds the gates where they are, whatever l1_lambda: {self.get('l1_lambda')} "
                "is. Set a gate_lr above 0; or, to train plain LoRA on purpose, `l1_lambda: 0` too."
            )
        return self

    def get(self, key: str) -> Any:
        """Return the value of ``key`` as it takes effect, None where it has none."""
        value = getattr(self, key)
        return RULE_DEFAULTS[self.rule].get(key) if value is None else value


def check_file(data: Mapping[str, Any], settings: L1RAConfig) -> None:
    """Raise LayerselError for what in the rest of a YAML file does not go with ``layersel.l1ra``."""
    check_ranks(data, settings)
    check_gated_file(data, "layersel.l1ra")
    rl = read_choice(data, "rl")
    if rl == "ebft":
        raise LayerselError(
            "rl: 'ebft' reads hidden states of the model beside training it, which layersel.l1ra was never run with. "
            "Use `selection` alone with it, by a saved `plan` or a method that reads no data."
        )
    check_generation(rl in GENERATING_TRAINERS and as_mapping(data.get("trl")).get("use_vllm") is True)
    check_optimizer(read_choice(data, "optimizer"), find_engine_name(data), writes_whole_state(data))


def check_ranks(data: Mapping[str, Any], settings: L1RAConfig) -> None:
    """Raise LayerselError where the ranks of ``layersel.l1ra`` do not go with ``lora_r`` and ``lora_alpha``."""
    rank = as_whole(data.get("lora_r"))
    if rank is None:
        raise LayerselError("lora_r: None is no rank that layersel.l1ra could start from. Set `lora_r`, such as 16.")
    alpha = data.get("lora_alpha")
    if as_number(alpha) is None:
        raise LayerselError(
            f"lora_alpha: {quote(alpha)} is no number that a scaling could come from. Set it, such as {rank}."
        )
    check_bounds(settings, rank)


def check_movable(settings: L1RAConfig, ranks: Collection[int], max_rank: int, many: bool = True) -> None:
    """Raise LayerselError where no rank could ever move, and modules would be built for more in vain.

    Args:
        settings: the ``l1ra`` block.
        ranks: that modules start with, all that there are.
        max_rank: the rank that each has room for.
        many: whether there are two modules or more.
    """
    way_out = f"Modules would take the memory of rank {max_rank} in vain"
    if max(ranks) <= settings.min_rank:
        raise LayerselError(
            f"lora_r: modules start with rank {max(ranks)}, and layersel.l1ra.min_rank: {settings.min_rank} is what "
            f"each of them keeps, so no rank could move. {way_out}: raise lora_r"
            f"{', lower min_rank,' if settings.min_rank > 1 else ''} or remove the l1ra block."
        )
    if settings.rule != "saliency":
        return  # a pressure takes rank out where none is placed again, too
    if min(ranks) >= max_rank:
        raise LayerselError(
            f"layersel.l1ra.max_rank: {max_rank} is the rank that all modules start with, so none has room for more "
            f"and no rank could move. Set a higher one{'' if settings.max_rank is None else ', leave it out'}, or "
            "remove the l1ra block."
        )
    if not many:
        raise LayerselError(
            "layersel.l1ra: one LoRA module trains, and rank moves between modules, so none could move. "
            f"{way_out}: put LoRA on more modules, select more of them, or remove the l1ra block."
        )


def check_share(settings: L1RAConfig, budget: int, cheapest: int) -> None:
    """Raise LayerselError where ``move_ratio`` of the rank in use is less than one component.

    Args:
        settings: the ``l1ra`` block.
        budget: what of it is in use.
        cheapest: what the cheapest component takes of it.
    """
    if settings.move_ratio is not None and settings.move_ratio * budget < cheapest:
        raise LayerselError(
            f"layersel.l1ra.move_ratio: {settings.move_ratio} of the rank in use is less than one component, so no "
            f"rank could move. Set {math.ceil(1000 * cheapest / budget) / 1000} or more, or leave it out."
        )


def find_max_rank(settings: L1RAConfig, lora_r: int, least: int = 0) -> int:
    """Return the highest rank that a module can reach. ``least``: what the default must have room for."""
    return settings.max_rank or max(2 * lora_r, least)


def find_room(ranks: Collection[int]) -> int:
    """Return the rank that there must be room for where modules start with ``ranks``, so that some of them can gain."""
    highest = max(ranks, default=0)
    return highest if len(set(ranks)) > 1 else 2 * highest


def check_bounds(settings: L1RAConfig, lora_r: int) -> None:
    """Raise LayerselError unless ``lora_r`` lies between the lowest and the highest rank that a module can have."""
    if settings.max_rank is not None and settings.max_rank < lora_r:
        raise LayerselError(
            f"layersel.l1ra.max_rank: {settings.max_rank} is less than lora_r: {lora_r}, with which modules start. Set "
            f"{lora_r} or more, or leave it out for {2 * lora_r}."
        )
    if settings.min_rank > lora_r:
        raise LayerselError(
            f"layersel.l1ra.min_rank: {settings.min_rank} is more than lora_r: {lora_r}, with which modules start. Set "
            f"{lora_r} or less."
        )


def check_optimizer(name: Any, engine: str | None, whole_state: bool) -> None:
    """Raise LayerselError for an optimizer whose moments rank cannot move with.

    Args:
        name: the value of the key ``optimizer``; None is Axolotl's default.
        engine: its name, or None where nothing is split.
        whole_state: whether FSDP2 writes FULL_STATE_DICT.
    """
    if name is None:
        return
    if not isinstance(name, str) or name not in OPTIMIZERS:
        raise refuse_optimizer(name, engine)
    check_library(name, OPTIMIZERS[name], engine, whole_state)


def check_library(name: str, library: str, engine: str | None, whole_state: bool) -> None:
    """Raise LayerselError where the optimizer ``name``, of ``library``, does not work; see ``check_optimizer``."""
    conflict = CONFLICTS.get(library)
    if conflict is not None and engine in conflict.engines:
        raise LayerselError(f"optimizer: {name!r} does not go with {conflict.reason}. Use `{conflict.instead}`.")
    # accelerate 1.13.0 writes torchao's moments as objects that it refuses to read, with plain LoRA too.
    if library == "torchao" and whole_state:
        raise LayerselError(
            f"fsdp_config.state_dict_type: FULL_STATE_DICT with optimizer: {name!r} writes checkpoints that no run can "
            "resume from. Use `SHARDED_STATE_DICT`."
        )


def refuse_optimizer(name: Any, engine: str | None) -> LayerselError:
    """Return the error for an optimizer, by its name in the YAML file or its class, that keeps no moments known here.

    It names the nearest one that works on the engine.
    """
    shown = quote(name)
    nearest = next(supported for mark, supported in NEAREST.items() if mark in shown)
    conflict = CONFLICTS.get(OPTIMIZERS[nearest])
    if conflict is not None and engine in conflict.engines:
        nearest = conflict.instead
    return LayerselError(
        f"optimizer: {shown} is not supported by layersel.l1ra, which clears the Adam moments of the components that "
        f"it moves, and does not know where this one keeps them. Use `{nearest}`."
    )


# What one component of each module takes of the budget, by the kind of budget, from its number of parameters.
BUDGETS: dict[str, Callable[[Mapping[str, int]], dict[str, int]]] = {
    "rank": lambda parameters: dict.fromkeys(parameters, 1),
    "parameters": dict,
}
