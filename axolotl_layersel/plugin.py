"""The Axolotl plugin: hooks only. Which part of the package runs when."""

import logging
import math
from pathlib import Path

from axolotl.integrations.base import BasePlugin

from axolotl_layersel.args import AGREEING_KEYS, DEFAULT_UNSELECTED, LORA_KERNELS, LayerselBlock
from axolotl_layersel.errors import LayerselError
from axolotl_layersel.files import read_json
from axolotl_layersel.initialisation import changes_base, describe_continued, describe_rounding
from axolotl_layersel.lock import RunLock

LOG = logging.getLogger("axolotl.layersel")

# Seen in axolotl 0.19.0, ModelLoader._load_adapters: their trainers make the adapter themselves.
CONFIG_ONLY_TRAINERS = ("dpo", "ipo", "kto")


class LayerSelectionPlugin(BasePlugin):
    """Chooses the layers that LoRA trains before the run's engine is built, and moves rank while it trains."""

    def get_input_args(self) -> str:
        return "axolotl_layersel.args.LayerselArgs"

    def __init__(self) -> None:
        super().__init__()
        self.lock: RunLock | None = None
        self.repeat = 1  # choices that `axolotl-layersel plan --repeat` asks for

    def register(self, cfg: dict) -> None:
        """See the YAML file as the user wrote it: only here their LoRA kernels differ from Axolotl's own."""
        block = cfg.get("layersel")
        block = block if isinstance(block, dict) else {}
        # Here and not in the schema: dumped defaults hold None where nothing was written.
        for key in ("selection", "l1ra"):
            if key in block and block[key] is None:
                raise LayerselError(
                    f"layersel.{key}: the key is there but its block is blank. Write its settings below it, or remove "
                    "it; `l1ra: {}` takes the defaults."
                )
        if block.get("l1ra") is not None:
            switch_off_kernels(cfg)

    def load_datasets(self, cfg, preprocess: bool = False) -> None:
        """Check what only a training run needs; of all commands, ``train`` alone comes here, before the model."""
        if preprocess:
            return
        from axolotl.utils.distributed import init_distributed_state

        from axolotl_layersel import engines
        from axolotl_layersel.agreement import check_started_alike
        from axolotl_layersel.checkpoints import find_resumed_checkpoint
        from axolotl_layersel.files import check_output
        from axolotl_layersel.l1ra.records import ranks_path
        from axolotl_layersel.plan import plan_path
        from axolotl_layersel.prepare import check_resumed
        from axolotl_layersel.selection.flexora.records import gates_path
        from axolotl_layersel.selection.phase import check_continuing, check_encoder_decoder, find_plan

        init_distributed_state()
        settings = read_settings(cfg)
        names = [path("").name for path in (plan_path, ranks_path, gates_path)]
        check_started_alike({"layersel": settings.model_dump(), **{key: cfg.get(key) for key in AGREEING_KEYS}})
        engines.decide_on_rank_zero(lambda: check_output(cfg.output_dir, names))
        engines.decide_on_rank_zero(lambda: self.take_lock(cfg.output_dir))
        resume_from = find_resumed_checkpoint(
            settings, cfg.output_dir, cfg.resume_from_checkpoint, bool(cfg.auto_resume_from_checkpoints)
        )
        # Axolotl by itself would also resume from a checkpoint that a killed run left incomplete.
        cfg.resume_from_checkpoint = resume_from
        cfg.auto_resume_from_checkpoints = False
        engines.decide_on_rank_zero(lambda: check_resumed(settings, resume_from))
        selection = settings.selection
        reused = engines.decide_on_rank_zero(lambda: selection and find_plan(selection, resume_from, cfg.base_model))
        if cfg.lora_model_dir and cfg.rl in CONFIG_ONLY_TRAINERS:
            raise LayerselError(
                f"lora_model_dir: {cfg.lora_model_dir} is not loaded by Axolotl with rl: {cfg.rl.value}, "
                "which starts from a new adapter. Remove lora_model_dir, or merge that adapter into the base first."
            )
        if cfg.lora_model_dir and selection and reused is None:
            check_continuing(selection)
        if selection and reused is None and engines.decide_on_rank_zero(lambda: loads_encoder_decoder(cfg)):
            check_encoder_decoder(selection, cfg.base_model)
        if selection and (reused[0].unselected if reused else selection.unselected or DEFAULT_UNSELECTED) == "remove":
            check_base_weights(cfg)

    def post_trainer_create(self, cfg, trainer) -> None:
        from axolotl_layersel import engines
        from axolotl_layersel.kernels import without_fused_lora
        from axolotl_layersel.prepare import prepare_trainer

        settings = read_settings(cfg)
        engines.decide_on_rank_zero(self.confirm_lock)
        # Methods look into LoRA's modules; the run itself, and one that is given its plan, use the kernels.
        with without_fused_lora(trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)):
            prepare_trainer(
                trainer,
                settings,
                cfg.resume_from_checkpoint,
                continues_adapter=bool(cfg.lora_model_dir),
                lora_r=cfg.lora_r,
                scaling=find_scaling(cfg) if cfg.lora_model_dir and settings.l1ra else None,
                repeat=self.repeat,
            )
        take_over_fsdp2_writer(trainer)

    def post_train_unload(self, cfg) -> None:
        if self.lock is not None:
            self.lock.release()

    def take_lock(self, folder: str) -> None:
        """Let no other run write into ``folder`` until this process ends; on rank 0."""
        if self.lock is not None:
            self.lock.release()
        self.lock = RunLock.take(folder)

    def confirm_lock(self) -> None:
        """Raise LayerselError if another run has got the folder; on rank 0."""
        if self.lock is not None:
            self.lock.confirm()


def take_over_fsdp2_writer(trainer) -> None:
    """Let ``trainer.save_adapter`` write what Axolotl's own writer of FSDP2 adapters would, past the trainer.

    Axolotl calls that at the end of every FSDP2 run, and for the checkpoints of one with a quantised base.
    """
    from axolotl.integrations.expert_parallel import shard

    upstream = getattr(shard.save_fsdp2_lora_adapter, "upstream", shard.save_fsdp2_lora_adapter)
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    # Preference training hands the base model over.
    ours = (model, model.get_base_model())

    def save_fsdp2_lora_adapter(model, output_dir: str) -> bool:
        if not any(model is known for known in ours):
            return upstream(model, output_dir)
        trainer.save_adapter(output_dir)
        return True

    save_fsdp2_lora_adapter.upstream = upstream
    shard.save_fsdp2_lora_adapter = save_fsdp2_lora_adapter


def read_settings(cfg) -> LayerselBlock:
    """Return the validated ``layersel`` block of Axolotl's configuration."""
    return LayerselBlock.model_validate(cfg.layersel.to_dict())


def loads_encoder_decoder(cfg) -> bool:
    """Return whether the model will have an encoder and a decoder, as its configuration and ``model_type`` say.

    Of BART and others Axolotl loads the decoder alone, unless ``model_type`` names another class.
    """
    from axolotl.loaders.utils import load_model_config
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = load_model_config(cfg)
    if cfg.type_of_model in (None, "AutoModelForCausalLM"):
        decoder_alone = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not cfg.is_multimodal
    else:
        decoder_alone = cfg.type_of_model.endswith("ForCausalLM")
    return bool(getattr(config, "is_encoder_decoder", False)) and not decoder_alone


def check_base_weights(cfg) -> None:
    """Raise LayerselError where base weights that the initialisation changes could not be what they were again."""
    import torch

    from axolotl_layersel import engines

    if cfg.lora_model_dir:
        initial = engines.decide_on_rank_zero(lambda: read_initialisation(Path(cfg.lora_model_dir)))
        if changes_base(initial):
            raise LayerselError(describe_continued(initial, cfg.lora_model_dir))
        return
    quantised = next((key for key in ("load_in_4bit", "load_in_8bit", "gptq") if cfg[key]), None)
    found = f"{quantised} is on" if quantised else f"they are in {str(cfg.torch_dtype).removeprefix('torch.')}"
    if changes_base(cfg.peft_init_lora_weights) and (quantised or cfg.torch_dtype != torch.float32):
        raise LayerselError(describe_rounding(cfg.peft_init_lora_weights, found))


def read_initialisation(folder: Path) -> bool | str | None:
    """Return ``init_lora_weights`` of the adapter in ``folder``; None where it lies elsewhere, such as on a hub."""
    path = folder / "adapter_config.json"
    content = read_json("lora_model_dir", path, "Give the folder of an adapter.") if path.is_file() else None
    return content.get("init_lora_weights") if isinstance(content, dict) else None


def find_scaling(cfg) -> float:
    """Return the scaling that ``lora_alpha`` and ``lora_r`` ask for."""
    return cfg.lora_alpha / (math.sqrt(cfg.lora_r) if cfg.peft_use_rslora else cfg.lora_r)


def switch_off_kernels(cfg: dict) -> None:
    """Switch off the fused LoRA kernels that Axolotl would switch on by itself: they compute past gated modules.

    Args:
        cfg: the YAML file's content.

    Raises:
        LayerselError: if the user switched one on.
    """
    for key in LORA_KERNELS:
        if cfg.get(key):
            raise LayerselError(
                f"{key}: {cfg[key]} bypasses the modules that layersel.l1ra looks into. Remove {key}, or that setting."
            )
        cfg[key] = False
    LOG.info("layersel: l1ra switches off the fused LoRA kernels: %s", ", ".join(LORA_KERNELS))
