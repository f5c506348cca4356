"""The plan: the layers that were chosen, the reasons, and the data."""

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from axolotl_layersel.config.layer_names import LayerName, Place
from axolotl_layersel.config.methods import METHODS
from axolotl_layersel.config.selection import (
    DEFAULT_STACKS,
    OutsideLayers,
    ResolvedSelection,
    SelectionConfig,
    Token,
    Unselected,
)

SCHEMA_VERSION: Final = 3
FILE = "plan.json"
# Numbers of parameters and ranks; no model has more.
Count = Annotated[int, Field(ge=0, lt=2**63)]
# Keys of JSON are text; those that are numbers are layers of a model with one list of layers.
Layer = Annotated[LayerName, Field(union_mode="left_to_right")]


class LayerChoice(BaseModel):
    """One layer, by its number or as ``encoder.3``. ``score`` is its importance (higher is kept), None without one."""

    model_config = ConfigDict(extra="forbid")

    layer: Layer
    score: FiniteFloat | None
    selected: bool


class Tower(BaseModel):
    """LoRA outside the layers, in one place of the model; ``trained`` counts the modules that train."""

    model_config = ConfigDict(extra="forbid")

    place: str
    modules: list[str]
    trained: Count


class Stability(BaseModel):
    """How far choices with several seeds agree."""

    model_config = ConfigDict(extra="forbid")

    selected: dict[int, list[Layer]] = Field(description="the layers chosen, by seed")
    overlap: FiniteFloat = Field(
        ge=0, le=1, description="mean Jaccard overlap of all pairs of choices of modules, weighted by rank"
    )


class Budget(BaseModel):
    """Trainable parameters in the layers: of LoRA with ``lora_r``, and of the ranks that were given."""

    model_config = ConfigDict(extra="forbid")

    lora: Count = Field(description="of LoRA with lora_r in all candidates")
    even: Count = Field(default=0, description="the part of spent that no gain above noise asked for")
    lora_r: Count | None = Field(default=None, description="of the run that made the plan; null in older plans")
    allowed: Count = Field(description="what the ranks could spend")
    spent: Count = Field(description="what they take")


class StepTime(BaseModel):
    """The time of a training step and the gain of its ranks, each as a share of those with ranks in all layers."""

    model_config = ConfigDict(extra="forbid")

    share: FiniteFloat = Field(gt=0, lt=1, description="operations of matrix products, as a share of plain LoRA's")
    gain: FiniteFloat | None = Field(
        ge=0,
        description="first-order gain of the ranks, as a share of that of ranks in all layers; null where no gain "
        "is above noise",
    )
    checkpointing: bool = Field(description="whether layers are computed again in the backward pass")
    tokens: FiniteFloat = Field(gt=0, description="the mean length of the calibration rows")


class Parameters(BaseModel):
    """LoRA parameters that train: without a selection, and with the plan. Weights that are not LoRA's do not count."""

    model_config = ConfigDict(extra="forbid")

    plain: Count = Field(description="of plain LoRA: in all modules that the run targets, with the ranks it sets")
    trained: Count = Field(description="with the plan; with l1ra, before rank moves")


class Plan(BaseModel):
    """The decision, and everything needed to check it against another run."""

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[3] = SCHEMA_VERSION
    method: str
    layers: list[LayerChoice]
    unselected: Unselected
    outside_layers: OutsideLayers = Field(default="keep", description="what became of LoRA outside of the layers")
    outside: list[Tower] = Field(
        default_factory=list,
        description="LoRA modules outside of the layers, before any were removed, by place in the base model",
    )
    unscored: dict[Layer, str] = Field(default_factory=dict, description="why a layer has no score, by layer")
    stack: Place = Field(
        description="where the layers are in the base model, such as model.layers; by side where there are several"
    )
    modules: list[str] = Field(description="LoRA modules that are kept in the layers, by their name in the base model")
    granularity: str = Field(default="layer", description="what was chosen among: layer, group or module")
    backward_end: Layer | None = Field(
        default=None,
        description="the lowest layer that the backward pass of the run reaches, the first one if it cannot be cut; "
        "null in older plans",
    )
    ranks: dict[str, int] = Field(
        default_factory=dict, description="the rank of every module that is kept; empty where all have lora_r"
    )
    scaling_exponent: FiniteFloat = Field(
        default=0, ge=0, le=1, description="how the scaling of a module follows its rank; 0 in older plans"
    )
    budget: Budget | None = Field(default=None, description="where ranks were given by one")
    step_time: StepTime | None = Field(default=None, description="where the setting `time` limits it")
    parameters: Parameters | None = Field(default=None, description="of the run; null in older plans")
    settings: dict[str, Any] = Field(description="the selection block that produced this plan")
    seed: int
    module_scores: dict[str, FiniteFloat | None] = Field(
        default_factory=dict,
        description="importance of the unit of every LoRA module, null where it has none, where units are not layers",
    )
    stability: Stability | None = Field(default=None, description="with `axolotl-layersel plan --repeat`")
    calibration_rows: list[int] = Field(
        description="rows of the training set (flexora with val_source eval: of the eval set) that were scored or "
        "validated on, in the order drawn"
    )
    rows_left_out: list[int] = Field(
        default_factory=list,
        description="rows that were drawn too, but lack the ending that the others share, or an "
        "image where a vision tower is scored",
    )
    token: Token | dict[str, Token] | None = Field(
        default=None,
        description="where rows were compared: what the setting `token` came to in this model, or in each of its sides",
    )
    dataset_fingerprint: str | None = Field(description="SHA-256 of the calibration rows' tokens and images")
    base_model: str | None
    base_shape: dict[str, int | str] | None = Field(
        default=None, description="what tells the base model from others of its name, from its configuration"
    )
    versions: dict[str, str]
    engine: str
    processes: Count
    seconds: FiniteFloat

    @property
    def selected(self) -> list[LayerName]:
        """The selected layers, in the order that they run."""
        return [choice.layer for choice in self.layers if choice.selected]

    @property
    def stacks(self) -> str:
        """The setting ``stacks``; plans made before this key existed have the default."""
        return self.settings.get("stacks") or DEFAULT_STACKS

    def resolve_settings(self) -> ResolvedSelection:
        """Return ``settings`` as they take effect; keys that are left out, or null, have their default.

        Raises:
            ValidationError: if a ``selection`` block cannot hold them.
        """
        given = {key: value for key, value in self.settings.items() if value is not None}
        method = METHODS.get(str(given.get("method")))
        if method is None or "seed" not in method.keys:
            given.pop("seed", None)  # every plan has a seed, and a block of this method must not
        return SelectionConfig.model_validate(given).resolve(run_seed=self.seed)

    @property
    def modules_outside(self) -> list[str]:
        """The LoRA modules outside the layers that are kept."""
        return [name for tower in self.outside for name in tower.modules] if self.outside_layers == "keep" else []
