"""The ``layersel`` block of an Axolotl YAML file, and what in the rest of the file contradicts it.

Axolotl merges ``LayerselArgs`` into its own schema. Only what is wrong whatever the command is refused
here: the same file also goes through ``preprocess``, ``evaluate``, ``inference`` and ``merge-lora``.
"""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from axolotl_layersel.block import Block, as_mapping, as_number, as_whole, as_whole_list, check_known, quote
from axolotl_layersel.initialisation import PLAIN, changes_base, explain_refusal, normalise

DATA_FREE_METHODS = ("random", "first", "last", "explicit")
SAMPLING_METHODS = ("cka", "cosine", "fisher")
METHODS = (*SAMPLING_METHODS, "flexora", *DATA_FREE_METHODS)
TOKENS = ("auto", "last", "mean", "cls")
UNSELECTED = ("remove", "freeze")
# What NumPy takes, which the Trainer seeds.
SEEDS = range(2**32)
DEFAULT_RATIO = 0.5
DEFAULT_NUM_SAMPLES = 128
DEFAULT_TOKEN = "auto"
DEFAULT_UNSELECTED = "remove"
TOWERS = ("keep", "remove")
DEFAULT_TOWERS = "keep"
KEEP = ("positive",)
PLAN_CHECKS = ("error", "ignore")

VALIDATION_SOURCES = ("train", "eval")
HYPERGRADIENTS = ("first_order", "unrolled")
GRANULARITIES = ("layer", "module")
# Code that can be differentiated once only: the second time autograd fails or takes what it saved for constants.
FUSED_PLUGINS = ("liger", "cut_cross_entropy", "kernels")
FUSED_ATTENTION = ("flash", "flex", "xformers", "sage")
FUSED_KEYS = ("tiled_mlp", "fused_attn_kernel", "large_head_attention", "gemma4_hybrid_attn_impl")

BUDGETS = ("rank", "parameters")
# No model has matrices with more rows and columns; room for such a rank would take all memory.
HIGHEST_RANK = 2**16
DEFAULT_GATE_LR = 0.02
# In a shorter run gates of that learning rate could not get from 1 to 0 and back: with `l1_lambda: auto` the pressure
# would exceed what any gradient can move a gate by, η a step, and all of them would end at 0.
SHORT_RUN = 200
# Optimizers whose moments are whole numbers of one tensor per weight; 8-bit ones share a scale between rows.
ADAM_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
# Trainers that hand the adapter to a generator while training.
GENERATING_TRAINERS = ("grpo", "gdpo", "ebft")

LORA_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
# What of a file decides how a run goes, and so must be the same on all ranks. Paths may differ from node to node; what
# lies there is compared itself.
AGREEING_KEYS = (
    *("adapter", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_linear"),
    *("lora_modules_to_save", "peft_layers_to_transform", "lora_rank_pattern", "lora_alpha_pattern"),
    *("peft_use_rslora", "peft_use_dora", "peft_init_lora_weights", "load_in_8bit", "load_in_4bit", "rl"),
    *("seed", "max_steps", "num_epochs", "micro_batch_size", "gradient_accumulation_steps", "sequence_len"),
    *("sample_packing", "learning_rate", "lr_scheduler", "warmup_steps", "warmup_ratio", "optimizer", "weight_decay"),
    *("max_grad_norm", "val_set_size", "save_steps", "save_strategy", "eval_steps", "eval_strategy"),
    *("load_best_model_at_end", "early_stopping_patience", "auto_resume_from_checkpoints", "gradient_checkpointing"),
    *("deepspeed", "fsdp", "fsdp_version", "fsdp_config", "bf16", "fp16"),
)
PARALLELISM = ("tensor_parallel_size", "context_parallel_size", "sequence_parallel_degree", "expert_parallel_size")


class FlexoraArgs(Block):
    """``layersel.selection.flexora``: the search that ``method: flexora`` makes."""

    path: ClassVar[str] = "layersel.selection.flexora"
    # Not the fields' own, so that a key that was left out contradicts no plan.
    defaults: ClassVar[dict[str, Any]] = {
        "steps": 200,
        "inner_steps": 1,
        "gate_lr": 0.01,
        "val_batches": 1,
        "val_source": "train",
        "val_samples": 200,
        "hypergradient": "first_order",
        "granularity": "layer",
    }

    steps: int | None = Field(default=None, description="Optimizer steps of the search. Default 200.")
    inner_steps: int | None = Field(default=None, description="K: LoRA steps between two gate steps. Default 1.")
    gate_lr: float | None = Field(
        default=None, description="Learning rate of the gates (Adam, constant). Default 0.01."
    )
    val_batches: int | None = Field(
        default=None, description="Validation micro-batches of a gate step, on every process. Default 1."
    )
    val_source: str | None = Field(
        default=None,
        description="Where validation rows are from. `train` (default): training rows, which the search does not train "
        "on; `eval`: the run's own eval set.",
    )
    val_samples: int | None = Field(
        default=None, description="Validation rows. Of a smaller eval set all are taken. Default 200."
    )
    hypergradient: str | None = Field(
        default=None,
        description="`first_order` (default): the gradient of the validation loss with the LoRA weights as they are; "
        "`unrolled`: exact through K LoRA steps made as SGD steps. Needs whole weights: one process, DDP, ZeRO-1 or 2.",
    )
    granularity: str | None = Field(
        default=None, description="A gate for each `layer` (default), or for each LoRA `module`."
    )
    patience: int | None = Field(
        default=None, description="Stop when what is kept has not changed for this many gate steps. Default: never."
    )

    @field_validator("val_source", "hypergradient", "granularity", mode="before")
    @classmethod
    def check_choice(cls, value: Any, info: Any) -> Any:
        known = {"val_source": VALIDATION_SOURCES, "hypergradient": HYPERGRADIENTS, "granularity": GRANULARITIES}
        return check_known(f"{cls.path}.{info.field_name}", value, known[info.field_name])

    @field_validator("steps", "inner_steps", "val_batches", "val_samples", "patience")
    @classmethod
    def check_count(cls, value: int | None, info: Any) -> int | None:
        if value is not None and value < 1:
            raise ValueError(f"{cls.path}.{info.field_name}: {value} is too few. Set 1 or more.")
        return value

    @field_validator("gate_lr")
    @classmethod
    def check_gate_lr(cls, value: float | None) -> float | None:
        if value is not None and value < 0:
            raise ValueError(f"{cls.path}.gate_lr: {value} is not a learning rate. Set 0 or more, such as 0.01.")
        return value

    @model_validator(mode="after")
    def check_steps(self) -> "FlexoraArgs":
        steps, inner_steps = (getattr(self, key) or self.defaults[key] for key in ("steps", "inner_steps"))
        if inner_steps > steps:
            raise ValueError(
                f"{self.path}.inner_steps: {inner_steps} is more than steps: {steps}, so no gate would ever "
                f"move. Set it to at most {steps}, or raise steps."
            )
        return self

    def resolve(self) -> "FlexoraArgs":
        """Return the settings as they take effect, defaults filled in."""
        return FlexoraArgs(**{**self.defaults, **self.model_dump(exclude_none=True)})


class SelectionArgs(Block):
    """``layersel.selection``: which layers keep their adapter."""

    path: ClassVar[str] = "layersel.selection"

    method: str = Field(description=f"How layers are chosen: {', '.join(METHODS)}.")
    ratio: float | None = Field(
        default=None,
        description=f"Share of the candidate layers that is kept, in (0, 1]. Default {DEFAULT_RATIO}, "
        "unless `num_layers` or `layers` is given; with flexora see `keep`.",
    )
    num_layers: int | None = Field(default=None, description="Number of layers kept, instead of `ratio`.")
    layers: list[int] | None = Field(default=None, description="With `method: explicit`: the layers kept, from 0.")
    keep: str | None = Field(
        default=None,
        description="flexora: `positive` (default) keeps what has a gate above zero, instead of `ratio` or "
        "`num_layers`.",
    )
    candidates: list[int] | None = Field(
        default=None,
        description="Layers that may be chosen. Default: every layer of the language model that carries LoRA.",
    )
    unselected: str | None = Field(
        default=None,
        description="`remove` (default): the other layers get no adapter; `freeze`: they keep it, untrained.",
    )
    towers: str | None = Field(
        default=None,
        description="LoRA outside of the language model's layers, such as in a vision tower, a projector or an encoder "
        "beside a decoder. `keep` (default): it stays and trains; `remove`: it gets no adapter.",
    )
    num_samples: int | None = Field(
        default=None, description=f"Training rows that the scores are computed from. Default {DEFAULT_NUM_SAMPLES}."
    )
    token: str | None = Field(
        default=None,
        description="cka: the token that stands for a row. `auto` (default): the last one before the ending that "
        "nearly all rows share (others are left out); `last`, `mean` (of the row's tokens), `cls` (the first).",
    )
    seed: int | None = Field(
        default=None, description="Seed of the calibration sample, or of the search. Default: the run's seed."
    )
    plan: str | None = Field(
        default=None, description="Path of a saved plan.json: it is checked and applied, nothing is scored."
    )
    plan_check: str | None = Field(
        default=None,
        description="What a plan, or a checkpoint, that was made for another base model is. `error` (default); "
        "`ignore`: it is applied, for a model that has another name only.",
    )
    flexora: FlexoraArgs | None = Field(
        default=None, description="The search of `method: flexora`, see below. Default: its defaults."
    )

    @field_validator("method", "token", "unselected", "towers", "keep", "plan_check", mode="before")
    @classmethod
    def check_choice(cls, value: Any, info: Any) -> Any:
        choices = {
            "method": METHODS,
            "token": TOKENS,
            "unselected": UNSELECTED,
            "towers": TOWERS,
            "keep": KEEP,
            "plan_check": PLAN_CHECKS,
        }
        return check_known(f"{cls.path}.{info.field_name}", value, choices[info.field_name])

    @field_validator("ratio")
    @classmethod
    def check_ratio(cls, value: float | None) -> float | None:
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{cls.path}.ratio: {value} is outside (0, 1]. Set the share to keep, such as 0.5.")
        return value

    @field_validator("num_layers")
    @classmethod
    def check_num_layers(cls, value: int | None) -> int | None:
        if value is not None and value < 1:
            raise ValueError(f"{cls.path}.num_layers: {value} keeps no layer. Set 1 or more.")
        return value

    @field_validator("seed")
    @classmethod
    def check_seed(cls, value: int | None) -> int | None:
        if value is not None and value not in SEEDS:
            raise ValueError(f"{cls.path}.seed: {value} is {describe_seeds()}")
        return value

    @field_validator("layers", "candidates")
    @classmethod
    def check_layers(cls, value: list[int] | None, info: Any) -> list[int] | None:
        if value is None:
            return None
        key = f"{cls.path}.{info.field_name}"
        if not value:
            raise ValueError(f"{key}: [] names no layer. List at least one, counted from 0.")
        negative = [layer for layer in value if layer < 0]
        if negative:
            raise ValueError(f"{key}: {negative} are negative. Layers are counted from 0, the lowest.")
        repeated = sorted({layer for layer in value if value.count(layer) > 1})
        if repeated:
            raise ValueError(f"{key}: {repeated} are listed more than once. List each layer once.")
        return value

    @model_validator(mode="after")
    def check_together(self) -> "SelectionArgs":
        if self.method == "explicit" and self.layers is None:
            raise ValueError(f"{self.path}.layers is missing: method explicit keeps just the layers listed there.")
        if self.method != "explicit" and self.layers is not None:
            raise ValueError(
                f"{self.path}.layers: {self.layers} has no effect with method {self.method}. "
                "Set `method: explicit`, or use `candidates` to limit the choice."
            )
        unused = {
            "token": self.method != "cka",
            "num_samples": self.method not in SAMPLING_METHODS,
            "keep": self.method != "flexora",
            "flexora": self.method != "flexora",
            "seed": self.method in DATA_FREE_METHODS and self.method != "random",
        }
        for key, is_unused in unused.items():
            if is_unused and getattr(self, key) is not None:
                value = getattr(self, key)
                shown = "the block" if isinstance(value, Block) else value
                raise ValueError(f"{self.path}.{key}: {shown} has no effect with method {self.method}. Remove the key.")
        # The CKA of two rows is always 1.
        fewest = 3 if self.method == "cka" else 2
        if self.num_samples is not None and self.num_samples < fewest:
            raise ValueError(
                f"{self.path}.num_samples: {self.num_samples} is too few to compare rows by {self.method}. "
                f"Set {fewest} or more."
            )
        given = [key for key in ("keep", "ratio", "num_layers", "layers") if getattr(self, key) is not None]
        if len(given) > 1:
            shown = " and ".join(f"{key}: {getattr(self, key)}" for key in given)
            raise ValueError(f"{self.path}: {shown} both say how many layers are kept. Keep one of them.")
        if self.flexora is not None and self.flexora.gate_lr == 0 and self.ratio != 1:
            raise ValueError(
                f"{FlexoraArgs.path}.gate_lr: 0 holds all gates at 0, so there would be nothing to choose by. Set it "
                "above 0, or keep everything with `ratio: 1`."
            )
        if self.flexora is not None and self.flexora.granularity == "module" and self.num_layers is not None:
            raise ValueError(
                f"{self.path}.num_layers: {self.num_layers} counts layers, but flexora.granularity: module chooses "
                "modules. Use `ratio`, the share of the modules, or `keep: positive`."
            )
        if self.candidates is not None:
            outside = sorted(set(self.layers or []) - set(self.candidates))
            if outside:
                raise ValueError(
                    f"{self.path}.layers: {outside} are not among candidates: {self.candidates}. Add them there, or "
                    "remove candidates."
                )
            if (self.num_layers or 0) > len(self.candidates):
                raise ValueError(
                    f"{self.path}.num_layers: {self.num_layers} is more than the {len(self.candidates)} candidates."
                )
        return self

    def resolve(self, run_seed: int) -> dict[str, Any]:
        """Return every setting but those of reusing a plan as it takes effect, defaults filled in; None where it has
        no effect.
        """
        values = self.model_dump(exclude={"plan", "plan_check"})
        if self.layers is not None:
            values["layers"] = sorted(self.layers)
        elif self.num_layers is None and self.ratio is None:
            if self.method == "flexora":
                values["keep"] = KEEP[0]
            else:
                values["ratio"] = DEFAULT_RATIO
        if self.method == "flexora":
            values["flexora"] = (self.flexora or FlexoraArgs()).resolve().model_dump()
        if self.candidates is not None:
            values["candidates"] = sorted(self.candidates)
        values["unselected"] = self.unselected or DEFAULT_UNSELECTED
        values["towers"] = self.towers or DEFAULT_TOWERS
        if self.method in SAMPLING_METHODS:
            values["num_samples"] = self.num_samples or DEFAULT_NUM_SAMPLES
        if self.method == "cka":
            values["token"] = self.token or DEFAULT_TOKEN
        values["seed"] = run_seed if self.seed is None else self.seed
        return values


class L1RAArgs(Block):
    """``layersel.l1ra``: how much rank each LoRA module gets while the model trains."""

    path: ClassVar[str] = "layersel.l1ra"

    max_rank: int | None = Field(
        default=None, description="The highest rank that a module can reach. Default: 2 × lora_r."
    )
    min_rank: int = Field(default=1, description="The rank that pruning leaves every module.")
    budget: str = Field(
        default="rank",
        description="`rank`: the sum of all ranks stays; `parameters`: the trainable parameters never grow.",
    )
    l1_lambda: float | str = Field(
        default="auto",
        description="λ, the pressure on the gates: `auto`, with which the pressure alone would take a gate to zero in "
        "a third of the run, or a number.",
    )
    gate_lr: float | None = Field(
        default=None,
        description=f"Learning rate of the gates, constant. Default {DEFAULT_GATE_LR}, and more in runs of fewer than "
        f"{SHORT_RUN} optimizer steps: {DEFAULT_GATE_LR} × {SHORT_RUN} / steps.",
    )
    update_ratio: float = Field(default=0.1, description="Share of the optimizer steps between two updates of rank.")
    warmup_ratio: float = Field(default=0.0, description="Share of the optimizer steps before the first update.")
    prune_threshold: float = Field(default=1e-10, description="An update prunes components with a gate below this.")
    reassign: bool = Field(default=True, description="false: pruned rank is not placed again, the adapter shrinks.")
    exclude_pruned: bool = Field(
        default=True, description="A module that lost rank in an update gains none in the same update."
    )

    @field_validator("budget", mode="before")
    @classmethod
    def check_budget(cls, value: Any) -> Any:
        return check_known(f"{cls.path}.budget", value, BUDGETS)

    @field_validator("l1_lambda", mode="before")
    @classmethod
    def check_lambda(cls, value: Any) -> Any:
        if value == "auto":
            return value
        number = as_number(value)
        if number is None or number < 0:
            raise ValueError(f"{cls.path}.l1_lambda: {quote(value)} is not `auto` or a number from 0. Set `auto`.")
        return number

    @field_validator("max_rank", "min_rank")
    @classmethod
    def check_rank(cls, value: int | None, info: Any) -> int | None:
        if value is not None and value < 1:
            raise ValueError(f"{cls.path}.{info.field_name}: {value} is no rank of a module. Set 1 or more.")
        if value is not None and value > HIGHEST_RANK:
            raise ValueError(
                f"{cls.path}.{info.field_name}: {value} is more than the rank of any weight. "
                f"Set {HIGHEST_RANK} or less."
            )
        return value

    @field_validator("gate_lr")
    @classmethod
    def check_gate_lr(cls, value: float | None) -> float | None:
        if value is not None and value < 0:
            raise ValueError(f"{cls.path}.gate_lr: {value} is not a learning rate. Set 0 or more, such as 0.02.")
        return value

    @field_validator("update_ratio")
    @classmethod
    def check_update_ratio(cls, value: float) -> float:
        if not 0 < value <= 1:
            raise ValueError(f"{cls.path}.update_ratio: {value} is outside (0, 1]. Set a share such as 0.1.")
        return value

    @field_validator("warmup_ratio")
    @classmethod
    def check_warmup_ratio(cls, value: float) -> float:
        if not 0 <= value < 1:
            raise ValueError(f"{cls.path}.warmup_ratio: {value} is outside [0, 1). Set a share such as 0.1.")
        return value

    @field_validator("prune_threshold")
    @classmethod
    def check_prune_threshold(cls, value: float) -> float:
        if not 0 < value < 1:
            raise ValueError(
                f"{cls.path}.prune_threshold: {value} is outside (0, 1): gates lie from 0 to 1, and only one below the "
                "threshold is pruned. Leave the key out."
            )
        return value

    @model_validator(mode="after")
    def check_ranks_and_gates(self) -> "L1RAArgs":
        if self.max_rank is not None and self.max_rank < self.min_rank:
            raise ValueError(f"{self.path}.max_rank: {self.max_rank} is less than min_rank: {self.min_rank}.")
        if self.gate_lr == 0 and self.l1_lambda != 0:
            raise ValueError(
                f"{self.path}.gate_lr: 0 holds the gates where they are, whatever l1_lambda: {self.l1_lambda} is. Set "
                "a gate_lr above 0; or, to train plain LoRA on purpose, `l1_lambda: 0` too."
            )
        return self


class LayerselBlock(Block):
    """``layersel``: the settings of this plugin."""

    path: ClassVar[str] = "layersel"

    selection: SelectionArgs | None = Field(
        default=None, description="Choose the layers that get an adapter, before training."
    )
    l1ra: L1RAArgs | None = Field(
        default=None, description="Move rank to the modules that use it, during training. `{}` for the defaults."
    )

    @model_validator(mode="after")
    def check_parts(self) -> "LayerselBlock":
        if self.selection is None and self.l1ra is None:
            raise ValueError(
                "layersel: the block is empty, so it would do nothing. Add `selection`, `l1ra` (`l1ra: {}` "
                "for its defaults), or both."
            )
        return self


class LayerselArgs(BaseModel):
    """What Axolotl's schema gains when the plugin is listed."""

    layersel: LayerselBlock | None = Field(default=None, description="Which layers get LoRA, and how much rank.")

    @model_validator(mode="before")
    @classmethod
    def check_run(cls, data: Any) -> Any:
        """Refuse what the plugin cannot honour in the rest of the file.

        Raises:
            ValueError: with the key, its value and the way out.
        """
        # Axolotl keeps the plugins of earlier files in one process: judge only files that list this one.
        if not isinstance(data, Mapping) or not any("axolotl_layersel" in name for name in list_plugins(data)):
            return data
        if data.get("layersel") is None:
            raise ValueError(missing_block(data))
        check_adapter(data)
        check_engine(data)
        check_seed(data)
        try:
            block = LayerselBlock.model_validate(data["layersel"])
        except ValidationError:
            return data  # the field itself will say it
        if block.l1ra:
            check_ranks(data, block.l1ra)
            check_plain_lora(data, "layersel.l1ra")
            check_optimizer(data)
        if block.selection:
            check_layers_to_transform(data, block.selection)
            check_initialisation(data)
            check_dataset(data, block.selection)
            if block.selection.method == "flexora" and block.selection.plan is None:
                check_plain_lora(data, "layersel.selection.method: flexora")
                check_search(data, block.selection.flexora or FlexoraArgs())
        return data


# Axolotl refuses values of a wrong type in most of the keys that are read below: those pass here.


def list_plugins(data: Mapping[str, Any]) -> list[str]:
    """Return the names under ``plugins``."""
    plugins = data.get("plugins")
    return [name for name in plugins if isinstance(name, str)] if isinstance(plugins, list) else []


def missing_block(data: Mapping[str, Any]) -> str:
    """Return the message for a file that lists the plugin without its block."""
    near = difflib.get_close_matches("layersel", set(map(str, data)) - {"layersel"}, n=1)
    if near:
        return f"{near[0]}: is not a setting, and the plugin finds no `layersel` block. Rename the key to `layersel`."
    return (
        "layersel: the plugin is listed but its block is missing or empty, so it would do nothing. Add\n"
        "layersel:\n  selection:\n    method: cka\n    ratio: 0.5\nor `l1ra: {}`, "
        "or remove axolotl_layersel from `plugins`."
    )


def check_adapter(data: Mapping[str, Any]) -> None:
    """Raise ValueError unless the run trains LoRA in a way that layers can be left out of."""
    adapter = data.get("adapter")
    if adapter not in ("lora", "qlora"):
        raise ValueError(
            f"adapter: {adapter!r} has no LoRA layers to choose from (full fine-tuning is not supported). "
            "Set `adapter: lora` or `adapter: qlora`, or remove axolotl_layersel from `plugins`."
        )
    if data.get("lora_r") is not None and (as_whole(data["lora_r"]) or 0) < 1:
        raise ValueError(f"lora_r: {quote(data['lora_r'])} is no rank that LoRA can have. Set 1 or more, such as 16.")
    if data.get("relora") or data.get("relora_steps"):
        key = "relora" if data.get("relora") else "relora_steps"
        raise ValueError(
            f"{key}: {data[key]!r} merges and restarts the adapter, which the plugin does not support. Remove {key}."
        )
    if data.get("lora_target_parameters"):
        raise ValueError(
            f"lora_target_parameters: {data['lora_target_parameters']!r} puts LoRA on expert parameters, which cannot "
            "be selected by layer yet. Use `lora_target_modules`."
        )


def check_engine(data: Mapping[str, Any]) -> None:
    """Raise ValueError for a way of distributing the model that the plugin does not support."""
    for key in PARALLELISM:
        value = as_whole(data.get(key))
        if value is None and data.get(key) is not None:
            raise ValueError(f"{key}: {quote(data[key])} is not a whole number. Set it to 1.")
        if value is not None and value > 1:
            raise ValueError(f"{key}: {value} splits layers over devices, which is not supported. Set it to 1.")
    fsdp_config = data.get("fsdp_config") or {}
    if not isinstance(fsdp_config, Mapping):
        raise ValueError(
            f"fsdp_config: {quote(fsdp_config)} is not a mapping. Write its keys on lines of their own below it."
        )
    if data.get("fsdp") or fsdp_config:
        version = data.get("fsdp_version") or fsdp_config.get("fsdp_version") or fsdp_config.get("version")
        if str(version) != "2":
            raise ValueError(f"fsdp_version: {version!r} is not supported by the plugin. Set `fsdp_version: 2`.")
        if fsdp_config.get("activation_checkpointing"):
            # Its wrappers enter the names under which Axolotl saves the adapter at the end, which PEFT then ignores.
            raise ValueError(
                "fsdp_config.activation_checkpointing: true would make the saved adapter unreadable for PEFT. "
                "Set it to false and use `gradient_checkpointing: true`."
            )


def check_seed(data: Mapping[str, Any]) -> None:
    """Raise ValueError for a seed of the run that the Trainer cannot use, which it would notice late."""
    seed = as_whole(data.get("seed"))
    if seed is not None and seed not in SEEDS:
        raise ValueError(f"seed: {seed} is {describe_seeds()}")


def describe_seeds() -> str:
    """Return the end of the message for a seed that is none."""
    return f"outside of {SEEDS.start} to {SEEDS.stop - 1}, the seeds that NumPy takes. Set one of these."


def check_ranks(data: Mapping[str, Any], l1ra: L1RAArgs) -> None:
    """Raise ValueError where the ranks of ``layersel.l1ra`` do not go with ``lora_r``."""
    rank = as_whole(data.get("lora_r"))
    if rank is None:
        raise ValueError("lora_r: None is no rank that layersel.l1ra could start from. Set `lora_r`, such as 16.")
    alpha = data.get("lora_alpha")
    if as_number(alpha) is None:
        raise ValueError(
            f"lora_alpha: {quote(alpha)} is no number that a scaling could come from. Set it, such as {rank}."
        )
    if l1ra.max_rank is not None and l1ra.max_rank < rank:
        raise ValueError(
            f"layersel.l1ra.max_rank: {l1ra.max_rank} is less than lora_r: {rank}, with which modules start. Set "
            f"{rank} or more, or leave it out for {2 * rank}."
        )
    if l1ra.min_rank > rank:
        raise ValueError(
            f"layersel.l1ra.min_rank: {l1ra.min_rank} is more than lora_r: {rank}, with which modules start. Set "
            f"{rank} or less."
        )


def check_plain_lora(data: Mapping[str, Any], setting: str) -> None:
    """Raise ValueError for what would make gates on LoRA wrong; ``setting`` is the key that puts them there."""
    if data.get("peft_use_dora"):
        raise ValueError(
            f"peft_use_dora: true. DoRA ties its magnitudes to the whole adapter, of which {setting} cannot gate "
            "parts. Remove peft_use_dora."
        )
    if normalise(data.get("peft_init_lora_weights")) not in PLAIN:
        raise ValueError(
            f"peft_init_lora_weights: {data['peft_init_lora_weights']!r} is not supported by {setting}, whose gates "
            "need an adapter that starts from nothing. Remove it, or use `gaussian`."
        )
    check_loftq(data)
    if data.get("fp16") and data["fp16"] != "auto":
        raise ValueError(
            f"fp16: {data['fp16']!r} scales the loss, and with it the gradients of the gates of {setting}. "
            "Set `bf16: true` instead."
        )
    if data.get("auto_find_batch_size"):
        raise ValueError(f"auto_find_batch_size: true starts training over, which {setting} does not support.")
    rl = getattr(data.get("rl"), "value", data.get("rl"))
    if rl in GENERATING_TRAINERS or as_mapping(data.get("trl")).get("use_vllm"):
        raise ValueError(
            f"rl: {rl!r} generates text from a merged copy of the adapter that knows nothing of the gates of "
            f"{setting}. Use another method of `selection` alone with it."
        )


def check_optimizer(data: Mapping[str, Any]) -> None:
    """Raise ValueError for an optimizer whose moments rank cannot move with."""
    optimizer = data.get("optimizer")
    name = getattr(optimizer, "value", optimizer)
    if name is not None and name not in ADAM_OPTIMIZERS:
        raise ValueError(
            f"optimizer: {name!r} is not supported by layersel.l1ra, which clears the Adam moments of the components "
            "that it moves: 8-bit and paged ones share them between components, others have none. "
            f"Use {' or '.join(f'`{known}`' for known in ADAM_OPTIMIZERS)}."
        )


def check_search(data: Mapping[str, Any], search: FlexoraArgs) -> None:
    """Raise ValueError where a Flexora search cannot be made in this run."""
    if search.val_source == "eval" and not (data.get("val_set_size") or data.get("test_datasets")):
        raise ValueError(
            f"{FlexoraArgs.path}.val_source: 'eval' needs an eval set, and this run has none. Set `val_set_size` or "
            "`test_datasets`, or use `val_source: train`."
        )
    if search.hypergradient != "unrolled":
        return
    key = f"{FlexoraArgs.path}.hypergradient"
    fused = next((name for name in list_plugins(data) if any(part in name.lower() for part in FUSED_PLUGINS)), None)
    if fused:
        raise ValueError(
            f"{key}: 'unrolled' differentiates twice, which the fused code of the plugin {fused} does not support. "
            "Remove that plugin, or use `first_order`."
        )
    attention = [f"{name}_attention" for name in FUSED_ATTENTION if data.get(f"{name}_attention")]
    implementation = str(data.get("attn_implementation") or "")
    if attention or any(part in implementation for part in FUSED_ATTENTION):
        raise ValueError(
            f"{key}: 'unrolled' differentiates twice, which {attention[0] if attention else implementation} does not "
            "support. Use `attn_implementation: sdpa` or `eager`, or `hypergradient: first_order`."
        )
    fused = next((name for name in FUSED_KEYS if data.get(name)), None)
    if fused:
        raise ValueError(
            f"{key}: 'unrolled' differentiates twice, which {fused}: {data[fused]} does not support. Remove {fused}, "
            "or use `first_order`."
        )
    # Axolotl routes packed rows through a kernel of its own on GPUs, unless it is told not to.
    if data.get("sample_packing") and implementation != "eager" and data.get("sdpa_varlen") is not False:
        raise ValueError(
            f"{key}: 'unrolled' differentiates twice, which the attention kernel for packed rows does not support, and "
            "sample_packing is on. Set `sdpa_varlen: false`, or use `first_order`."
        )
    several = next((name for name in ("loraplus_lr_ratio", "lr_groups") if data.get(name)), None)
    if several:
        raise ValueError(
            f"{key}: 'unrolled' makes the LoRA steps with one learning rate, and {several}: {data[several]} sets "
            f"several. Remove {several}, or use `first_order`."
        )
    if data.get("fsdp") or data.get("fsdp_config") or find_zero_stage(data.get("deepspeed")) == 3:
        raise ValueError(describe_sharded("FSDP2" if not data.get("deepspeed") else "ZeRO-3"))


def describe_sharded(engine: str) -> str:
    """Return the message for an unrolled gradient on an engine that splits weights."""
    return (
        f"{FlexoraArgs.path}.hypergradient: 'unrolled' needs the LoRA weights whole on every process, and {engine} "
        "splits them. Use `first_order`, or one process, DDP, ZeRO-1 or ZeRO-2."
    )


def find_zero_stage(deepspeed: Any) -> int | None:
    """Return the ZeRO stage of the ``deepspeed`` key, a file's path or its content; None where it is not to be seen."""
    try:
        content = deepspeed if isinstance(deepspeed, Mapping) else json.loads(Path(str(deepspeed)).read_text())
        return int(content["zero_optimization"]["stage"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None  # Axolotl itself says what is wrong with the file


def check_initialisation(data: Mapping[str, Any]) -> None:
    """Raise ValueError for initial LoRA weights that layers cannot be selected under."""
    if data.get("lora_model_dir"):
        return  # With an adapter to continue Axolotl does not look at these keys.
    check_loftq(data)
    initial = data.get("peft_init_lora_weights")
    refusal = explain_refusal(initial)
    if refusal:
        raise ValueError(refusal)
    lacking = None
    if find_zero_stage(data.get("deepspeed")) == 3:
        lacking = "ZeRO-3 has split before PEFT sees them. Use ZeRO-2"
    elif as_mapping(data.get("fsdp_config")).get("cpu_ram_efficient_loading"):
        lacking = "fsdp_config.cpu_ram_efficient_loading loads on one process alone. Set it to false"
    if changes_base(initial) and lacking:
        raise ValueError(
            f"peft_init_lora_weights: {initial!r} is computed on every process from the base weights, which {lacking}, "
            "or another initialisation such as `gaussian`."
        )


def check_loftq(data: Mapping[str, Any]) -> None:
    """Raise ValueError where LoftQ is asked for by its own block."""
    if as_mapping(data.get("peft")).get("loftq_config"):
        raise ValueError("peft.loftq_config: LoftQ changes the base to match LoRA, and is not supported. Remove it.")


def check_layers_to_transform(data: Mapping[str, Any], selection: SelectionArgs) -> None:
    """Raise ValueError where ``peft_layers_to_transform`` leaves no room for the selection."""
    value = data.get("peft_layers_to_transform")
    allowed = as_whole_list(value if isinstance(value, list) else [value])
    if allowed is None:
        return
    for key in ("layers", "candidates"):
        outside = sorted(set(getattr(selection, key) or []) - set(allowed))
        if outside:
            raise ValueError(
                f"peft_layers_to_transform: {allowed} contradicts layersel.selection.{key}: layers {outside} would "
                "carry no LoRA. Remove peft_layers_to_transform (the plugin decides the layers), or add them to it."
            )
    if (selection.num_layers or 0) > len(allowed):
        raise ValueError(
            f"peft_layers_to_transform: {allowed} contradicts layersel.selection.num_layers: "
            f"{selection.num_layers}. Remove peft_layers_to_transform, or lower num_layers."
        )


def check_dataset(data: Mapping[str, Any], selection: SelectionArgs) -> None:
    """Raise ValueError where the method needs rows that cannot be drawn at random, or answers that no row has."""
    if selection.method in DATA_FREE_METHODS or selection.plan is not None:
        return
    rl = getattr(data.get("rl"), "value", data.get("rl"))
    strided = as_mapping(data.get("ebft")).get("mode") == "strided"  # on texts, not on prompts
    if selection.method in SAMPLING_METHODS and rl in GENERATING_TRAINERS and not strided:
        raise ValueError(
            f"rl: {rl!r} trains on prompts whose answers are yet to be generated, and layersel.selection.method: "
            f"{selection.method!r} scores layers on answers. Give a saved `plan`, or use one of the methods that need "
            f"no data: {', '.join(DATA_FREE_METHODS)}."
        )
    if selection.method == "fisher" and data.get("reward_model"):
        raise ValueError(
            f"reward_model: {data['reward_model']} learns from pairs of answers and has no labels, of which "
            "layersel.selection.method: 'fisher' needs the likelihood. Use `cka` or `cosine`."
        )
    streamed = next((key for key in ("streaming", "pretraining_dataset") if data.get(key)), None)
    if streamed:
        raise ValueError(
            f"{streamed}: {data[streamed]!r} cannot be sampled for layersel.selection.method: "
            f"{selection.method!r}. Use a dataset that is loaded whole, give a saved `plan`, or one of the "
            f"methods that need no data: {', '.join(DATA_FREE_METHODS)}."
        )
