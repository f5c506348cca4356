"""The checks before the model loads, for the commands that train, plan and check."""

import math
from collections.abc import Callable
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
from axolotl_layersel.config.selection import DEFAULT_STACKS, DEFAULT_UNSELECTED, SelectionConfig, describe_two_stacks
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
    """Check a run before its model loads, and choose the checkpoint that it resumes from; a collective call.

    Args:
        cfg: Axolotl's configuration; ``resume_from_checkpoint`` is set to the chosen checkpoint.
        take_lock: locks the folder of the run.

    Raises:
        LayerselError: on every process, for settings that the run cannot honour.
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
    # Axolotl's own choice could be an incomplete checkpoint of a killed run.
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
    if reused is None:
        decide_on_rank_zero(lambda: check_layers(cfg, selection))
    if (reused[0].unselected if reused else selection.unselected or DEFAULT_UNSELECTED) == "remove":
        check_base_weights(cfg)


def load_config(cfg: Any) -> Any:
    """Return the configuration of the base model."""
    from axolotl.loaders.utils import load_model_config

    return load_model_config(cfg)


def check_fused_experts(cfg: Any) -> None:
    """Raise LayerselError for target modules that PEFT turns into expert parameters, which ZeRO-3 has split.

    Relied on in PEFT 0.20.0 (``tests/families/test_mixtures.py`` fails when it changes): the two tables of the
    conversion.
    """
    from peft.utils import transformers_weight_conversion as peft

    kind = peft._MODEL_TO_CONVERSION_PATTERN.get(load_config(cfg).model_type, "")
    fused = peft._MOE_TARGET_MODULE_MAPPING.get(kind, {})
    targets = cfg.lora_target_modules if isinstance(cfg.lora_target_modules, list) else []
    found = next((target for target in targets if target.rpartition(".")[2] in fused), None)
    if found is not None:
        raise LayerselError(describe_sharded_experts(f"lora_target_modules: {found!r} is of a mixture's experts"))


def find_reused(
    cfg: Any, settings: LayerselConfig, selection: SelectionConfig, resume_from: str | None
) -> tuple[Plan, str] | None:
    """Return the plan that a run reuses and its source, or None.

    Raises:
        LayerselError: if the plan is missing or damaged, or does not fit the YAML file and the model's configuration.
    """
    if resume_from is None and selection.plan is None:
        return None
    config = load_config(cfg)
    # These arguments may change the configuration when the model is built.
    shaped = isinstance(config, PreTrainedConfig) and not cfg.overrides_of_model_kwargs
    known = KnownRun(
        base_model=cfg.base_model,
        shape=describe_shape(config) if shaped else None,
        lora_r=cfg.lora_r,
        room=settings.l1ra.max_rank if settings.l1ra else None,
        rank_pattern=cfg.lora_rank_pattern,
        exponent=settings.scaling_exponent,
    )
    return find_plan(selection, resume_from, known)


def check_layers(cfg: Any, selection: SelectionConfig) -> None:
    """Raise LayerselError for stacks, layers or a number of layers that the base model lacks by its configuration.

    The selection checks this again on the model: the configuration may lack the number of layers, and LoRA may be in
    only some of them.
    """
    config, stacks = load_config(cfg), selection.stacks or DEFAULT_STACKS
    if stacks != DEFAULT_STACKS and not read_fact(config, "vision_config"):
        raise LayerselError(describe_missing_tower(stacks, cfg.base_model))
    sides = ENCODER_DECODER if loads_encoder_decoder(cfg) else STACKS[stacks]
    if selection.time is not None and sides == ENCODER_DECODER:
        raise LayerselError(describe_two_stacks(selection.time, cfg.base_model))
    chosen = {key: getattr(selection, key) or [] for key in ("layers", "candidates")}
    for key, layers in chosen.items():
        check_naming(key, layers, sides, stacks, cfg.base_model)
    counts = find_layer_counts(config, sides)
    if counts is None:
        return
    for key, layers in chosen.items():
        check_range(key, layers, counts)
    settings = selection.resolve(run_seed=0)
    # A default that keeps none is adapted, see ``fitting.fit_to_units``.
    if settings.granularity == "layer" and (selection.num_layers or selection.ratio):
        count_kept(settings, len(settings.candidates or name_layers(counts)))


def loads_encoder_decoder(cfg: Any) -> bool:
    """Return whether the model will have an encoder and a decoder, by its configuration and ``model_type``.

    Axolotl loads only the decoder of BART and others, unless ``model_type`` names another class.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = load_config(cfg)
    if cfg.type_of_model in (None, "AutoModelForCausalLM"):
        decoder_only = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not cfg.is_multimodal
    else:
        decoder_only = cfg.type_of_model.endswith("ForCausalLM")
    return bool(read_fact(config, "is_encoder_decoder")) and not decoder_only


def check_base_weights(cfg: Any) -> None:
    """Raise LayerselError if the initialisation changes base weights that cannot be restored exactly."""
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
    """Return ``init_lora_weights`` of the adapter in ``folder``; None if it is elsewhere, such as on a hub."""
    path = folder / "adapter_config.json"
    content = read_json("lora_model_dir", path, "Give the folder of an adapter.") if path.is_file() else None
    return content.get("init_lora_weights") if isinstance(content, dict) else None


def find_scaling(cfg: Any) -> float:
    """Return LoRA's scaling by ``lora_alpha`` and ``lora_r``."""
    return cfg.lora_alpha / (math.sqrt(cfg.lora_r) if cfg.peft_use_rslora else cfg.lora_r)
