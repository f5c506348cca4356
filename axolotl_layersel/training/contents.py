"""What belongs together in a checkpoint: ``layersel/checkpoint.json`` names its step, and its files by their digests.

The record is written after the files that it names. ``trainer_state.json``, which the Trainer writes last, holds the
record's own digest. A checkpoint is of one step of one run where all of these agree.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Literal

from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from axolotl_layersel.common.digests import hash_file, hash_parts
from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.files import parse_json, write_atomically
from axolotl_layersel.common.paths import FOLDER, plan_path, ranks_path, state_path
from axolotl_layersel.engines.trainers import find_note
from axolotl_layersel.l1ra.state import STEP
from axolotl_layersel.selection.provenance import shorten
from axolotl_layersel.training.process_agreement import ADAPTER_SETTINGS, make_plain

FILE = "checkpoint.json"
SCHEMA_VERSION: Final = 1
# What of LoRA must be as it was when a run resumes: by the YAML keys that set it, in PEFT's configuration. Dropout may
# change.
LORA_SETTINGS = {
    **{key: name for key, name in ADAPTER_SETTINGS.items() if key != "lora_dropout"},
    "lora_alpha_pattern": "alpha_pattern",
    "lora_modules_to_save": "modules_to_save",
    "lora_target_parameters": "target_parameters",
    "peft_layers_to_transform": "layers_to_transform",
    "base_model": "base_model_name_or_path",
}
# What of the YAML file says the same before there is a model. PEFT replaces names of modules by others for some models.
YAML_KEYS = (*LORA_SETTINGS, "lora_target_linear", "lora_exclude_modules")


class StoredFile(BaseModel):
    """A file as it was when the checkpoint was written."""

    model_config = ConfigDict(extra="forbid")

    size: int
    sha256: str


class Record(BaseModel):
    """What a checkpoint was written with."""

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = SCHEMA_VERSION
    step: int
    lora: dict[str, Any]
    given: dict[str, Any]
    files: dict[str, StoredFile]


def record_path(checkpoint: str | Path) -> Path:
    """Return where the record of a checkpoint lies."""
    return Path(checkpoint) / FOLDER / FILE


def list_recorded() -> list[str]:
    """Return the files that a record may name, as paths in the checkpoint."""
    own = [str(path("")) for path in (plan_path, ranks_path, state_path)]
    return [SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME, *own]


def write_record(checkpoint: Path, step: int, lora: dict[str, Any], given: dict[str, Any]) -> str:
    """Write the record of a checkpoint whose other files of this package are there, and return its SHA-256.

    Args:
        checkpoint: its folder.
        step: of the run.
        lora: see ``describe_lora``.
        given: see ``describe_yaml``; empty where there is no YAML file.
    """
    present = [name for name in list_recorded() if (checkpoint / name).is_file()]
    files = {
        name: StoredFile(size=(checkpoint / name).stat().st_size, sha256=hash_file(checkpoint / name))
        for name in present
    }
    content = (Record(step=step, lora=lora, given=given, files=files).model_dump_json(indent=2) + "\n").encode()
    write_atomically(record_path(checkpoint), content)
    return hash_parts([content])


def read_record(checkpoint: Path) -> Record:
    """Return the record of a checkpoint.

    Raises:
        OSError: if it cannot be read.
        ValueError: saying in one line what is wrong with it.
    """
    content = parse_json(record_path(checkpoint).read_bytes().decode())
    version = content.get("schema_version") if isinstance(content, dict) else None
    if type(version) is int and version > SCHEMA_VERSION:
        raise ValueError(f"it has schema_version {version}, and this axolotl-layersel reads {SCHEMA_VERSION}")
    try:
        return Record.model_validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


# --- Whether a checkpoint is of one step of one run ---------------------------------------------------------------


def find_mixture(checkpoint: Path) -> str | None:
    """Return in what a checkpoint's folder, ``trainer_state.json`` and record contradict each other, or None.

    Its files must be there, and readable; their content is compared by ``find_other_file``.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if one is damaged.
    """
    record, name = read_record(checkpoint), str(record_path(""))
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_bytes())
    for source, step in list_steps(checkpoint, state).items():
        if step != record.step:
            return f"{source} says step {step}, and {name} says step {record.step}"
    if find_note(state) != hash_file(record_path(checkpoint)):
        return f"{TRAINER_STATE_NAME} was not written with this {name}: one of them is of another run, or was changed"
    return None


def list_steps(checkpoint: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the step that each part of a checkpoint says it is of. ``state``: what ``trainer_state.json`` holds."""
    steps = {TRAINER_STATE_NAME: state["global_step"]}
    named = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-([0-9]+)", checkpoint.name)
    if named:
        steps["the name of the folder"] = int(named[1])
    if state_path(checkpoint).is_file():
        with safe_open(state_path(checkpoint), framework="numpy") as file:
            said = (file.metadata() or {}).get(STEP, "")
        steps[str(state_path(""))] = int(said) if said.isdecimal() else None
    return steps


def find_other_file(checkpoint: Path, record: Record, names: Iterable[str]) -> str | None:
    """Return which of the files ``names`` is not the one that the checkpoint was written with, or None.

    Raises:
        OSError: if one cannot be read.
    """
    for name in [name for name in names if name in record.files]:
        path, then = checkpoint / name, record.files[name]
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != then.size or hash_file(path) != then.sha256:
            return f"{name} is not the one that the checkpoint was written with: it is another one's, or was changed"
    return None


# --- Whether a run has the LoRA of its checkpoint -----------------------------------------------------------------


def describe_lora(config: LoraConfig) -> dict[str, Any]:
    """Return the settings by which LoRA was made, by YAML key. ``config``: before anything was selected."""
    return sort_names({key: make_plain(getattr(config, name)) for key, name in LORA_SETTINGS.items()})


def describe_yaml(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings by which Axolotl makes LoRA, by YAML key, as its configuration has them."""
    return sort_names({key: make_plain(cfg.get(key)) for key in YAML_KEYS})


def sort_names(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings in which lists, whose order means nothing, are sorted."""
    return {key: sorted(value) if isinstance(value, list) else value for key, value in settings.items()}


def check_lora(checkpoint: str | Path, now: Mapping[str, Any], part: Literal["lora", "given"], has_plan: bool) -> int:
    """Check that a run that resumes has LoRA as its checkpoint has it, and return the checkpoint's step.

    Args:
        checkpoint: which has a record.
        now: the run's settings.
        part: of the record, with which they are compared.
        has_plan: whether the checkpoint has a plan, by which the base model is compared.

    Raises:
        LayerselError: naming every key whose value differs.
    """
    record = read_record(Path(checkpoint))
    then = getattr(record, part)
    skipped = {"base_model"} if has_plan else set()
    keys = [key for key in then if key in now and key not in skipped and differs(key, then[key], now[key])]
    if keys:
        ours, theirs = (" and ".join(f"{key}: {values[key]!r}" for key in keys) for values in (now, then))
        verb, what = ("contradicts", "the value") if len(keys) == 1 else ("contradict", "these values")
        raise LayerselError(
            f"{ours} {verb} the checkpoint {checkpoint}, which was made with {theirs}. Restore {what}, or start "
            "without resuming: in another output_dir, or from the adapter with lora_model_dir."
        )
    return record.step


def differs(key: str, then: Any, now: Any) -> bool:
    """Return whether two values of a setting differ. A base model may have moved, and what is off may be left out."""
    if key == "base_model" and then and now:
        return shorten(then) != shorten(now)
    return (then or None) != (now or None)
