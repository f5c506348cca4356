"""The cells of a comparison: their folders, their YAML files, and the figures or failures that they leave.

A cell is an ordinary run of ``axolotl train``. Its YAML file is a function of the user's file, the arm, the rate, the
seed and the number of steps, and can be started by hand.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from axolotl_layersel.cli.compare.figures import FAILURE, FIGURES, ArmSettings, Failure, Figures, Settings, read_record
from axolotl_layersel.common.digests import hash_json
from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.files import write_atomically
from axolotl_layersel.config.strict_block import as_mapping, as_number, as_whole, list_plugins, quote
from axolotl_layersel.config.textual import DEFAULT_OUTPUT, MEASURING, NAMES, PLUGIN, find_seed, read_yaml

CONFIG = "config.yml"
MODEL = "model"  # the folder of a cell's run
FOLDER = "compare"  # in the user's `output_dir`
PREPARED = "prepared"  # the folder of the tokenised rows, if the user's file names none
BEST = "best.yml"  # the user's file with the arm and the rate of the answer
PAGE = "report.html"
PICTURES = "pictures"  # the folder of the pictures next to the page
MEASURE = "layersel_measure"  # the key of the measuring plugin
HELD_OUT = 0.1  # the share of the training rows that are held out, if the user's file holds out none
# Keys by their beginning: trackers, and uploads to a hub.
SENT: tuple[str, ...] = (
    "use_wandb",
    "wandb_",
    "use_mlflow",
    "mlflow_",
    "hf_mlflow_",
    "use_comet",
    "comet_",
    "use_trackio",
    "trackio_",
)
SENT += ("use_swanlab", "swanlab_", "use_tensorboard", "use_otel_metrics", "otel_", "hub_", "push_to_hub")
# Keys of checkpoints and evaluations, which cells do without, and of the length, which the comparison sets.
DROPPED = (
    "auto_resume_from_checkpoints",
    "do_bench_eval",
    "early_stopping_patience",
    "eval_steps",
    "eval_table_size",
    "evals_per_epoch",
    "evaluation_strategy",
    "greater_is_better",
    "load_best_model_at_end",
    "metric_for_best_model",
    "resume_from_checkpoint",
    "save_first_step",
    "save_steps",
    "save_total_limit",
    "saves_per_epoch",
    "warmup_steps",
)


@dataclass(frozen=True, order=True)
class Cell:
    """One run of a comparison: an arm at a learning rate, with a seed, for a number of optimizer steps."""

    arm: str
    rate: float
    seed: int
    steps: int

    def describe(self) -> str:
        """Return the cell in words."""
        return f"{self.arm} at {self.rate:g}, seed {self.seed}, {self.steps} steps"


def find_folder(cell: Cell, settings: Settings) -> Path:
    """Return the folder of a cell; that of a cell with fewer steps than the comparison names them."""
    name = str(cell.seed) if cell.steps == settings.steps else f"{cell.seed}-{cell.steps}-steps"
    return Path(settings.folder) / cell.arm / f"{cell.rate:g}" / name


# --- The YAML file ----------------------------------------------------------------------------------------------------


def find_comparison_folder(data: Mapping[str, Any]) -> Path:
    """Return the folder of the comparison of a YAML file."""
    output = data.get("output_dir", DEFAULT_OUTPUT)
    if not isinstance(output, str) or not output:
        raise LayerselError(f"output_dir: {quote(output)} is not a path. Write one, such as ./outputs/run.")
    return Path(output) / FOLDER


def describe_held_out(data: Mapping[str, Any]) -> str:
    """Return where the held-out rows of a comparison come from."""
    if data.get("test_datasets"):
        return "`test_datasets` of the file"
    share = as_number(data.get("val_set_size")) or 0
    if not share:
        return f"{HELD_OUT:.0%} of the training rows, because the file sets neither `val_set_size` nor `test_datasets`"
    shown = f"{share:.3g} of the training rows" if share < 1 else f"{share:.0f} training rows"
    return f"{shown}, as the file's `val_set_size` says"


def apply_arm(data: Mapping[str, Any], arm: ArmSettings) -> dict[str, Any]:
    """Return a YAML file with the keys of an arm, and with the plugin listed if and only if the arm needs it."""
    changed = {**data, **arm.keys}
    changed = {key: value for key, value in changed.items() if value is not None or key not in arm.keys}
    others = [name for name in list_plugins(data) if name not in (*NAMES, MEASURING)]
    used = next((name for name in list_plugins(data) if name in NAMES), PLUGIN)
    names = list_plugins(data) if used in list_plugins(data) else [*others, PLUGIN]
    changed["plugins"] = names if changed.get("layersel") is not None else others
    if not changed["plugins"]:
        del changed["plugins"]
    return changed


def make_config(data: Mapping[str, Any], cell: Cell, settings: Settings) -> dict[str, Any]:
    """Return the content of a cell's YAML file.

    Args:
        data: the content of the user's file.
        cell: the cell.
        settings: the settings of the comparison.
    """
    seed, warmup, longest = find_seed(data), as_number(data.get("warmup_steps")), as_whole(data.get("max_steps"))
    config = apply_arm(data, settings.arms[cell.arm])
    config = {key: value for key, value in config.items() if key not in DROPPED and not str(key).startswith(SENT)}
    holds_out = bool(config.get("test_datasets") or as_number(config.get("val_set_size")))
    measure = {
        "arm": cell.arm,
        "general": settings.general,
        "data_seed": seed,
        "max_steps": longest if longest and longest > 0 else None,
        "warmup_steps": warmup,
        "held_out_trains": None if holds_out else True,
    }
    config.update(
        plugins=[*config.get("plugins", []), MEASURING],
        dataset_prepared_path=config.get("dataset_prepared_path") or str(Path(settings.folder) / PREPARED),
        learning_rate=cell.rate,
        max_steps=cell.steps,
        seed=cell.seed,
        eval_strategy="no",
        save_strategy="no",
        output_dir=str(find_folder(cell, settings) / MODEL),
    )
    if not holds_out:
        config["val_set_size"] = HELD_OUT
    if config.get("sample_packing"):
        config["eval_sample_packing"] = False  # so that no held-out row is left over
    config[MEASURE] = {key: value for key, value in measure.items() if value is not None}
    return config


def find_digest(config: Mapping[str, Any]) -> str:
    """Return the digest of the content of a YAML file, whatever the order of its keys."""
    return hash_json(config, default=str)


def write_config(config: Mapping[str, Any], cell: Cell, path: Path) -> None:
    """Write the YAML file of a cell."""
    head = f"# A run of `axolotl layersel compare`: {cell.describe()}.\n"
    write_atomically(path, (head + yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)).encode())


def check_config(config: Mapping[str, Any], path: Path, folder: Path) -> None:
    """Raise LayerselError if the YAML file of a cell exists with another content.

    Args:
        config: the content that it should have.
        path: the file.
        folder: that of the comparison, for the message.
    """
    if not path.exists():
        return
    found = read_yaml(path)
    if found is None:
        raise LayerselError(f"compare: {path} is damaged. Delete {path.parent}, and start again.")
    expected = json.loads(json.dumps(dict(config), default=str))
    written = json.loads(json.dumps(dict(found), default=str))
    if written == expected:
        return
    key, before, now = next(iter(list_differences(written, expected)))
    raise LayerselError(
        f"compare: the comparison in {folder} was made with other settings ({key}: {quote(before)}, now {quote(now)}). "
        "Choose another --output-dir, or delete it."
    )


def list_differences(first: Any, second: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Return the keys with different values in two YAML files, with both values; None stands for a missing one."""
    if not (isinstance(first, Mapping) and isinstance(second, Mapping)):
        return [] if first == second else [(path, first, second)]
    return [
        difference
        for key in dict.fromkeys([*first, *second])
        for difference in list_differences(first.get(key), second.get(key), f"{path}.{key}" if path else str(key))
    ]


# --- Results ----------------------------------------------------------------------------------------------------------


def read_result(cell: Cell, config: Mapping[str, Any], settings: Settings) -> Figures | Failure | None:
    """Return what a cell has measured, or its failure; None if it has not ended.

    Raises:
        LayerselError: if the folder holds a cell with other settings, or a damaged file.
    """
    folder = find_folder(cell, settings)
    check_config(config, folder / CONFIG, Path(settings.folder))
    found: Figures | Failure
    if (folder / FIGURES).exists():
        found = read_record(Figures, folder / FIGURES)
    elif (folder / FAILURE).exists():
        found = read_record(Failure, folder / FAILURE)
    else:
        return None
    if found.config_digest != find_digest(config):
        raise LayerselError(
            f"compare: the figures in {folder} are those of another file than {folder / CONFIG}. Delete {folder}, and "
            "start again."
        )
    return found


def make_best(data: Mapping[str, Any], arm: ArmSettings, rate: float) -> dict[str, Any]:
    """Return the user's YAML file with the keys of an arm and its rate."""
    return {**apply_arm(data, arm), "learning_rate": rate}


def list_metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of an evaluation besides loss, speed and memory, without the prefix of their names."""
    left_out = ("loss", "runtime", "per_second", "epoch")
    named = {name.removeprefix("eval_"): as_number(value) for name, value in as_mapping(values).items()}
    kept = {name: value for name, value in named.items() if value is not None and not name.endswith(left_out)}
    return {name: value for name, value in kept.items() if not name.startswith("memory/")}  # Axolotl's, of the device
