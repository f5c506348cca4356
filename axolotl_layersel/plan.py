"""The plan: which layers were chosen, why, and on what. Read, checked and written here."""

import json
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from axolotl_layersel.errors import LayerselError
from axolotl_layersel.files import FOLDER, read_json, refuse, write_atomically
from axolotl_layersel.layer_names import LayerName, Place, find_layer
from axolotl_layersel.plan_checks import enumerate_faults, list_contradictions, list_problems
from axolotl_layersel.selection.args import (
    DEFAULT_STACKS,
    ResolvedSelection,
    SelectionArgs,
    Token,
    Towers,
    Unselected,
)
from axolotl_layersel.selection.methods import METHODS

SCHEMA_VERSION: Final = 2
FILE = "plan.json"
# Parameters and ranks; a larger number is none of a model's.
Count = Annotated[int, Field(ge=0, lt=2**63)]
# Keys of JSON are text: those that are numbers are the layers of a model with one list of them.
Layer = Annotated[LayerName, Field(union_mode="left_to_right")]


class LayerChoice(BaseModel):
    """One layer, by its number or as ``encoder.3``. ``score`` is its importance (higher is kept), ``None`` where it has
    none.
    """

    model_config = ConfigDict(extra="forbid")

    layer: Layer
    score: FiniteFloat | None
    selected: bool


class Tower(BaseModel):
    """LoRA outside of the layers, in one place of the model; ``trained`` counts those of its modules that train."""

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
    """Trainable parameters in the layers: those that LoRA with ``lora_r`` has, and those of the ranks given."""

    model_config = ConfigDict(extra="forbid")

    lora: Count = Field(description="of LoRA with lora_r in all candidates")
    even: Count = Field(default=0, description="of what is spent, that which no gain above noise asked for; all alike")
    lora_r: Count | None = Field(default=None, description="of the run that made the plan; null in older plans")
    allowed: Count = Field(description="what the ranks could spend")
    spent: Count = Field(description="what they take")


class Plan(BaseModel):
    """What was decided, and everything needed to check it against another run."""

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[2] = SCHEMA_VERSION
    method: str
    layers: list[LayerChoice]
    unselected: Unselected
    towers: Towers = Field(default="keep", description="what became of LoRA outside of the layers")
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
    ranks: dict[str, int] = Field(
        default_factory=dict, description="the rank of every module that is kept; empty where all have lora_r"
    )
    budget: Budget | None = Field(default=None, description="where ranks were given by one")
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
        """Whose layers were chosen among; plans from before there was a choice say nothing."""
        return self.settings.get("stacks") or DEFAULT_STACKS

    def resolve_settings(self) -> ResolvedSelection:
        """Return ``settings`` as they take effect; what is left out of them, or null, is at its default.

        Raises:
            ValidationError: if they are not what a ``selection`` block can hold.
        """
        given = {key: value for key, value in self.settings.items() if value is not None}
        method = METHODS.get(str(given.get("method")))
        if method is None or "seed" not in method.keys:
            given.pop("seed", None)  # every plan has one, which such a block must not
        return SelectionArgs.model_validate(given).resolve(run_seed=self.seed)

    @property
    def modules_outside(self) -> list[str]:
        """The LoRA modules outside of the layers that are kept."""
        return [name for tower in self.outside for name in tower.modules] if self.towers == "keep" else []


def plan_path(run_folder: str | Path) -> Path:
    """Return where the plan of a run or checkpoint in ``run_folder`` lies."""
    return Path(run_folder) / FOLDER / FILE


def read_plan(path: str | Path, key: str = "layersel.selection.plan") -> Plan:
    """Return the plan in the file ``path``.

    Raises:
        LayerselError: naming ``key`` if the file is missing, not JSON, not of this schema, or contradicts itself.
    """
    way_out = "Give the path of a plan.json, or make the plan anew."
    content = read_json(key, path, way_out)
    version = content.get("schema_version") if isinstance(content, dict) else None
    if isinstance(version, bool) or version not in (1, SCHEMA_VERSION):
        raise LayerselError(
            f"{key}: {path} has schema_version {version!r}, this version of axolotl-layersel reads 1 to "
            f"{SCHEMA_VERSION}. Make the plan anew with `axolotl-layersel plan`."
        )
    if version == 1:
        content = upgrade(content)
    try:
        # As JSON, whose keys are text, and strictly: "yes" is no Boolean and 1.0 is no layer.
        plan = Plan.model_validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        raise refuse(key, path, f"is not a plan: {enumerate_faults(list_problems(error))}", way_out) from error
    contradictions = list_contradictions(plan)
    if contradictions:
        way_out = "Undo what was edited by hand, or make the plan anew."
        raise refuse(key, path, f"contradicts itself: {enumerate_faults(contradictions)}", way_out)
    return plan


def upgrade(content: dict[str, Any]) -> dict[str, Any]:
    """Return a plan of schema 1, in which all ranks are the same, as one of schema 2."""
    settings = dict(content["settings"]) if isinstance(content.get("settings"), dict) else {}
    search = dict(settings["flexora"]) if isinstance(settings.get("flexora"), dict) else None
    granularity = "layer" if search is None else search.pop("granularity", "layer")
    settings |= {"flexora": search, "granularity": granularity, "rank": "same"}
    return {**content, "schema_version": SCHEMA_VERSION, "granularity": granularity, "settings": settings}


def write_plan(plan: Plan, path: str | Path) -> None:
    """Write ``plan`` to the file ``path``, which appears at once and complete."""
    write_atomically(path, (plan.model_dump_json(indent=2) + "\n").encode("utf-8"))


def check_checkpoint(plan: Plan, checkpoint: str | Path) -> None:
    """Check that the adapter in ``checkpoint`` has LoRA on the modules that ``plan`` says, by its tensors' names.

    That is in the layers and outside of them. A checkpoint with fewer layers would load into a model with more
    without an error, and the other way round.

    Raises:
        LayerselError: if the adapter is missing, damaged or another.
    """
    # These need torch, which plans themselves do not.
    from axolotl_layersel.l1ra.state import state_path
    from axolotl_layersel.tensors import load_tensors

    path = Path(checkpoint) / "adapter_model.safetensors"
    if not path.exists():
        raise LayerselError(
            f"resume_from_checkpoint: {checkpoint} holds no adapter_model.safetensors. Resume another checkpoint."
        )
    tensors, _ = load_tensors("resume_from_checkpoint", path, "Resume another checkpoint.")
    if not state_path(checkpoint).exists():  # by which ranks may have moved since
        targets = read_expert_modules(Path(checkpoint) / "adapter_config.json")
        for name, rank in plan.ranks.items():
            held = tensors.get(f"base_model.model.{name}.lora_A.weight")
            if held is None:
                continue
            rows = held.shape[0]  # of experts, those of all of them
            outermost = name.partition(".base_layer")[0]
            has_experts = any(f".{outermost}".endswith(f".{experts}" if experts else "") for experts in targets)
            if rows % rank if has_experts else rows != rank:
                raise LayerselError(
                    f"resume_from_checkpoint: the adapter in {checkpoint} has rank {rows} in {name}, and the "
                    f"plan beside it gives it {rank}. Resume a checkpoint of this run."
                )
    names = [name.removeprefix("base_model.model.") for name in tensors]
    present = {name.rpartition(".lora_")[0] for name in names if ".lora_" in name}
    said = {*plan.modules, *plan.modules_outside}
    frozen = {name for name in present if plan.unselected == "freeze" and find_layer(plan.stack, name) is not None}
    differing = said ^ (present - (frozen - said))
    if differing:
        raise LayerselError(
            f"resume_from_checkpoint: the adapter in {checkpoint} is not of the plan beside it: they differ in "
            f"{min(differing)} ({len(differing)} such modules). Resume a checkpoint of this run."
        )


def read_expert_modules(path: Path) -> set[str]:
    """Return the ends of the names of the modules on whose parameters an adapter has LoRA, by its configuration.

    One is empty where the configuration names a parameter alone. There are none where ``path`` is missing.
    """
    if not path.is_file():
        return set()
    content = read_json("resume_from_checkpoint", path, "Resume another checkpoint.")
    parameters = content.get("target_parameters") if isinstance(content, dict) else None
    return {str(name).rpartition(".")[0] for name in parameters} if isinstance(parameters, list) else set()
