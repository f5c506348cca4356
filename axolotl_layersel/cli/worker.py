"""Selection without training, in the processes that ``axolotl-layersel plan`` launches, or in its own."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from axolotl_layersel.common.errors import LayerselError, warning_instead
from axolotl_layersel.common.paths import plan_path
from axolotl_layersel.common.terminal import say
from axolotl_layersel.reports.closing import describe_plan
from axolotl_layersel.selection.plan_file import read_plan
from axolotl_layersel.training.ending import describe_error, end_in_sentences, show_closing, tell


def make_plan(config: str, repeat: int = 1, overrides: Mapping[str, Any] | None = None) -> Path:
    """Run Axolotl up to its trainer, where the plugin selects, and return the path of the plan.

    Args:
        config: the YAML file.
        repeat: see ``select_layers``.
        overrides: values for ``load_cfg`` by key, in place of those in the file.
    """
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets, load_preference_datasets
    from axolotl.integrations.base import PluginManager
    from axolotl.train import setup_model_and_trainer
    from axolotl.utils.distributed import cleanup_distributed

    from axolotl_layersel.plugin import LayerSelectionPlugin

    afresh = {"resume_from_checkpoint": None, "auto_resume_from_checkpoints": False}
    cfg = load_cfg(config, **{**(overrides or {}), **afresh})
    if cfg.layersel is None:
        raise LayerselError(f"plugins: {config} does not list axolotl_layersel.LayerSelectionPlugin. Add it.")
    if cfg.layersel.selection is None:
        raise LayerselError(f"layersel.selection: {config} has no such block, so there is no plan to make. Add it.")
    plugins = PluginManager.get_instance()
    for plugin in plugins.plugins.values():
        if isinstance(plugin, LayerSelectionPlugin):
            plugin.repeat = repeat
    dataset_meta = plugins.load_datasets(cfg, preprocess=False)
    if dataset_meta is None:
        load = load_preference_datasets if cfg.rl else load_datasets
        dataset_meta = load(cfg=cfg, cli_args=TrainerCliArgs())
    setup_model_and_trainer(cfg, dataset_meta)
    cleanup_distributed()
    return plan_path(cfg.output_dir)


def main(config: str, repeat: int = 1, overrides: Mapping[str, Any] | None = None) -> None:
    """Make the plan and print its path, or print the sentences of a refusal and exit with code 1."""
    end_in_sentences()
    try:
        path = make_plan(config, repeat, overrides)
    except (LayerselError, ValidationError) as error:
        tell(describe_error(error).splitlines())
        raise SystemExit(1) from None
    if os.environ.get("RANK", "0") == "0":
        say(f"plan: {path}")
        with warning_instead("the closing summary cannot be made", "The plan is complete."):
            show_closing(describe_plan(read_plan(path), path))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]))
