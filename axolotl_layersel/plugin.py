"""The Axolotl plugin: hooks only. Which part of the package runs when."""

import logging
import os

from axolotl.integrations.base import BasePlugin

from axolotl_layersel.args import LORA_KERNELS, SelectionArgs
from axolotl_layersel.errors import LayerselError

LOG = logging.getLogger("axolotl.layersel")

# Seen in axolotl 0.19.0, ModelLoader._load_adapters: their trainers make the adapter themselves.
CONFIG_ONLY_TRAINERS = ("dpo", "ipo", "kto")


class LayerSelectionPlugin(BasePlugin):
    """Chooses the layers that LoRA trains, before the run's engine is built."""

    def get_input_args(self) -> str:
        return "axolotl_layersel.args.LayerselArgs"

    def register(self, cfg: dict) -> None:
        """See the YAML file as the user wrote it: only here their LoRA kernels differ from Axolotl's own."""
        block = cfg.get("layersel")
        selection = block.get("selection") if isinstance(block, dict) else None
        if isinstance(selection, dict) and selection.get("method") == "fisher":
            switch_off_kernels(cfg)

    def load_datasets(self, cfg, preprocess: bool = False) -> None:
        """Check what only a training run needs; of all commands, ``train`` alone comes here, before the model."""
        if preprocess:
            return
        from axolotl.utils.distributed import init_distributed_state

        from axolotl_layersel import engines
        from axolotl_layersel.selection.phase import check_continuing, find_plan

        init_distributed_state()
        settings = read_settings(cfg)
        reused = engines.decide_on_rank_zero(lambda: find_plan(settings, find_resumed_checkpoint(cfg)))
        if cfg.lora_model_dir and cfg.rl in CONFIG_ONLY_TRAINERS:
            raise LayerselError(
                f"lora_model_dir: {cfg.lora_model_dir} is not loaded by Axolotl with rl: {cfg.rl.value}, "
                "which starts from a new adapter. Remove lora_model_dir, or merge that adapter into the base first."
            )
        if cfg.lora_model_dir and reused is None:
            check_continuing(settings)

    def post_trainer_create(self, cfg, trainer) -> None:
        from axolotl_layersel import engines
        from axolotl_layersel.selection.phase import select_layers

        resume_from = engines.decide_on_rank_zero(lambda: find_resumed_checkpoint(cfg))
        # Axolotl would also resume from a checkpoint that a killed run left incomplete.
        cfg.resume_from_checkpoint = resume_from
        cfg.auto_resume_from_checkpoints = False
        select_layers(trainer, read_settings(cfg), resume_from, continues_adapter=bool(cfg.lora_model_dir))


def read_settings(cfg) -> SelectionArgs:
    """Return the validated ``layersel.selection`` block of Axolotl's configuration."""
    return SelectionArgs.model_validate(cfg.layersel.selection.to_dict())


def switch_off_kernels(cfg: dict) -> None:
    """Switch off the fused LoRA kernels that Axolotl would switch on by itself: they bypass the hooked modules.

    Raises:
        LayerselError: if the user switched one on.
    """
    for key in LORA_KERNELS:
        if cfg.get(key):
            raise LayerselError(
                f"{key}: {cfg[key]} bypasses the modules whose gradients layersel.selection.method: fisher measures. "
                f"Remove {key}, or use method cka."
            )
        cfg[key] = False
    LOG.info("layersel: method fisher switches off the fused LoRA kernels: %s", ", ".join(LORA_KERNELS))


def find_resumed_checkpoint(cfg) -> str | None:
    """Return the checkpoint that the run will resume from, or None: an explicit one first, else the newest complete
    one if the run resumes automatically. A run that was killed while it wrote a checkpoint left an incomplete one.
    """
    from transformers.trainer import TRAINER_STATE_NAME
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

    if cfg.resume_from_checkpoint:
        return str(cfg.resume_from_checkpoint)
    if not cfg.auto_resume_from_checkpoints or not os.path.isdir(cfg.output_dir):
        return None
    steps = [
        int(step)
        for name, _, step in (entry.rpartition("-") for entry in os.listdir(cfg.output_dir))
        if name == PREFIX_CHECKPOINT_DIR and step.isdigit()
    ]
    for step in sorted(steps, reverse=True):
        checkpoint = os.path.join(cfg.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")
        if os.path.exists(os.path.join(checkpoint, TRAINER_STATE_NAME)):
            return checkpoint
        LOG.warning("layersel: %s is incomplete (no %s) and is not resumed from", checkpoint, TRAINER_STATE_NAME)
    return None
