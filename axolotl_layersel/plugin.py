"""The Axolotl plugin. Its hooks only delegate, and show when each part of the package runs."""

import logging
import os
from collections.abc import Mapping
from typing import Any

from axolotl.integrations.base import BasePlugin

from axolotl_layersel import __version__
from axolotl_layersel.config.root import check_blank_blocks
from axolotl_layersel.config.strict_block import as_mapping
from axolotl_layersel.config.textual import check_folder
from axolotl_layersel.training.lock import RunLock

LOG = logging.getLogger("axolotl.layersel")


class LayerSelectionPlugin(BasePlugin):
    """Chooses the layers with LoRA before the run's engine is built, and redistributes rank during training."""

    def get_input_args(self) -> str:
        return "axolotl_layersel.config.root.LayerselArgs"

    def __init__(self) -> None:
        super().__init__()
        self.lock: RunLock | None = None
        self.given: dict[str, Any] = {}  # the LoRA settings of the YAML file, before the model is loaded
        self.repeat = 1  # the option of `axolotl-layersel plan`
        self.is_first = False  # whether this process is process 0 of a run

    def register(self, cfg: dict[str, Any]) -> None:
        """Check the YAML file as the user wrote it, before Axolotl adds its own choice of LoRA kernels."""
        from axolotl_layersel.training.ending import end_in_sentences

        end_in_sentences()
        block = cfg.get("layersel")
        if isinstance(block, dict):
            check_blank_blocks(block)
            check_folder(cfg)
            settle_kernels(cfg, block)
        if os.environ.get("RANK", "0") == "0":
            LOG.info("layersel: %s", describe_plugin(block))

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        if preprocess:
            return
        from axolotl.utils.distributed import init_distributed_state

        from axolotl_layersel.training.contents import describe_yaml
        from axolotl_layersel.training.preflight import check_before_model

        init_distributed_state()
        self.given = describe_yaml(cfg)
        check_before_model(cfg, self.take_lock)

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        from axolotl_layersel.engines.collectives import decide_on_rank_zero, get_rank
        from axolotl_layersel.lora.kernels import make_kernels_accept_bare_modules, while_choosing
        from axolotl_layersel.training.preflight import find_scaling, read_settings
        from axolotl_layersel.training.prepare import prepare_trainer
        from axolotl_layersel.training.saving import take_over_fsdp2_writer

        settings, self.is_first = read_settings(cfg), get_rank() == 0
        decide_on_rank_zero(self.confirm_lock)
        with while_choosing(trainer, settings.selection):
            prepare_trainer(
                trainer,
                settings,
                cfg.resume_from_checkpoint,
                continues_adapter=bool(cfg.lora_model_dir),
                lora_r=cfg.lora_r,
                scaling=find_scaling(cfg) if cfg.lora_model_dir and settings.l1ra else None,
                repeat=self.repeat,
                checked=True,
                given=self.given,
            )
        make_kernels_accept_bare_modules(trainer.model)
        take_over_fsdp2_writer(trainer)

    def post_train_unload(self, cfg: Any) -> None:
        from axolotl_layersel.reports.closing import describe_run
        from axolotl_layersel.training.ending import close

        if self.lock is not None:
            self.lock.release()
        # Axolotl calls this last, and only if the run has not failed. The processes are no longer connected.
        if self.is_first:
            close(lambda: describe_run(cfg.output_dir, cfg.axolotl_config_path))

    def take_lock(self, folder: str) -> None:
        """Lock ``folder`` until this process ends; on process 0."""
        if self.lock is not None:
            self.lock.release()
        self.lock = RunLock.take(folder)

    def confirm_lock(self) -> None:
        """Raise LayerselError if another run has taken the folder; on process 0."""
        if self.lock is not None:
            self.lock.confirm()


def settle_kernels(cfg: dict[str, Any], block: Mapping[str, Any]) -> None:
    """Make Axolotl's fused LoRA kernels compute with gates, or switch them off if they cannot run or cannot do that.

    Args:
        cfg: the content of the YAML file as the user wrote it, which is changed.
        block: its ``layersel`` block.

    Raises:
        LayerselError: for a kernel that the user switched on and that cannot compute with gates.
    """
    import torch

    from axolotl_layersel.config.gate_requirements import keep_kernels_off, switch_off_kernels
    from axolotl_layersel.lora.kernels import give_gates_to_kernels

    # With Ray, the process that reads the file first has no GPU, and those that train read it again.
    if not torch.accelerator.is_available() and not cfg.get("use_ray"):
        keep_kernels_off(cfg)
    if block.get("l1ra") is not None and not give_gates_to_kernels():
        switch_off_kernels(cfg)


def describe_plugin(block: object) -> str:
    """Return the line of the log that says that Axolotl has loaded the plugin."""
    parts = [key for key in ("selection", "l1ra") if key in as_mapping(block)]
    method = as_mapping(as_mapping(block).get("selection")).get("method")
    asked = ", ".join(f"{part} by {method}" if part == "selection" else part for part in parts)
    return f"plugin {__version__} is loaded, and the file asks for {asked or 'nothing'}"
