"""``layersel.selection``: its settings, and what in the rest of the YAML file contradicts them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config import flexora as flexora
from axolotl_layersel.config.engines import LABELS as SHARDED
from axolotl_layersel.config.engines import find_shards
from axolotl_layersel.config.flexora import FlexoraConfig, Search
from axolotl_layersel.config.gate_requirements import GENERATING_TRAINERS
from axolotl_layersel.config.initialisation import check_initialisation, check_redrawn
from axolotl_layersel.config.layer_names import LayerName, format_names, sort_names, split_name
from axolotl_layersel.config.methods import LABELS, METHODS, Method, get_method, list_data_free
from axolotl_layersel.config.strict_block import (
    SEEDS,
    Block,
    as_mapping,
    as_number,
    as_whole,
    as_whole_list,
    check_known,
    quote,
    read_choice,
)

# What they come to in a model: `ending` is the last token before the ending that nearly all rows share.
Token = Literal["cls", "mean", "last", "ending"]
Unselected = Literal["remove", "freeze"]
DEFAULT_RATIO = 0.5
DEFAULT_NUM_SAMPLES = 128
DEFAULT_TOKEN = "auto"
DEFAULT_UNSELECTED: Unselected = "remove"
OutsideLayers = Literal["keep", "remove"]
DEFAULT_OUTSIDE_LAYERS: OutsideLayers = "keep"
DEFAULT_STACKS = "language"
RankAllocation = Literal["same", "match", "score"]
DEFAULT_BUDGET = 1.0
HIGHEST_BUDGET = 64
MAX_RANK_FACTOR = 4
HIGHEST_RANK = 1024
# The bounds that nothing reads, by the value of `rank_allocation`.
IDLE_BOUNDS: dict[str | None, tuple[str, ...]] = {"same": ("max_rank", "min_rank"), "match": ("min_rank",)}


class SelectionConfig(Block):
    """``layersel.selection``: which layers keep their adapter."""

    path: ClassVar[str] = "layersel.selection"
    renamed: ClassVar[dict[str, str]] = {"rank": "rank_allocation", "towers": "outside_layers"}

    method: str = Field(description=f"How layers are chosen: {', '.join(METHODS)}.")
    ratio: float | None = Field(
        default=None,
        gt=0,
        le=1,
        examples=[DEFAULT_RATIO],
        description=f"Share of the candidate layers that is kept, in (0, 1]. Default {DEFAULT_RATIO}, of a lone "
        "candidate 1, unless `num_layers` or `layers` is given; with flexora see `keep`.",
    )
    num_layers: int | None = Field(default=None, ge=1, description="Number of layers kept, instead of `ratio`.")
    num_units: int | None = Field(
        default=None,
        ge=1,
        description="With `granularity: group` or `module`: number of them kept, instead of `ratio`.",
    )
    layers: list[LayerName] | None = Field(
        default=None,
        description="With `method: explicit`: the layers kept, from 0; of a model with an encoder and a decoder as "
        "`encoder.0` and `decoder.0`.",
    )
    granularity: str | None = Field(
        default=None,
        description="What is chosen among: `layer`, `group` (the attention or the MLP of a layer) or `module`. "
        "Default: the first that the method has, see its table.",
    )
    rank_allocation: RankAllocation | None = Field(
        default=None,
        description="How rank is given to the chosen units. `same`: `lora_r` each; `match`: one rank for all, as high "
        "as `budget` allows; `score`: more where the score is higher. Default: `score` with gradient, `same` with the "
        "others.",
    )
    budget: float | None = Field(
        default=None,
        description="With `rank_allocation: match` and `score`: the trainable parameters that may be spent, as a "
        "multiple of those of LoRA with `lora_r` in all candidates. Default 1.",
    )
    budget_parameters: int | None = Field(
        default=None, ge=1, description="The same as a number of parameters, instead of `budget`."
    )
    min_rank: int | None = Field(
        default=None,
        ge=0,
        le=HIGHEST_RANK,
        description="With `rank_allocation: score`: the lowest rank of a chosen unit. Default 0: units that would gain "
        "nothing by rank are left out.",
    )
    max_rank: int | None = Field(
        default=None,
        ge=1,
        le=HIGHEST_RANK,
        description="With `rank_allocation: match` and `score`: the highest rank. Default "
        f"{MAX_RANK_FACTOR} × lora_r, and with l1ra the highest that it allows.",
    )
    keep: Literal["positive"] | None = Field(
        default=None,
        description="flexora: `positive` (default) keeps what has a gate above zero, instead of `ratio` or "
        "`num_layers`.",
    )
    candidates: list[LayerName] | None = Field(
        default=None,
        description="Layers that may be chosen, named as in `layers`. Default: every layer that carries LoRA, of the "
        "language model, of both an encoder and a decoder, or of what `stacks` says.",
    )
    unselected: Unselected | None = Field(
        default=None,
        description="`remove` (default): the other layers get no adapter; `freeze`: they keep it, untrained.",
    )
    outside_layers: OutsideLayers | None = Field(
        default=None,
        description="LoRA outside of the language model's layers, such as in a vision tower or a projector. "
        "`keep` (default): it stays and trains; `remove`: it gets no adapter.",
    )
    stacks: Literal["language", "vision", "both"] | None = Field(
        default=None,
        description="Of a multimodal model, whose layers are chosen among. `language` (default): the language model's; "
        "`vision`: the vision tower's, and LoRA in the language model is what `outside_layers` is about; `both`.",
    )
    num_samples: int | None = Field(
        default=None,
        description=f"Training rows that the scores are computed from. Default {DEFAULT_NUM_SAMPLES}, or all rows of a "
        "smaller training set.",
    )
    token: Literal["auto", "last", "mean", "cls"] | None = Field(
        default=None,
        description="cka: the token that stands for a row. `auto` (default): of an encoder the first, or the mean "
        "where its pooling is one; else the last one before the ending that nearly all rows share (others are "
        "left out); of an encoder beside a decoder the mean. Of a vision tower always the mean. "
        "`last`, `mean` (of the row's tokens), `cls` (the first).",
    )
    seed: int | None = Field(
        default=None,
        ge=SEEDS.start,
        le=SEEDS.stop - 1,
        description="Seed of the calibration sample, or of the search. Default: the run's seed.",
    )
    plan: str | None = Field(
        default=None, description="Path of a saved plan.json: it is checked and applied, nothing is scored."
    )
    plan_check: Literal["error", "ignore"] | None = Field(
        default=None,
        description="What a plan, or a checkpoint, that was made for another base model is. `error` (default); "
        "`ignore`: it is applied, for a model that has another name only.",
    )
    flexora: FlexoraConfig | None = Field(
        default=None, description="The search of `method: flexora`, see below. Default: its defaults."
    )

    @field_validator("method", "granularity", mode="before")
    @classmethod
    def check_choice(cls, value: Any, info: Any) -> Any:
        units = tuple(dict.fromkeys(unit for method in METHODS.values() for unit in method.units))
        known = {"method": tuple(METHODS), "granularity": units}
        return check_known(f"{cls.path}.{info.field_name}", value, known[info.field_name])

    @field_validator("budget", mode="before")
    @classmethod
    def check_budget(cls, value: Any) -> Any:
        if value == "parameters":
            raise ValueError(f"{cls.path}.budget: 'parameters' is 1, the default, now. Leave the key out.")
        number = as_number(value)
        if number is not None and not 0 < number <= HIGHEST_BUDGET:
            raise ValueError(
                f"{cls.path}.budget: {quote(value)} is outside (0, {HIGHEST_BUDGET}]: it is a multiple of the "
                "parameters of LoRA with `lora_r` in all candidates. Set one such as 0.5, or give a number of "
                "parameters as `budget_parameters`."
            )
        return value

    @field_validator("layers", "candidates")
    @classmethod
    def check_layers(cls, value: list[LayerName] | None, info: Any) -> list[LayerName] | None:
        if value is None:
            return None
        key = f"{cls.path}.{info.field_name}"
        if not value:
            raise ValueError(f"{key}: [] names no layer. List at least one, counted from 0.")
        numbers = [layer for layer in value if isinstance(layer, int)]
        if numbers and len(numbers) < len(value):
            raise ValueError(
                f"{key}: {format_names(value)} names layers by their numbers, as in a model with one list of them, and "
                "those of an encoder and a decoder. Write them all in one way."
            )
        negative = [layer for layer in numbers if layer < 0]
        if negative:
            raise ValueError(f"{key}: {negative} are negative. Layers are counted from 0, the lowest.")
        repeated = sort_names({layer for layer in value if value.count(layer) > 1})
        if repeated:
            raise ValueError(f"{key}: {format_names(repeated)} are listed more than once. List each layer once.")
        return value

    @model_validator(mode="after")
    def check_together(self) -> "SelectionConfig":
        if self.method == "explicit" and self.layers is None:
            raise ValueError(f"{self.path}.layers is missing: method explicit keeps just the layers listed there.")
        if self.method != "explicit" and self.layers is not None:
            raise ValueError(
                f"{self.path}.layers: {self.layers} has no effect with method {self.method}. "
                f"Set `method: explicit`, or `num_layers: {len(self.layers)}` to keep as many, or use `candidates` to "
                "limit the choice."
            )
        method, read = get_method(self.method), self.drop_unread()
        if self.keep is not None and "keep" not in method.keys:
            raise ValueError(
                f"{self.path}.keep: {self.keep} asks for gates, and method {self.method} has none. Say how much is "
                "kept by `ratio` or `num_layers`, or set `method: flexora`."
            )
        if read.stacks == "vision" and read.token in ("last", "cls"):
            raise ValueError(
                f"{self.path}.token: {self.token!r} has no effect with stacks: vision, where the mean of a row's "
                "patches stands for it. Remove the key, or set `token: mean`."
            )
        if read.num_samples is not None and read.num_samples < method.fewest_samples:
            raise ValueError(
                f"{self.path}.num_samples: {self.num_samples} is too few to compare rows by {self.method}. "
                f"Set {method.fewest_samples} or more."
            )
        given = [
            key for key in ("keep", "ratio", "num_layers", "num_units", "layers") if getattr(self, key) is not None
        ]
        if len(given) > 1:
            shown = " and ".join(f"{key}: {getattr(self, key)}" for key in given)
            raise ValueError(f"{self.path}: {shown} both say how much is kept. Keep one of them.")
        if read.flexora is not None and read.flexora.gate_lr == 0 and self.ratio != 1:
            raise ValueError(
                f"{FlexoraConfig.path}.gate_lr: 0 holds all gates at 0, so there would be nothing to choose by. Set it "
                "above 0, or keep everything with `ratio: 1`."
            )
        self.check_units(method)
        self.check_ranks(method)
        if self.candidates is not None:
            outside = sort_names(set(self.layers or []) - set(self.candidates))
            if outside:
                raise ValueError(
                    f"{self.path}.layers: {format_names(outside)} are not among candidates: "
                    f"{format_names(self.candidates)}. Add them there, or "
                    "remove candidates."
                )
            if (self.num_layers or 0) > len(self.candidates):
                raise ValueError(
                    f"{self.path}.num_layers: {self.num_layers} is more than the {len(self.candidates)} candidates."
                )
        return self

    def check_units(self, method: Method) -> None:
        """Raise ValueError for units that the method cannot choose among, or that are counted in layers."""
        granularity = self.granularity or method.units[0]
        if granularity not in method.units:
            raise ValueError(
                f"{self.path}.granularity: {granularity!r} is not for method {self.method}, which chooses among "
                f"{' or '.join(f'{unit}s' for unit in method.units)}. Use {list_methods_for(granularity)}, or leave "
                "the key out."
            )
        if granularity != "layer" and self.num_layers is not None:
            raise ValueError(
                f"{self.path}.num_layers: {self.num_layers} counts layers, but granularity: {granularity} chooses "
                f"{granularity}s. Use `num_units`, or `granularity: layer`."
            )
        if granularity == "layer" and self.num_units is not None:
            raise ValueError(
                f"{self.path}.num_units: {self.num_units} is for granularity group and module; layers are counted by "
                "`num_layers`."
            )

    def check_ranks(self, method: Method) -> None:
        """Raise ValueError for settings of rank that contradict each other or have no effect."""
        rank = self.rank_allocation or method.rank_allocation
        if rank == "score" and not method.needs_data:
            raise ValueError(
                f"{self.path}.rank_allocation: 'score' needs scores, and method {self.method} gives none. Use "
                "`match` or `same`."
            )
        bounds = IDLE_BOUNDS["same"] if self.rank_allocation is None else ()
        for key in ("budget", "budget_parameters", *bounds):
            if rank == "same" and getattr(self, key) is not None:
                asked = f"rank_allocation: {rank}"
                if self.rank_allocation is None:
                    asked += f", the default of method {self.method}"
                way_out = "`rank_allocation: match` or `score`" if method.needs_data else "`rank_allocation: match`"
                raise ValueError(
                    f"{self.path}.{key}: {getattr(self, key)} has no effect with {asked}. Set {way_out}, or remove the "
                    "key."
                )
        if self.budget is not None and self.budget_parameters is not None:
            raise ValueError(
                f"{self.path}.budget_parameters: {self.budget_parameters} and budget: {self.budget} both say what may "
                "be spent. Keep one of them."
            )
        if (self.min_rank or 0) > (self.max_rank or HIGHEST_RANK):
            raise ValueError(f"{self.path}.min_rank: {self.min_rank} is more than max_rank: {self.max_rank}.")

    def find_unread(self) -> dict[str, str]:
        # Not those that say how much is kept: without them another share would be.
        keys = {key for method in METHODS.values() for key in method.keys} - {"layers", "keep"}
        unread = {key: f"method: {self.method}" for key in sorted(keys - {*get_method(self.method).keys})}
        # Where the rank is not written, a bound is taken for a wish for different ranks, and refused.
        unread |= {key: f"rank_allocation: {self.rank_allocation}" for key in IDLE_BOUNDS.get(self.rank_allocation, ())}
        return {key: why for key, why in unread.items() if getattr(self, key) is not None}

    def resolve(self, run_seed: int) -> "ResolvedSelection":
        """Return the settings as they take effect; ``run_seed``: the seed where the block gives none."""
        method = get_method(self.method)
        ratio, keep, rank = self.ratio, self.keep, self.rank_allocation or method.rank_allocation
        if not any((ratio, keep, self.num_layers, self.num_units, self.layers)):
            if rank == "score":
                ratio = 1.0  # the scores themselves say what gets no rank
            elif "keep" in method.keys:
                keep = "positive"
            else:
                ratio = DEFAULT_RATIO
        return ResolvedSelection(
            method=self.method,
            ratio=ratio,
            num_layers=self.num_layers,
            num_units=self.num_units,
            layers=None if self.layers is None else sort_names(self.layers),
            granularity=self.granularity or method.units[0],
            rank_allocation=rank,
            budget=None if rank == "same" or self.budget_parameters else self.budget or DEFAULT_BUDGET,
            budget_parameters=self.budget_parameters,
            min_rank=(self.min_rank or 0) if rank == "score" else None,
            max_rank=self.max_rank,
            keep=keep,
            candidates=None if self.candidates is None else sort_names(self.candidates),
            unselected=self.unselected or DEFAULT_UNSELECTED,
            outside_layers=self.outside_layers or DEFAULT_OUTSIDE_LAYERS,
            stacks=self.stacks or DEFAULT_STACKS,
            num_samples=(self.num_samples or DEFAULT_NUM_SAMPLES) if "num_samples" in method.keys else None,
            token=(self.token or DEFAULT_TOKEN) if "token" in method.keys else None,
            seed=run_seed if self.seed is None else self.seed,
            flexora=(self.flexora or FlexoraConfig()).resolve() if "flexora" in method.keys else None,
        )


@dataclass(frozen=True)
class ResolvedSelection:
    """The settings of a selection as they take effect, None where one has none; see ``SelectionConfig``."""

    method: str
    ratio: float | None
    num_layers: int | None
    num_units: int | None
    layers: list[LayerName] | None
    granularity: str
    rank_allocation: str
    budget: float | None
    budget_parameters: int | None
    min_rank: int | None
    max_rank: int | None
    keep: Literal["positive"] | None
    candidates: list[LayerName] | None
    unselected: Unselected
    outside_layers: OutsideLayers
    stacks: str
    num_samples: int | None
    token: str | None
    seed: int
    flexora: Search | None


def list_methods_for(unit: str) -> str:
    """Return the names of the methods that choose among units of this kind, for messages."""
    return ", ".join(method.name for method in METHODS.values() if unit in method.units)


def check_file(data: Mapping[str, Any], settings: SelectionConfig) -> None:
    """Raise LayerselError for what in the rest of a YAML file does not go with ``layersel.selection``."""
    check_layers_to_transform(data, settings)
    check_initialisation(data)
    check_new_ranks(data, settings)
    check_dataset(data, settings)
    if settings.method == "flexora" and settings.plan is None:
        flexora.check_file(data, (settings.flexora or FlexoraConfig()).resolve())


def check_layers_to_transform(data: Mapping[str, Any], selection: SelectionConfig) -> None:
    """Raise LayerselError where ``peft_layers_to_transform`` leaves no room for the selection."""
    value = data.get("peft_layers_to_transform")
    allowed = as_whole_list(value if isinstance(value, list) else [value])
    if allowed is None:
        return
    for key in ("layers", "candidates"):
        outside = [name for name in sort_names(getattr(selection, key) or []) if split_name(name)[1] not in allowed]
        if outside:
            raise LayerselError(
                f"peft_layers_to_transform: {allowed} contradicts layersel.selection.{key}: layers "
                f"{format_names(outside)} would "
                "carry no LoRA. Remove peft_layers_to_transform (the plugin decides the layers), or add them to it."
            )
    if (selection.num_layers or 0) > len(allowed):
        raise LayerselError(
            f"peft_layers_to_transform: {allowed} contradicts layersel.selection.num_layers: "
            f"{selection.num_layers}. Remove peft_layers_to_transform, or lower num_layers."
        )


def check_new_ranks(data: Mapping[str, Any], selection: SelectionConfig) -> None:
    """Raise LayerselError where modules cannot be given other ranks than ``lora_r``."""
    rank, shards = selection.resolve(run_seed=0).rank_allocation, find_shards(data)
    if rank == "same":
        return
    if data.get("lora_rank_pattern"):
        raise LayerselError(
            f"lora_rank_pattern: {data['lora_rank_pattern']!r} contradicts layersel.selection.rank_allocation: {rank}, "
            "by which the plugin decides the ranks. Remove lora_rank_pattern, or set `rank_allocation: same`."
        )
    if selection.plan is not None:
        return
    check_redrawn(data.get("peft_init_lora_weights"), rank)
    if selection.method == "flexora" and shards:
        raise LayerselError(describe_sharded_ranks(rank, shards))


def find_budget(settings: ResolvedSelection, lora: int) -> int:
    """Return the budget in parameters, rounded down.

    Args:
        settings: they allocate rank, and so have a budget.
        lora: the parameters of LoRA with ``lora_r`` in all candidates.
    """
    if settings.budget_parameters is not None:
        return settings.budget_parameters
    assert settings.budget is not None, "settings that allocate rank have a budget"
    return int(settings.budget * lora + 1e-9)


def find_matched_room(selection: SelectionConfig, lora_r: int) -> int:
    """Return twice the rank by which the kept share spends the whole budget, as far as the block shows it, else 0.

    ``l1ra`` takes it for its room by default, so that modules that start alike can gain rank.
    """
    settings = selection.resolve(run_seed=0)
    if settings.rank_allocation != "match" or settings.ratio is None or settings.budget is None:
        return 0
    rank = math.ceil(settings.budget * lora_r / settings.ratio)
    return 2 * min(rank, MAX_RANK_FACTOR * lora_r)


def count_share(ratio: float, number: int) -> int:
    """Return how many of ``number`` a ratio keeps: floor(ratio × number + 1e-9), for 0.29 × 100 is 28.999…."""
    return math.floor(ratio * number + 1e-9)


def check_even_ranks(data: Mapping[str, Any], selection: SelectionConfig, room: int | None) -> None:
    """Raise LayerselError where ranks that are to follow scores are all equal, as the file alone shows.

    ``room``: the highest rank that ``layersel.l1ra`` has room for, None without it.
    """
    settings, lora_r = selection.resolve(run_seed=0), as_whole(data.get("lora_r"))
    if settings.rank_allocation != "score" or settings.ratio != 1 or selection.plan is not None or lora_r is None:
        return
    if settings.budget is not None:
        most = settings.max_rank or room or MAX_RANK_FACTOR * lora_r
        check_forced(get_method(settings.method), settings.budget * lora_r, settings.min_rank or 0, most)


def check_forced(method: Method, paid: float, least: int, most: int, step: float = 1e-9) -> None:
    """Raise LayerselError where the ranks that ``method`` gives are equal by force, whatever its scores are.

    Args:
        method: by whose scores ranks are given to all candidates.
        paid: the rank that the budget pays for in all of them.
        least: the rank that each gets.
        most: the highest rank.
        step: the share of a rank in all of them that the cheapest component takes.
    """
    way_out = f"so all ranks would be equal, whatever the scores of {method.name} are"
    # Other methods leave out what has the score 0.
    if method.rank_allocation == "score" and paid >= most:
        raise LayerselError(
            f"layersel.selection.budget: it pays for rank {paid:.4g} everywhere, which is max_rank: {most} or more, "
            f"{way_out}. "
            "Lower budget, raise max_rank, or use `rank_allocation: match`."
        )
    if least and paid - least < step:
        raise LayerselError(
            f"layersel.selection.min_rank: {least} everywhere takes the whole budget, which pays for rank {paid:.4g}, "
            f"{way_out}. Lower min_rank, raise budget, or use `rank_allocation: match`."
        )


def check_room(max_rank: int | None, room: int) -> None:
    """Raise LayerselError where a selection may give more rank than ``layersel.l1ra`` has ``room`` for."""
    if (max_rank or 0) > room:
        raise LayerselError(
            f"layersel.selection.max_rank: {max_rank} is more than the {room} that layersel.l1ra has room for. Lower "
            "it, or raise layersel.l1ra.max_rank."
        )


def describe_sharded_ranks(rank: str, engine: str) -> str:
    """Return the message for ranks that follow a search, on an engine that splits weights, by its name."""
    return (
        f"layersel.selection.rank_allocation: {rank!r} builds modules anew, which {SHARDED[engine]} does not allow "
        "after a search by flexora. Make the plan on one process with `axolotl-layersel plan --launcher python` and "
        "give it as `plan`, or use `rank_allocation: same`."
    )


def describe_generated(trainer: str, method: str) -> str:
    """Return the message for a method that looks at answers, and a trainer that has none yet, called so."""
    return (
        f"{trainer} trains on prompts whose answers are yet to be generated, and layersel.selection.method: {method!r} "
        f"looks at answers. Give a saved `plan`, or use one of the methods that need no data: {list_data_free()}."
    )


def check_dataset(data: Mapping[str, Any], selection: SelectionConfig) -> None:
    """Raise LayerselError where the method needs rows that cannot be drawn at random, or answers that no row has."""
    method = get_method(selection.method)
    if not method.needs_data or selection.plan is not None:
        return
    rl = read_choice(data, "rl")
    strided = as_mapping(data.get("ebft")).get("mode") == "strided"  # on texts, not on prompts
    if rl in GENERATING_TRAINERS and not strided:
        raise LayerselError(describe_generated(f"rl: {rl!r}", method.name))
    if method.reads == LABELS and data.get("reward_model"):
        raise LayerselError(
            f"reward_model: {data['reward_model']} learns from pairs of answers and has no labels, of which "
            f"layersel.selection.method: {method.name!r} needs the likelihood. Use `cka` or `cosine`."
        )
    streamed = next((key for key in ("streaming", "pretraining_dataset") if data.get(key)), None)
    if streamed:
        raise LayerselError(
            f"{streamed}: {data[streamed]!r} cannot be sampled for layersel.selection.method: "
            f"{selection.method!r}. Use a dataset that is loaded whole, give a saved `plan`, or one of the "
            f"methods that need no data: {list_data_free()}."
        )
