"""The record of a checkpoint, ``layersel/checkpoint.json``: its step, its settings of LoRA, and digests of its files.

The record is written after the files that it names. ``trainer_state.json``, which the Trainer writes last, holds the
record's own digest. A checkpoint is of one step of one run if all of these agree.
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
# The settings that a resumed run must share with its checkpoint, by YAML key: attributes of PEFT's configuration.
# Dropout may change.
LORA_SETTINGS = {
    **{key: name for key, name in ADAPTER_SETTINGS.items() if key != "lora_dropout"},
    "lora_alpha_pattern": "alpha_pattern",
    "lora_modules_to_save": "modules_to_save",
    "lora_target_parameters": "target_parameters",
    "peft_layers_to_transform": "layers_to_transform",
    "base_model": "base_model_name_or_path",
}
# The same settings in the YAML file, before there is a model: for some models PEFT replaces names of modules.
YAML_KEYS = (*LORA_SETTINGS, "lora_target_linear", "lora_exclude_modules")


class StoredFile(BaseModel):
    """A file of a checkpoint."""

    model_config = ConfigDict(extra="forbid")

    size: int
    sha256: str


class Record(BaseModel):
    """The content of ``checkpoint.json``."""

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = SCHEMA_VERSION
    step: int
    lora: dict[str, Any]
    given: dict[str, Any]
    files: dict[str, StoredFile]


def record_path(checkpoint: str | Path) -> Path:
    """Return the path of a checkpoint's record."""
    return Path(checkpoint) / FOLDER / FILE


def list_recorded() -> list[str]:
    """Return the files that a record may name, as paths in the checkpoint."""
    own = [str(path("")) for path in (plan_path, ranks_path, state_path)]
    return [SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME, *own]


def write_record(checkpoint: Path, step: int, lora: dict[str, Any], given: dict[str, Any]) -> str:
    """Write the record of a checkpoint, whose other files must exist, and return its SHA-256.

    Args:
        checkpoint: the folder.
        step: the step of the run.
        lora: see ``describe_lora``.
        given: see ``describe_yaml``; empty without a YAML file.
    """
    paths = {name: checkpoint / name for name in list_recorded() if (checkpoint / name).is_file()}
    files = {name: StoredFile(size=path.stat().st_size, sha256=hash_file(path)) for name, path in paths.items()}
    content = (Record(step=step, lora=lora, given=given, files=files).model_dump_json(indent=2) + "\n").encode()
    write_atomically(record_path(checkpoint), content)
    return hash_parts([content])


def read_record(checkpoint: Path) -> Record:
    """Return the record of a checkpoint.

    Raises:
        OSError: if it cannot be read.
        ValueError: with its fault in one line.
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
    """Return how a checkpoint's folder, ``trainer_state.json`` and record contradict each other, or None.

    ``find_other_file`` compares the other files.

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
    """Return the step that each part of a checkpoint names. ``state``: the content of ``trainer_state.json``."""
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
    """Return the fault of the first file in ``names`` that differs from the record, or None.

    Raises:
        OSError: if one cannot be read.
    """
    for name in filter(record.files.__contains__, names):
        path, then = checkpoint / name, record.files[name]
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != then.size or hash_file(path) != then.sha256:
            return f"{name} is not the one that the checkpoint was written with: it is another one's, or was changed"
    return None


# --- Whether a run has the LoRA of its checkpoint -----------------------------------------------------------------


def describe_lora(config: LoraConfig) -> dict[str, Any]:
    """Return PEFT's settings of LoRA by YAML key. Call it before a selection changes ``config``."""
    return sort_lists({key: make_plain(getattr(config, name)) for key, name in LORA_SETTINGS.items()})


def describe_yaml(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return Axolotl's settings of LoRA by YAML key."""
    return sort_lists({key: make_plain(cfg.get(key)) for key in YAML_KEYS})


def sort_lists(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with sorted lists, whose order has no meaning."""
    return {key: sorted(value) if isinstance(value, list) else value for key, value in settings.items()}


def check_lora(checkpoint: str | Path, now: Mapping[str, Any], part: Literal["lora", "given"], has_plan: bool) -> int:
    """Check that a resumed run has the LoRA settings of its checkpoint, and return the checkpoint's step.

    Args:
        checkpoint: a checkpoint with a record.
        now: the settings of the run.
        part: the part of the record to compare them with.
        has_plan: whether the checkpoint has a plan, which identifies the base model better.

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
    """Return whether two values of a setting differ. A base model may have moved; unset and off are the same."""
    if key == "base_model" and then and now:
        return shorten(then) != shorten(now)
    return (then or None) != (now or None)
