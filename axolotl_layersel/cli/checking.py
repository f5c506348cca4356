"""The check of a YAML file without its model and its data, for ``axolotl-layersel check``.

Relied on in axolotl 0.19.0 (``tests/unit/cli/test_checking.py`` fails when it changes): the steps of
``axolotl.cli.config.load_cfg``, except its log in the output folder, its telemetry and its calls of trackers.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from axolotl_layersel.cli.overrides import apply_overrides
from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.files import read_json
from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.config.selection import SelectionConfig
from axolotl_layersel.config.strict_block import list_plugins, quote
from axolotl_layersel.config.textual import read_yaml
from axolotl_layersel.training.ending import describe_error


def check_config(path: Path, overrides: Mapping[str, Any]) -> str:
    """Validate a YAML file as Axolotl does, run this package's checks before the model, and return the result as text.

    ``overrides``: values by key, in place of those in the file.

    Raises:
        SystemExit: if the file is refused, after printing why.
    """
    from axolotl_layersel.training.ending import tell

    try:
        settings = load_settings(path, overrides)
    except (LayerselError, ValidationError) as error:
        tell(describe_error(error).splitlines())
        raise SystemExit(1) from None
    return f"{path}: no fault was found. {describe_settings(settings)}"


def load_settings(path: Path, overrides: Mapping[str, Any]) -> LayerselConfig:
    """Return the validated ``layersel`` block of a YAML file, with ``overrides`` in place of its values.

    Raises:
        LayerselError: if a check of this package fails.
        ValidationError: if the validation by Axolotl or this package fails.
    """
    from axolotl.cli import config
    from axolotl.utils.dict import DictDefault

    from axolotl_layersel.training.preflight import check_before_model, read_settings

    data = read_yaml(path) or {}
    cfg = DictDefault(apply_overrides(data, overrides))
    if isinstance(cfg.deepspeed, str):
        read_json("deepspeed", cfg.deepspeed, "Give the path of a DeepSpeed file.")
    cfg.axolotl_config_path = str(path)
    config.prepare_plugins(cfg)
    capabilities, environment = config.gpu_capabilities()
    cfg = config.validate_config(cfg, capabilities=capabilities, env_capabilities=environment)
    config.normalize_config(cfg)
    if cfg.layersel is None:
        raise LayerselError(f"plugins: {quote(list_plugins(data))} did not load axolotl-layersel, as the log says.")
    check_before_model(cfg, lambda folder: None)
    return read_settings(cfg)


def describe_settings(settings: LayerselConfig) -> str:
    """Return the effect of a ``layersel`` block in a sentence."""
    parts = []
    if settings.selection is not None:
        parts.append(describe_selection(settings.selection))
    if settings.l1ra is not None:
        parts.append(f"l1ra moves rank while the model trains, by rule {settings.l1ra.rule}")
    exponent = settings.drop_unread().scaling_exponent
    if exponent:
        parts.append(f"the scaling of a module follows its rank with exponent {exponent:g}")
    return f"The run will go as follows: {', and '.join(parts)}."


def describe_selection(selection: SelectionConfig) -> str:
    """Return the effect of a selection as a clause."""
    if selection.plan is not None:
        return f"selection applies the plan {selection.plan}"
    settings = selection.resolve(run_seed=0)
    units = f"{settings.granularity}s"
    if settings.layers is not None:
        kept = f"the layers {', '.join(map(str, settings.layers))}"
    elif settings.num_layers is not None or settings.num_units is not None:
        kept = f"{settings.num_layers or settings.num_units} {units}"
    elif settings.keep is not None:
        kept = f"the {units} whose gate is above 0"
    else:
        kept = f"a share of {settings.ratio} of the {units}"
    rank = (
        "with lora_r each"
        if settings.rank_allocation == "same"
        else f"with ranks by rank_allocation: {settings.rank_allocation}"
    )
    return f"selection by {settings.method} keeps LoRA in {kept}, {rank}"
