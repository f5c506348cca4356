"""``layersel.selection.flexora``: its settings, and the checks of the rest of the YAML file against them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, model_validator

from axolotl_layersel.common.errors import LayerselError, find_fault
from axolotl_layersel.config.engines import LABELS, find_shards
from axolotl_layersel.config.gate_requirements import find_gated_file_faults
from axolotl_layersel.config.strict_block import Block, list_plugins, settle

SETTING = "layersel.selection.method: flexora"
# Code that autograd cannot differentiate twice: it fails, or treats saved tensors of the first pass as constants.
FUSED_PLUGINS = ("liger", "cut_cross_entropy", "kernels")
FUSED_ATTENTION = ("flash", "flex", "xformers", "sage")
FUSED_KEYS = ("tiled_mlp", "fused_attn_kernel", "large_head_attention", "gemma4_hybrid_attn_impl")


@dataclass(frozen=True)
class Search:
    """The settings of a search with defaults filled in; ``FlexoraConfig`` describes each."""

    steps: int = 200
    inner_steps: int = 1
    gate_lr: float = 0.01
    val_batches: int = 1
    val_source: str = "train"
    val_samples: int = 200
    hypergradient: str = "first_order"
    patience: int | None = None


class FlexoraConfig(Block):
    """``layersel.selection.flexora``: settings of the search of ``method: flexora``."""

    path: ClassVar[str] = "layersel.selection.flexora"
    steps: int | None = Field(default=None, ge=1, description="Optimizer steps of the search. Default 200.")
    inner_steps: int | None = Field(
        default=None, ge=1, description="K, the LoRA steps between two gate steps. Default 1."
    )
    gate_lr: float | None = Field(
        default=None, ge=0, examples=[0.01], description="Constant learning rate of the gates, for Adam. Default 0.01."
    )
    val_batches: int | None = Field(
        default=None, ge=1, description="Validation micro-batches per gate step and process. Default 1."
    )
    val_source: Literal["train", "eval"] | None = Field(
        default=None,
        description="Source of the validation rows. `train` (default): training rows that the search does not train "
        "on. `eval`: the run's eval set.",
    )
    val_samples: int | None = Field(
        default=None,
        ge=1,
        description="Number of validation rows; a smaller eval set is used whole. Default 200, but at most a third of "
        "the training rows that have labels.",
    )
    hypergradient: Literal["first_order", "unrolled"] | None = Field(
        default=None,
        description="`first_order` (default): the gradient of the validation loss, with the LoRA weights held "
        "constant. `unrolled`: the exact gradient through K LoRA steps of SGD. It needs whole weights: one process, "
        "DDP, ZeRO-1 or ZeRO-2.",
    )
    patience: int | None = Field(
        default=None,
        ge=1,
        description="Stop when the choice has not changed for this many gate steps. Default: never.",
    )

    @model_validator(mode="after")
    def check_together(self, info: ValidationInfo) -> "FlexoraConfig":
        settle(self.find_contradictions(), info)
        return self

    def find_contradictions(self) -> Iterator[str]:
        """Yield the contradictions between keys of the block."""
        search = self.resolve()
        if search.inner_steps > search.steps:
            yield (
                f"{self.path}.inner_steps: {search.inner_steps} is more than steps: {search.steps}, so no gate would "
                f"move. Set it to at most {search.steps}, or raise steps."
            )

    def find_unread(self) -> dict[str, str]:
        gate_steps = self.resolve().steps // self.resolve().inner_steps
        # The first gate step makes a choice to compare with, and the search ends after the last one anyway.
        never = self.patience is not None and self.patience >= gate_steps - 1
        return {"patience": f"{gate_steps} gate steps in total"} if never else {}

    def resolve(self) -> Search:
        """Return the settings with defaults filled in."""
        return Search(**self.model_dump(exclude_none=True))


def find_file_faults(data: Mapping[str, Any], search: Search) -> Iterator[str]:
    """Yield what conflicts with a search in the rest of a YAML file."""
    yield from find_gated_file_faults(data, SETTING)
    if search.val_source == "eval" and not (data.get("val_set_size") or data.get("test_datasets")):
        yield describe_missing_eval_set()
    if search.hypergradient != "unrolled":
        return
    key = f"{FlexoraConfig.path}.hypergradient"
    fused = next((name for name in list_plugins(data) if any(part in name.lower() for part in FUSED_PLUGINS)), None)
    if fused:
        yield (
            f"{key}: 'unrolled' differentiates twice, which the fused code of the plugin {fused} does not support. "
            "Remove that plugin, or use `first_order`."
        )
    implementation = str(data.get("attn_implementation") or "")
    named = next((f"{name}_attention" for name in FUSED_ATTENTION if data.get(f"{name}_attention")), None)
    yield from find_fault(check_attention, named or implementation)
    fused = next((name for name in FUSED_KEYS if data.get(name)), None)
    if fused:
        yield (
            f"{key}: 'unrolled' differentiates twice, which {fused}: {data[fused]} does not support. Remove {fused}, "
            "or use `first_order`."
        )
    # On GPUs Axolotl computes packed rows with a kernel of its own, unless `sdpa_varlen` is false.
    if data.get("sample_packing") and implementation != "eager" and data.get("sdpa_varlen") is not False:
        yield (
            f"{key}: 'unrolled' differentiates twice, which the attention kernel for packed rows does not support, and "
            "sample_packing is on. Set `sdpa_varlen: false`, or use `first_order`."
        )
    several = next((name for name in ("loraplus_lr_ratio", "lr_groups") if data.get(name)), None)
    if several:
        yield (
            f"{key}: 'unrolled' takes LoRA steps with one learning rate, but {several}: {data[several]} sets "
            f"several. Remove {several}, or use `first_order`."
        )
    shards = find_shards(data)
    if shards:
        yield describe_sharded(shards)


def check_attention(implementation: str) -> None:
    """Raise LayerselError for an attention implementation that cannot be differentiated twice."""
    if any(part in implementation for part in FUSED_ATTENTION):
        raise LayerselError(
            f"{FlexoraConfig.path}.hypergradient: 'unrolled' differentiates twice, which {implementation} does not "
            "support. Use `attn_implementation: sdpa` or `eager`, or `hypergradient: first_order`."
        )


def describe_missing_eval_set() -> str:
    """Return the message for a search on the eval set of a run without one."""
    return (
        f"{FlexoraConfig.path}.val_source: 'eval' needs an eval set, but this run has none. Set `val_set_size` or "
        "`test_datasets`, or use `val_source: train`."
    )


def describe_sharded(engine: str) -> str:
    """Return the message for an unrolled gradient on ``engine``, which splits weights."""
    return (
        f"{FlexoraConfig.path}.hypergradient: 'unrolled' needs whole LoRA weights on every process, but "
        f"{LABELS[engine]} splits them. Use `first_order`, or one process, DDP, ZeRO-1 or ZeRO-2."
    )
