"""The file of a plan: read it, write it, and compare it with the adapter saved with it."""

import json
from pathlib import Path

from pydantic import ValidationError

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.files import read_json, read_versioned, refuse, write_atomically
from axolotl_layersel.config.layer_names import find_layer
from axolotl_layersel.selection.plan import SCHEMA_VERSION, Plan
from axolotl_layersel.selection.plan_checks import enumerate_faults, list_contradictions, list_problems


def read_plan(path: str | Path, key: str = "layersel.selection.plan") -> Plan:
    """Return the plan in the file ``path``.

    Raises:
        LayerselError: naming ``key`` if the file is missing, not JSON, of another schema, or contradicts itself.
    """
    way_out = "Give the path of a plan.json, or make a new plan."
    new_plan = "Make a new plan with `axolotl-layersel plan`."
    content = read_versioned(key, path, SCHEMA_VERSION, way_out, new_plan)
    try:
        # Strict validation of JSON takes keys as text, and neither "yes" as a Boolean nor 1.0 as a layer.
        plan = Plan.model_validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        raise refuse(key, path, f"is not a plan: {enumerate_faults(list_problems(error))}", way_out) from error
    contradictions = list_contradictions(plan)
    if contradictions:
        way_out = "Undo what was edited by hand, or make a new plan."
        raise refuse(key, path, f"contradicts itself: {enumerate_faults(contradictions)}", way_out)
    return plan


def write_plan(plan: Plan, path: str | Path) -> None:
    """Write ``plan`` to the file ``path`` atomically."""
    write_atomically(path, (plan.model_dump_json(indent=2) + "\n").encode("utf-8"))


def check_checkpoint(plan: Plan, checkpoint: str | Path) -> None:
    """Check by tensor names that the adapter in ``checkpoint`` has LoRA on the modules that ``plan`` names.

    PEFT would load a checkpoint of fewer layers into a model with more without an error, and the reverse.

    Raises:
        LayerselError: if the adapter is missing, damaged, or does not match the plan.
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
    if not state_path(checkpoint).exists():  # with l1ra, whose state it is, ranks may have changed since the plan
        check_checkpoint_ranks(plan, checkpoint, {name: tensor.shape[0] for name, tensor in tensors.items()})
    names = [name.removeprefix("base_model.model.") for name in tensors]
    present = {name.rpartition(".lora_")[0] for name in names if ".lora_" in name}
    said = {*plan.modules, *plan.modules_outside}
    frozen = {name for name in present if plan.unselected == "freeze" and find_layer(plan.stack, name) is not None}
    differing = said ^ (present - (frozen - said))
    if differing:
        raise LayerselError(
            f"resume_from_checkpoint: the adapter in {checkpoint} does not match the plan saved with it: they differ "
            f"in {min(differing)} ({len(differing)} such modules). Resume a checkpoint of this run."
        )


def check_checkpoint_ranks(plan: Plan, checkpoint: str | Path, rows: dict[str, int]) -> None:
    """Raise LayerselError if the adapter in ``checkpoint`` has other ranks than ``plan``.

    ``rows``: of each of its tensors, by name; the A of experts has those of all experts.
    """
    targets = read_expert_modules(Path(checkpoint) / "adapter_config.json")
    for name, rank in plan.ranks.items():
        held = rows.get(f"base_model.model.{name}.lora_A.weight", rank)
        outermost = name.partition(".base_layer")[0]
        has_experts = any(f".{outermost}".endswith(f".{experts}" if experts else "") for experts in targets)
        if held % rank if has_experts else held != rank:
            raise LayerselError(
                f"resume_from_checkpoint: the adapter in {checkpoint} has rank {held} in {name}, and the plan saved "
                f"with it gives it {rank}. Resume a checkpoint of this run."
            )


def read_expert_modules(path: Path) -> set[str]:
    """Return the name endings of modules with LoRA on their parameters, from an adapter's configuration.

    A parameter without a module gives an empty ending. A missing file gives none.
    """
    if not path.is_file():
        return set()
    content = read_json("resume_from_checkpoint", path, "Resume another checkpoint.")
    parameters = content.get("target_parameters") if isinstance(content, dict) else None
    return {str(name).rpartition(".")[0] for name in parameters} if isinstance(parameters, list) else set()
