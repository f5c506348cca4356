"""The file of a plan: read it, write it, and compare it with the adapter beside it."""

import json
from pathlib import Path

from pydantic import ValidationError

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.files import read_json, refuse, write_atomically
from axolotl_layersel.config.layer_names import find_layer
from axolotl_layersel.selection.plan import SCHEMA_VERSION, Plan
from axolotl_layersel.selection.plan_checks import enumerate_faults, list_contradictions, list_problems


def read_plan(path: str | Path, key: str = "layersel.selection.plan") -> Plan:
    """Return the plan in the file ``path``.

    Raises:
        LayerselError: naming ``key`` if the file is missing, not JSON, not of this schema, or contradicts itself.
    """
    way_out = "Give the path of a plan.json, or make the plan anew."
    content = read_json(key, path, way_out)
    version = content.get("schema_version") if isinstance(content, dict) else None
    if isinstance(version, bool) or version != SCHEMA_VERSION:
        raise LayerselError(
            f"{key}: {path} has schema_version {version!r}, and this version of axolotl-layersel reads "
            f"{SCHEMA_VERSION}. Make the plan anew with `axolotl-layersel plan`."
        )
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
    from axolotl_layersel.common.paths import state_path
    from axolotl_layersel.common.tensors import load_tensors

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
