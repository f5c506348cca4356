"""``layersel.selection``: its settings, and the checks of the rest of the YAML file against them."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from axolotl_layersel.common.errors import LayerselError, find_fault
from axolotl_layersel.config import flexora as flexora
from axolotl_layersel.config.engines import LABELS as SHARDED
from axolotl_layersel.config.engines import find_shards
from axolotl_layersel.config.flexora import FlexoraConfig, Search
from axolotl_layersel.config.gate_requirements import GENERATING_TRAINERS
from axolotl_layersel.config.initialisation import check_redrawn, find_initialisation_faults
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
    settle,
)

# The values of `token` once the model is known. `ending`: the last token before the ending that nearly all rows share.
Token = Literal["cls", "mean", "last", "ending"]
TOKENS: dict[Token, str] = {
    "cls": "their first token",
    "mean": "the mean of their tokens",
    "last": "their last token",
    "ending": "the last token before the ending that nearly all of them share",
}
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
# Names of input embeddings in models of transformers.
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
# By the value of `rank_allocation`: the bounds of ranks that nothing reads.
IDLE_BOUNDS: dict[str | None, tuple[str, ...]] = {"same": ("max_rank", "min_rank"), "match": ("min_rank",)}


class SelectionConfig(Block):
    """``layersel.selection``: how layers are chosen, and what happens to the others."""

    path: ClassVar[str] = "layersel.selection"
    renamed: ClassVar[dict[str, str]] = {"rank": "rank_allocation", "towers": "outside_layers"}

    method: str = Field(description=f"How layers are chosen: {', '.join(METHODS)}.")
    ratio: float | None = Field(
        default=None,
        gt=0,
        le=1,
        examples=[DEFAULT_RATIO],
        description=f"Share of the candidates to choose, in (0, 1]. Default {DEFAULT_RATIO} (1 if there is only one "
        "candidate), unless `num_layers`, `num_units`, `layers` or `keep` is set, and 1 with `rank_allocation: score`.",
    )
    num_layers: int | None = Field(default=None, ge=1, description="Number of layers to choose, instead of `ratio`.")
    num_units: int | None = Field(
        default=None,
        ge=1,
        description="With `granularity: group` or `module`: number of units to choose, instead of `ratio`.",
    )
    time: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        examples=[0.75],
        description="With `method: gradient`: the longest time of a training step, as a share of plain LoRA's by the "
        "operations of matrix products. LoRA then trains from one layer upwards, and the gains of rank decide which. "
        "See [Ranks and budgets](ranks.md#a-limit-on-the-time-of-a-step).",
    )
    layers: list[LayerName] | None = Field(
        default=None,
        description="With `method: explicit`: the layers to choose, counted from 0; in a model with an encoder and a "
        "decoder `encoder.0`, `decoder.0` and so on.",
    )
    granularity: str | None = Field(
        default=None,
        description="The unit of the choice: `layer`, `group` (the attention or the MLP of a layer) or `module`. "
        "The default depends on the method.",
    )
    rank_allocation: RankAllocation | None = Field(
        default=None,
        description="How the chosen units get their ranks. `same`: `lora_r` each. `match`: one rank for all, as high "
        "as `budget` allows. `score`: more rank for a higher score. Default: `score` with `method: gradient`, `same` "
        "with the others.",
    )
    budget: float | None = Field(
        default=None,
        description="With `rank_allocation: match` or `score`: the budget of trainable parameters, as a multiple of "
        "those of LoRA with `lora_r` in all candidates. Default 1.",
    )
    budget_parameters: int | None = Field(
        default=None, ge=1, description="The budget as a number of parameters, instead of `budget`."
    )
    min_rank: int | None = Field(
        default=None,
        ge=0,
        le=HIGHEST_RANK,
        description="With `rank_allocation: score`: the lowest rank of a chosen unit. Default 0: units that gain "
        "nothing from rank get no adapter.",
    )
    max_rank: int | None = Field(
        default=None,
        ge=1,
        le=HIGHEST_RANK,
        description="With `rank_allocation: match` or `score`: the highest rank of a chosen unit. Default "
        f"{MAX_RANK_FACTOR} × lora_r, or with l1ra its `max_rank`.",
    )
    keep: Literal["positive"] | None = Field(
        default=None,
        description="With `method: flexora`: `positive` (default) chooses the units whose gate is above zero, instead "
        "of `ratio` or `num_layers`.",
    )
    candidates: list[LayerName] | None = Field(
        default=None,
        description="Layers that may be chosen, named as in `layers`. Default: every layer with LoRA, in the language "
        "model, in both the encoder and the decoder, or in the stacks that `stacks` names.",
    )
    unselected: Unselected | None = Field(
        default=None,
        description="What happens to the other layers. `remove` (default): they get no adapter. `freeze`: they keep "
        "it, but it does not train.",
    )
    outside_layers: OutsideLayers | None = Field(
        default=None,
        description="What happens to LoRA outside the stacks that are chosen from, such as in a vision tower or a "
        "projector. `keep` (default): it trains. `remove`: it is removed.",
    )
    stacks: Literal["language", "vision", "both"] | None = Field(
        default=None,
        description="In a multimodal model, the layers to choose from. `language` (default): those of the language "
        "model. `vision`: those of the vision tower; `outside_layers` then covers the language model. `both`: all.",
    )
    num_samples: int | None = Field(
        default=None,
        description=f"Number of training rows to compute scores from. Default {DEFAULT_NUM_SAMPLES}, or all rows of a "
        "smaller training set.",
    )
    token: Literal["auto", "last", "mean", "cls"] | None = Field(
        default=None,
        description="With `method: cka`: the token that represents a row. `last`, `cls` (the first), or `mean` (the "
        "mean of all tokens). `auto` (default): in a decoder, the last token before the ending that nearly all rows "
        "share, and rows without it are left out; in an encoder, the first token, or the mean if the model pools so "
        "or has a decoder too. A vision tower always takes the mean.",
    )
    seed: int | None = Field(
        default=None,
        ge=SEEDS.start,
        le=SEEDS.stop - 1,
        description="Seed of the drawn rows, of the search, or of `method: random`. Default: the run's seed.",
    )
    plan: str | None = Field(
        default=None, description="Path of a saved plan.json, which is checked and applied. Nothing is scored."
    )
    plan_check: Literal["error", "ignore"] | None = Field(
        default=None,
        description="What to do with a plan or a checkpoint that names another base model. `error` (default): refuse "
        "it. `ignore`: use it, for the same model under another name.",
    )
    flexora: FlexoraConfig | None = Field(
        default=None, description="Settings of the search of `method: flexora`. Default: all defaults."
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
            raise ValueError(f"{cls.path}.budget: 'parameters' is now written as 1, the default. Remove the key.")
        number = as_number(value)
        if number is not None and not 0 < number <= HIGHEST_BUDGET:
            raise ValueError(
                f"{cls.path}.budget: {quote(value)} is outside (0, {HIGHEST_BUDGET}]: it is a multiple of the "
                "parameters of LoRA with `lora_r` in all candidates. Set a multiple such as 0.5, or set "
                "`budget_parameters` to a number of parameters."
            )
        return value

    @field_validator("time", mode="before")
    @classmethod
    def check_time(cls, value: Any) -> Any:
        number = as_number(value)
        if number is not None and 1 < number < 100:
            raise ValueError(
                f"{cls.path}.time: {quote(value)} is outside (0, 1): it is a share of the time of plain LoRA's step. "
                f"Set {number / 100:g} for {number:g} %."
            )
        if number == 1:
            raise ValueError(
                f"{cls.path}.time: {quote(value)} allows a step as long as plain LoRA's. Remove the key, or set a "
                "value below 1, such as 0.75."
            )
        return value

    @field_validator("layers", "candidates")
    @classmethod
    def check_layers(cls, value: list[LayerName] | None, info: Any) -> list[LayerName] | None:
        if value is None:
            return None
        key = f"{cls.path}.{info.field_name}"
        if not value:
            raise ValueError(f"{key}: [] is empty. List at least one layer, counted from 0.")
        numbers = [layer for layer in value if isinstance(layer, int)]
        if numbers and len(numbers) < len(value):
            raise ValueError(
                f"{key}: {format_names(value)} mixes numbers, for a model with one stack of layers, and names such as "
                "encoder.0. Use either numbers or names."
            )
        negative = [layer for layer in numbers if layer < 0]
        if negative:
            raise ValueError(f"{key}: {negative} are negative. Layers are counted from 0, the lowest.")
        repeated = sort_names({layer for layer in value if value.count(layer) > 1})
        if repeated:
            raise ValueError(f"{key}: {format_names(repeated)} are listed more than once. List each layer once.")
        return value

    @model_validator(mode="after")
    def check_together(self, info: ValidationInfo) -> "SelectionConfig":
        settle(self.find_contradictions(), info)
        return self

    def find_contradictions(self) -> Iterator[str]:
        """Yield the contradictions between keys of the block."""
        if self.method == "explicit" and self.layers is None:
            yield f"{self.path}.layers is missing: method: explicit chooses the layers that it lists. Add it."
        if self.method != "explicit" and self.layers is not None:
            yield (
                f"{self.path}.layers: {self.layers} has no effect with method: {self.method}. "
                f"Set `method: explicit`, or `num_layers: {len(self.layers)}` to choose as many, or use `candidates` "
                "to limit the choice."
            )
        method, read = get_method(self.method), self.drop_unread()
        if self.keep is not None and "keep" not in method.keys:
            yield (
                f"{self.path}.keep: {self.keep} needs gates, but method: {self.method} has none. Use `ratio` or "
                "`num_layers` instead, or set `method: flexora`."
            )
        if read.stacks == "vision" and read.token in ("last", "cls"):
            yield (
                f"{self.path}.token: {self.token!r} has no effect with stacks: vision, where the mean of its patches "
                "represents a row. Remove the key, or set `token: mean`."
            )
        if read.num_samples is not None and read.num_samples < method.fewest_samples:
            yield (
                f"{self.path}.num_samples: {self.num_samples} is too few rows for method: {self.method}. "
                f"Set {method.fewest_samples} or more."
            )
        given = [
            key for key in ("keep", "ratio", "num_layers", "num_units", "layers") if getattr(self, key) is not None
        ]
        if len(given) > 1:
            shown = " and ".join(f"{key}: {getattr(self, key)}" for key in given)
            yield f"{self.path}: {shown} all set how many are chosen. Keep only one of these keys."
        if read.flexora is not None and read.flexora.gate_lr == 0 and self.ratio != 1:
            yield (
                f"{FlexoraConfig.path}.gate_lr: 0 holds all gates at 0, so they could not tell layers apart. Set it "
                "above 0, or choose everything with `ratio: 1`."
            )
        yield from self.find_unit_faults(method)
        yield from self.find_rank_faults(method)
        yield from self.find_time_faults(method)
        if self.candidates is not None:
            outside = sort_names(set(self.layers or []) - set(self.candidates))
            if outside:
                yield (
                    f"{self.path}.layers: {format_names(outside)} are not among candidates: "
                    f"{format_names(self.candidates)}. Add them to candidates, or remove candidates."
                )
            if (self.num_layers or 0) > len(self.candidates):
                yield (
                    f"{self.path}.num_layers: {self.num_layers} is more than the {len(self.candidates)} candidates. "
                    "Lower it, or add candidates."
                )

    def find_unit_faults(self, method: Method) -> Iterator[str]:
        """Yield why the method cannot choose units of this kind, and the wrong keys for their number."""
        granularity = self.granularity or method.units[0]
        if granularity not in method.units:
            yield (
                f"{self.path}.granularity: {granularity!r} is not available with method: {self.method}, which chooses "
                f"{' or '.join(f'{unit}s' for unit in method.units)}. Use {list_methods_for(granularity)}, or remove "
                "the key."
            )
        if granularity != "layer" and self.num_layers is not None:
            yield (
                f"{self.path}.num_layers: {self.num_layers} counts layers, but granularity: {granularity} chooses "
                f"{granularity}s. Use `num_units`, or `granularity: layer`."
            )
        if granularity == "layer" and self.num_units is not None:
            yield (
                f"{self.path}.num_units: {self.num_units} is for granularity group and module. Use `num_layers` for "
                "layers."
            )

    def find_rank_faults(self, method: Method) -> Iterator[str]:
        """Yield the settings of ranks that contradict each other or have no effect."""
        rank = self.rank_allocation or method.rank_allocation
        if rank == "score" and not method.needs_data:
            yield (
                f"{self.path}.rank_allocation: 'score' needs scores, but method: {self.method} computes none. Use "
                "`match` or `same`."
            )
        bounds = IDLE_BOUNDS["same"] if self.rank_allocation is None else ()
        for key in ("budget", "budget_parameters", *bounds):
            if rank == "same" and getattr(self, key) is not None:
                asked = f"rank_allocation: {rank}"
                if self.rank_allocation is None:
                    asked += f", the default of method: {self.method}"
                way_out = "`rank_allocation: match` or `score`" if method.needs_data else "`rank_allocation: match`"
                yield (
                    f"{self.path}.{key}: {getattr(self, key)} has no effect with {asked}. Set {way_out}, or remove the "
                    "key."
                )
        if self.budget is not None and self.budget_parameters is not None:
            yield (
                f"{self.path}.budget_parameters: {self.budget_parameters} and budget: {self.budget} both set the "
                "budget. Keep only one of them."
            )
        if (self.min_rank or 0) > (self.max_rank or HIGHEST_RANK):
            yield f"{self.path}.min_rank: {self.min_rank} is more than max_rank: {self.max_rank}. Lower it."

    def find_time_faults(self, method: Method) -> Iterator[str]:
        """Yield what contradicts a limit on the time of a step."""
        if self.time is None:
            return
        asked = f"{self.path}.time: {self.time}"
        if "time" not in method.keys:
            yield (
                f"{asked} weighs the gains of rank against time, and method: {self.method} measures no gains. Set "
                "`method: gradient`, or remove the key. `method: last` with `ratio` makes steps shorter too."
            )
            return
        for key in ("ratio", "num_layers", "num_units", "candidates"):
            value = getattr(self, key)
            if value is not None and (key, value) != ("ratio", 1):  # with ratio: 1, every layer may be chosen
                yield (
                    f"{asked} decides from which layer upwards LoRA trains, and {key}: {value} limits the same choice. "
                    "Keep only one of these keys."
                )
        if self.rank_allocation not in (None, "score"):
            yield (
                f"{asked} compares layers by the gains of their ranks, and rank_allocation: {self.rank_allocation} "
                "does not read the gains. Remove one of these keys."
            )
        if self.stacks not in (None, DEFAULT_STACKS):
            yield (
                f"{asked} is a limit for the layers of a language model, and stacks: {self.stacks} chooses among those "
                "of a vision tower, which run before them. Remove one of these keys."
            )

    def find_unread(self) -> dict[str, str]:
        # Not the keys that set how much is chosen: a run without them would choose a different number.
        keys = {key for method in METHODS.values() for key in method.keys} - {"layers", "keep", "time"}
        unread = {key: f"method: {self.method}" for key in sorted(keys - {*get_method(self.method).keys})}
        # Without `rank_allocation` in the file, bounds most likely ask for different ranks, so they are refused.
        unread |= {key: f"rank_allocation: {self.rank_allocation}" for key in IDLE_BOUNDS.get(self.rank_allocation, ())}
        return {key: why for key, why in unread.items() if getattr(self, key) is not None}

    def resolve(self, run_seed: int) -> "ResolvedSelection":
        """Return the settings with defaults filled in; ``run_seed`` is the default of ``seed``."""
        method = get_method(self.method)
        ratio, keep, rank = self.ratio, self.keep, self.rank_allocation or method.rank_allocation
        if not any((ratio, keep, self.num_layers, self.num_units, self.layers)):
            if rank == "score":
                ratio = 1.0  # the scores decide which units get no rank
            elif "keep" in method.keys:
                keep = "positive"
            else:
                ratio = DEFAULT_RATIO
        return ResolvedSelection(
            method=self.method,
            ratio=ratio,
            num_layers=self.num_layers,
            num_units=self.num_units,
            time=self.time,
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
    """The settings of a selection with defaults filled in; None for a setting that does not apply."""

    method: str
    ratio: float | None
    num_layers: int | None
    num_units: int | None
    time: float | None
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
    """Return the names of the methods that can choose units of this kind, for messages."""
    return ", ".join(method.name for method in METHODS.values() if unit in method.units)


def find_file_faults(data: Mapping[str, Any], settings: SelectionConfig) -> Iterator[str]:
    """Yield what conflicts with ``layersel.selection`` in the rest of a YAML file."""
    yield from find_layer_faults(data, settings)
    yield from find_initialisation_faults(data)
    yield from find_new_rank_faults(data, settings)
    yield from find_embedding_faults(data, settings)
    yield from find_dataset_faults(data, settings)
    if settings.method == "flexora" and settings.plan is None:
        yield from flexora.find_file_faults(data, (settings.flexora or FlexoraConfig()).resolve())


def find_layer_faults(data: Mapping[str, Any], selection: SelectionConfig) -> Iterator[str]:
    """Yield the keys that need layers which ``peft_layers_to_transform`` excludes."""
    value = data.get("peft_layers_to_transform")
    allowed = as_whole_list(value if isinstance(value, list) else [value])
    if allowed is None:
        return
    for key in ("layers", "candidates"):
        outside = [name for name in sort_names(getattr(selection, key) or []) if split_name(name)[1] not in allowed]
        if outside:
            yield (
                f"peft_layers_to_transform: {allowed} contradicts layersel.selection.{key}: layers "
                f"{format_names(outside)} would have no LoRA. Remove peft_layers_to_transform (the plugin chooses the "
                "layers), or add them to it."
            )
    if (selection.num_layers or 0) > len(allowed):
        yield (
            f"peft_layers_to_transform: {allowed} contradicts layersel.selection.num_layers: "
            f"{selection.num_layers}. Remove peft_layers_to_transform, or lower num_layers."
        )


def find_new_rank_faults(data: Mapping[str, Any], selection: SelectionConfig) -> Iterator[str]:
    """Yield why modules cannot get ranks other than ``lora_r``, if they need them."""
    rank, shards = selection.resolve(run_seed=0).rank_allocation, find_shards(data)
    if rank == "same":
        return
    if data.get("lora_rank_pattern"):
        yield (
            f"lora_rank_pattern: {data['lora_rank_pattern']!r} contradicts layersel.selection.rank_allocation: {rank}, "
            "with which the plugin sets the ranks. Remove lora_rank_pattern, or set `rank_allocation: same`."
        )
    if selection.plan is not None:
        return
    yield from find_fault(check_redrawn, data.get("peft_init_lora_weights"), rank)
    if selection.method == "flexora" and shards:
        yield describe_sharded_ranks(rank, shards)


def find_embedding_faults(data: Mapping[str, Any], selection: SelectionConfig) -> Iterator[str]:
    """Yield the keys that train input embeddings, so that no step could be shorter, if a step has a limit."""
    if selection.time is None or selection.plan is not None:
        return
    for key in ("lora_modules_to_save", "lora_target_modules"):
        value = data.get(key)
        values: list[Any] = value if isinstance(value, list) else [value]
        named = [value for value in values if isinstance(value, str) and value.rpartition(".")[2] in EMBEDDINGS]
        if named:
            yield describe_open_end(selection.time, f"{named[0]} in {key}", f"Remove it from {key}, or remove `time`.")


def describe_open_end(time: float, trained: str, way_out: str) -> str:
    """Return the message for a limit on the time of a step in a run that trains weights outside of the layers.

    Args:
        time: the limit.
        trained: the name of the weights.
        way_out: the advice.
    """
    return (
        f"layersel.selection.time: {time} cannot be reached while weights outside of the layers train ({trained}), "
        f"because every backward pass must go down to them. {way_out}"
    )


def describe_two_stacks(time: float, model: str) -> str:
    """Return the message for a limit on the time of a step in ``model``, which has an encoder and a decoder."""
    return (
        f"layersel.selection.time: {time} needs a model with one stack of layers, and {model} has an encoder and a "
        "decoder. Remove the key, or use `method: last` with `ratio`."
    )


def find_budget(settings: ResolvedSelection, lora: int) -> int:
    """Return the budget in parameters, rounded down.

    Args:
        settings: settings with a budget.
        lora: the number of parameters of LoRA with ``lora_r`` in all candidates.
    """
    if settings.budget_parameters is not None:
        return settings.budget_parameters
    assert settings.budget is not None, "settings that allocate rank have a budget"
    return int(settings.budget * lora + 1e-9)


def find_matched_room(selection: SelectionConfig, lora_r: int) -> int:
    """Return twice the rank at which the chosen share uses the whole budget; 0 if the block does not determine it.

    It is the default of ``max_rank`` of ``l1ra``, so that modules that start with equal ranks can gain rank. With a
    limit on the time of a step, which moves the budget to fewer layers, it is the highest rank without ``l1ra``.
    """
    settings = selection.resolve(run_seed=0)
    if settings.time is not None:
        return MAX_RANK_FACTOR * lora_r
    if settings.rank_allocation != "match" or settings.ratio is None or settings.budget is None:
        return 0
    rank = math.ceil(settings.budget * lora_r / settings.ratio)
    return 2 * min(rank, MAX_RANK_FACTOR * lora_r)


def count_share(ratio: float, number: int) -> int:
    """Return how many of ``number`` units a ratio chooses: floor(ratio × number + 1e-9), as 0.29 × 100 is 28.999…."""
    return math.floor(ratio * number + 1e-9)


def check_even_ranks(data: Mapping[str, Any], selection: SelectionConfig, room: int | None) -> None:
    """Raise LayerselError if the YAML file shows that ranks by score would all be equal.

    Args:
        data: the content of the YAML file.
        selection: its ``layersel.selection`` block.
        room: the highest rank that ``layersel.l1ra`` has room for; None without ``l1ra``.
    """
    settings, lora_r = selection.resolve(run_seed=0), as_whole(data.get("lora_r")) or 0
    if settings.rank_allocation != "score" or settings.ratio != 1 or selection.plan is not None or lora_r < 1:
        return
    if settings.budget is not None:
        most = settings.max_rank or room or MAX_RANK_FACTOR * lora_r
        check_forced(get_method(settings.method), settings.budget * lora_r, settings.min_rank or 0, most)


def check_forced(method: Method, paid: float, least: int, most: int, step: float = 1e-9) -> None:
    """Raise LayerselError if the budget and the bounds make all ranks equal, whatever the scores are.

    Args:
        method: the method whose scores set the ranks of all candidates.
        paid: the rank that the budget allows in every candidate.
        least: the lowest rank.
        most: the highest rank.
        step: the cost of the cheapest component, as a share of the cost of one rank in every candidate.
    """
    way_out = f"so all ranks would be equal, whatever the scores of {method.name} are"
    # With other methods units of score 0 get no rank, so the ranks of the others may differ.
    if method.rank_allocation == "score" and paid >= most:
        raise LayerselError(
            f"layersel.selection.budget: it allows rank {paid:.4g} in every unit, which is not below max_rank: {most}, "
            f"{way_out}. Lower budget, raise max_rank, or use `rank_allocation: match`."
        )
    if least and paid - least < step:
        raise LayerselError(
            f"layersel.selection.min_rank: {least} in every unit uses the whole budget, which allows rank {paid:.4g}, "
            f"{way_out}. Lower min_rank, raise budget, or use `rank_allocation: match`."
        )


def check_room(max_rank: int | None, room: int) -> None:
    """Raise LayerselError if a selection may give more rank than ``layersel.l1ra`` has ``room`` for."""
    if (max_rank or 0) > room:
        raise LayerselError(
            f"layersel.selection.max_rank: {max_rank} is more than {room}, the rank that layersel.l1ra has room "
            "for. Lower it, or raise layersel.l1ra.max_rank."
        )


def describe_sharded_ranks(rank: str, engine: str) -> str:
    """Return the message for ranks that are set after a search on ``engine``, which splits weights."""
    return (
        f"layersel.selection.rank_allocation: {rank!r} rebuilds modules, which {SHARDED[engine]} does not allow "
        "after a search by flexora. Make the plan on one process with `axolotl-layersel plan --launcher python` and "
        "set `plan` to its path, or use `rank_allocation: same`."
    )


def describe_generated(trainer: str, method: str) -> str:
    """Return the message for a method that reads answers, and a trainer that generates them later.

    Args:
        trainer: how the message calls the trainer.
        method: the name of the method.
    """
    return (
        f"{trainer} trains on prompts whose answers are not generated yet, but layersel.selection.method: {method!r} "
        f"reads answers. Set `plan` to a saved plan, or use one of the methods that need no data: {list_data_free()}."
    )


def find_dataset_faults(data: Mapping[str, Any], selection: SelectionConfig) -> Iterator[str]:
    """Yield why the method cannot sample rows, or has no answers, if it needs them."""
    method = get_method(selection.method)
    if not method.needs_data or selection.plan is not None:
        return
    rl = read_choice(data, "rl")
    strided = as_mapping(data.get("ebft")).get("mode") == "strided"  # on texts, not on prompts
    if rl in GENERATING_TRAINERS and not strided:
        yield describe_generated(f"rl: {rl!r}", method.name)
    if method.reads == LABELS and data.get("reward_model"):
        yield (
            f"reward_model: {data['reward_model']} learns from pairs of answers and has no labels, but "
            f"layersel.selection.method: {method.name!r} needs the likelihood of labels. Use `cka` or `cosine`."
        )
    streamed = next((key for key in ("streaming", "pretraining_dataset") if data.get(key)), None)
    if streamed:
        yield (
            f"{streamed}: {data[streamed]!r} cannot be sampled for layersel.selection.method: "
            f"{selection.method!r}. Use a dataset that is loaded whole, set `plan` to a saved plan, or use one of the "
            f"methods that need no data: {list_data_free()}."
        )


def describe_token(token: Token) -> str:
    """Return the token at which rows are compared, in words."""
    return TOKENS[token]
