"""The checks of a training run before its model loads. Of all commands, only ``train`` comes here."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.files import check_output, read_json
from axolotl_layersel.config.engines import find_engine_name
from axolotl_layersel.config.experts import describe_sharded_experts
from axolotl_layersel.config.facts import read_fact
from axolotl_layersel.config.gate_requirements import check_kernels
from axolotl_layersel.config.initialisation import changes_base, describe_continued, describe_rounding
from axolotl_layersel.config.layer_names import ENCODER_DECODER, STACKS, name_layers
from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.config.selection import DEFAULT_STACKS, DEFAULT_UNSELECTED, SelectionConfig
from axolotl_layersel.engines.collectives import decide_on_rank_zero
from axolotl_layersel.engines.trainers import CONFIG_ONLY_TRAINERS
from axolotl_layersel.lora.layers import describe_missing_tower, find_layer_counts
from axolotl_layersel.selection.candidates import check_naming, check_range, count_kept
from axolotl_layersel.selection.plan import Plan
from axolotl_layersel.selection.provenance import describe_shape
from axolotl_layersel.selection.reuse import KnownRun, find_plan
from axolotl_layersel.selection.select import check_continuing
from axolotl_layersel.training.checkpoints import find_resumed_checkpoint
from axolotl_layersel.training.contents import describe_yaml
from axolotl_layersel.training.prepare import OUTPUT_FILES, check_resumed, pass_over_unread
from axolotl_layersel.training.process_agreement import AGREEING_KEYS, check_started_alike


def read_settings(cfg: Any) -> LayerselConfig:
    """Return the validated ``layersel`` block of Axolotl's configuration."""
    return LayerselConfig.model_validate(cfg.layersel.to_dict())


def check_before_model(cfg: Any, take_lock: Callable[[str], None]) -> None:
    """Check what can be known before the model loads, and settle which checkpoint is resumed; every rank calls this.

    Args:
        cfg: Axolotl's configuration, in which the checkpoint that is resumed is named afterwards.
        take_lock: lets no other run write into a folder.

    Raises:
        LayerselError: on every rank, where something cannot be honoured.
    """
    settings = pass_over_unread(read_settings(cfg))
    if not torch.accelerator.is_available():
        check_kernels(cfg)
    check_started_alike({"layersel": settings.model_dump(), **{key: cfg.get(key) for key in AGREEING_KEYS}})
    decide_on_rank_zero(lambda: check_output(cfg.output_dir, OUTPUT_FILES))
    decide_on_rank_zero(lambda: take_lock(cfg.output_dir))
    resume_from = find_resumed_checkpoint(
        settings, cfg.output_dir, cfg.resume_from_checkpoint, bool(cfg.auto_resume_from_checkpoints)
    )
    # Axolotl by itself would also resume from a checkpoint that a killed run left incomplete.
    cfg.resume_from_checkpoint = resume_from
    cfg.auto_resume_from_checkpoints = False
    decide_on_rank_zero(lambda: check_resumed(settings, resume_from, describe_yaml(cfg)))
    if cfg.lora_model_dir and cfg.rl in CONFIG_ONLY_TRAINERS:
        raise LayerselError(
            f"lora_model_dir: {cfg.lora_model_dir} is not loaded by Axolotl with rl: {cfg.rl.value}, "
            "which starts from a new adapter. Remove lora_model_dir, or merge that adapter into the base first."
        )
    if find_engine_name(cfg) == "zero3":
        decide_on_rank_zero(lambda: check_fused_experts(cfg))
    selection = settings.selection
    if selection is None:
        return
    reused = decide_on_rank_zero(lambda: find_reused(cfg, settings, selection, resume_from))
    if cfg.lora_model_dir and reused is None:
        check_continuing(selection)
    stacks = selection.stacks or DEFAULT_STACKS
    if reused is None and stacks != DEFAULT_STACKS:
        decide_on_rank_zero(lambda: check_vision(cfg, stacks))
    if reused is None:
        has_decoder = decide_on_rank_zero(lambda: loads_encoder_decoder(cfg))
        sides = ENCODER_DECODER if has_decoder else STACKS[stacks]
        for key in ("layers", "candidates"):
            check_naming(key, getattr(selection, key) or [], sides, stacks, cfg.base_model)
        decide_on_rank_zero(lambda: check_layers_exist(cfg, selection, sides))
    if (reused[0].unselected if reused else selection.unselected or DEFAULT_UNSELECTED) == "remove":
        check_base_weights(cfg)


def check_fused_experts(cfg: Any) -> None:
    """Raise LayerselError for target modules that PEFT makes expert parameters of, which ZeRO-3 has split.

    Relied on in PEFT 0.20.0 (``tests/families/test_mixtures.py`` fails when it changes): the two tables by which it
    does that.
    """
    from axolotl.loaders.utils import load_model_config
    from peft.utils import transformers_weight_conversion as peft

    kind = peft._MODEL_TO_CONVERSION_PATTERN.get(load_model_config(cfg).model_type, "")
    fused = peft._MOE_TARGET_MODULE_MAPPING.get(kind, {})
    targets = cfg.lora_target_modules if isinstance(cfg.lora_target_modules, list) else []
    found = next((target for target in targets if target.rpartition(".")[2] in fused), None)
    if found is not None:
        raise LayerselError(describe_sharded_experts(f"lora_target_modules: {found!r} is of a mixture's experts"))


def find_reused(
    cfg: Any, settings: LayerselConfig, selection: SelectionConfig, resume_from: str | None
) -> tuple[Plan, str] | None:
    """Return the plan that a run reuses and where it is from, None where it reuses none.

    Raises:
        LayerselError: if it is missing or damaged, or not for what the YAML file and the model's configuration say.
    """
    from axolotl.loaders.utils import load_model_config

    if resume_from is None and selection.plan is None:
        return None
    config = load_model_config(cfg)
    # Such arguments may change the configuration as the model is built from it.
    shaped = isinstance(config, PreTrainedConfig) and not cfg.overrides_of_model_kwargs
    known = KnownRun(
        base_model=cfg.base_model,
        shape=describe_shape(config) if shaped else None,
        lora_r=cfg.lora_r,
        room=settings.l1ra.max_rank if settings.l1ra else None,
        rank_pattern=cfg.lora_rank_pattern,
    )
    return find_plan(selection, resume_from, known)


def check_vision(cfg: Any, stacks: str) -> None:
    """Raise LayerselError where ``stacks`` asks for a vision tower and the base model's configuration has none."""
    from axolotl.loaders.utils import load_model_config

    if not read_fact(load_model_config(cfg), "vision_config"):
        raise LayerselError(describe_missing_tower(stacks, cfg.base_model))


def check_layers_exist(cfg: Any, selection: SelectionConfig, sides: Sequence[str]) -> None:
    """Raise LayerselError for layers, or a number of them, that the base model's configuration says it has not.

    Where that does not say how many layers there are, or LoRA is in some of them only, the model will.

    Args:
        cfg: Axolotl's configuration.
        selection: the ``selection`` block.
        sides: of the layers that are chosen among, see ``layers.find_layer_counts``.
    """
    from axolotl.loaders.utils import load_model_config

    counts = find_layer_counts(load_model_config(cfg), sides)
    if counts is None:
        return
    for key in ("layers", "candidates"):
        check_range(key, getattr(selection, key) or [], counts)
    settings = selection.resolve(run_seed=0)
    # A default that keeps none adapts itself, see ``fitting.fit_to_units``.
    if settings.granularity == "layer" and (selection.num_layers or selection.ratio):
        count_kept(settings, len(settings.candidates or name_layers(counts)))


def loads_encoder_decoder(cfg: Any) -> bool:
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
    return bool(read_fact(config, "is_encoder_decoder")) and not decoder_alone


def check_base_weights(cfg: Any) -> None:
    """Raise LayerselError where base weights that the initialisation changes could not be what they were again."""
    if cfg.lora_model_dir:
        initial = decide_on_rank_zero(lambda: read_initialisation(Path(cfg.lora_model_dir)))
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


def find_scaling(cfg: Any) -> float:
    """Return the scaling that ``lora_alpha`` and ``lora_r`` ask for."""
    return cfg.lora_alpha / (math.sqrt(cfg.lora_r) if cfg.peft_use_rslora else cfg.lora_r)
