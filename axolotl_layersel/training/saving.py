"""Make every way to save a model write a complete checkpoint or adapter, on every engine."""

import functools
import inspect
import os
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors.torch import load_file
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from axolotl_layersel.common.paths import gates_path, plan_path, ranks_path, state_path
from axolotl_layersel.engines import collectives
from axolotl_layersel.engines.trainers import let_one_process_write, note_in_state, unwrap_model
from axolotl_layersel.l1ra.redistribution import RankRedistribution
from axolotl_layersel.lora.run import Run
from axolotl_layersel.lora.writer import AdapterWriter
from axolotl_layersel.selection.plan import Plan
from axolotl_layersel.selection.plan_file import write_plan
from axolotl_layersel.training import nodes
from axolotl_layersel.training.contents import record_path, write_record

Save = Callable[[str | Path], None]
ADAPTER_FILES = [SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME]


def complete_saves(
    run: Run,
    writer: AdapterWriter,
    plan: Plan | None,
    ranks: RankRedistribution | None,
    lora: dict[str, Any],
    given: dict[str, Any],
) -> Save:
    """Make ``writer`` write every adapter of the run, with the plan and, in a checkpoint, the files to resume from.

    There are three ways to save. ``trainer.save_model`` writes checkpoints, the best model, and the final adapter on
    ZeRO-3; it runs before a push to a hub, ``on_save`` does not. The model's ``save_pretrained`` writes the final
    adapter on one process, DDP and ZeRO-1/2, where only one process calls it. Writers that gather shards themselves,
    such as Axolotl's for FSDP2, call the returned function.

    ``lora`` and ``given``: see ``contents.write_record``.

    Returns:
        The function that saves to a folder; every process must call it.
    """
    trainer, model = run.trainer, run.model
    upstream_save_model = trainer.save_model
    upstream_save_pretrained = model.save_pretrained
    silent = False

    def save(folder: str | Path) -> None:
        folder = Path(folder)
        if ranks:  # SIGTERM requests a checkpoint after the callbacks of the step
            ranks.check_finite(trainer.state.global_step)
        # Upstream accepts a checkpoint as the best one only if its folder exists, which it must on every node.
        nodes.make_folder(folder)
        weights = writer.save(folder)
        note = collectives.decide_on_rank_zero(lambda: write_further_files(folder, weights))
        if note:  # the Trainer writes its own state after this
            note_in_state(trainer, note)
        if trainer.args.save_on_each_node or not folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            nodes.share_files(run, folder, ADAPTER_FILES + list_records())

    def write_further_files(folder: Path, weights: dict[str, torch.Tensor]) -> str | None:
        model.create_or_update_model_card(str(folder))
        is_checkpoint = folder.name.startswith(PREFIX_CHECKPOINT_DIR)
        if is_checkpoint:
            # The folder may be an earlier run's, whose files would seem to be of this run.
            stale = ([] if plan else [plan_path(folder)]) + ([] if ranks else [ranks_path(folder), state_path(folder)])
            for path in stale:
                path.unlink(missing_ok=True)
        if ranks and is_checkpoint:
            ranks.save(folder, weights)
        if plan:
            write_plan(plan, plan_path(folder))
        return write_record(folder, trainer.state.global_step, lora, given) if is_checkpoint else None

    @functools.wraps(upstream_save_model)
    def save_model(output_dir: str | None = None, _internal_call: bool = False) -> None:
        nonlocal silent
        # Upstream writes all files but the adapter. Its adapter would ignore gates, lack frozen weights on ZeRO-3, and
        # be missing on FSDP2 with SHARDED_STATE_DICT.
        silent = True
        try:
            upstream_save_model(output_dir, _internal_call=True)
        finally:
            silent = False
        save(output_dir or run.output_dir)
        if trainer.args.push_to_hub and not _internal_call:
            trainer.push_to_hub(commit_message="Model save", revision=trainer.args.hub_revision)

    @functools.wraps(type(model).save_pretrained)
    def save_pretrained(self: PeftModel, *args: Any, **options: Any) -> None:
        given = find_arguments(type(self).save_pretrained, self, *args, **options)
        selected = given["selected_adapters"]
        selected = list(self.peft_config) if selected is None else list(selected)
        # The caller may have gathered weights for another program that generates text, or ask PEFT to convert factors.
        converts = given.get("state_dict") is not None or given["path_initial_model_for_weight_conversion"] is not None
        if self is not model:
            type(self).save_pretrained(self, *args, **options)
        elif silent:
            return
        elif converts or run.adapter not in selected:
            upstream_save_pretrained(*args, **options)
        else:
            others = [name for name in selected if name != run.adapter]
            if given["is_main_process"]:
                save_alone(Path(given["save_directory"]), given["safe_serialization"], given["save_embedding_layers"])
            if others:
                del given["self"]
                upstream_save_pretrained(**{**given, "selected_adapters": others})

    def save_alone(folder: Path, as_safetensors: bool, embeddings: bool | Literal["auto"]) -> None:
        if as_safetensors:
            writer.save_alone(folder, embeddings)
        else:
            pickle_adapter(folder, lambda place: writer.save_alone(place, embeddings))
        model.create_or_update_model_card(str(folder))

    let_one_process_write(trainer)
    trainer.save_model = save_model  # type: ignore[method-assign]  # of this trainer only
    # A method, not a closure over the model, so that a deep copy of the model saves itself.
    model.save_pretrained = types.MethodType(save_pretrained, model)  # type: ignore[method-assign]
    if ranks:
        load_adapter = ranks.load_adapter(type(model).load_adapter)
        model.load_adapter = types.MethodType(load_adapter, model)  # type: ignore[method-assign]
    return save


def find_arguments(function: Callable, *args: Any, **options: Any) -> dict[str, Any]:
    """Return the arguments of a call by parameter name, including defaults."""
    bound = inspect.signature(function).bind(*args, **options)
    bound.apply_defaults()
    further = bound.arguments.pop("kwargs", {})
    return {**bound.arguments, **further}


def pickle_adapter(folder: Path, save: Callable[[Path], None]) -> None:
    """Write the adapter that ``save`` writes and checks to ``folder``, in PEFT's older format."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".layersel-") as place:
        temporary = Path(place)
        save(temporary)
        torch.save(load_file(temporary / SAFETENSORS_WEIGHTS_NAME), temporary / WEIGHTS_NAME)
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            os.replace(temporary / name, folder / name)


def list_records() -> list[str]:
    """Return the files of this package in the folder of a run or of a checkpoint, as paths in it."""
    return [str(path("")) for path in (plan_path, gates_path, ranks_path, state_path, record_path)]


def take_over_fsdp2_writer(trainer: Any) -> None:
    """Make Axolotl's writer of FSDP2 adapters, which bypasses the trainer, call ``trainer.save_adapter``.

    Axolotl calls it at the end of every FSDP2 run, and for the checkpoints of one with a quantised base.
    """
    from axolotl.integrations.expert_parallel import shard

    upstream = getattr(shard.save_fsdp2_lora_adapter, "upstream", shard.save_fsdp2_lora_adapter)
    model: Any = unwrap_model(trainer)
    # Preference training passes the base model.
    ours = (model, model.get_base_model())

    @functools.wraps(upstream)
    def save_fsdp2_lora_adapter(model: nn.Module, output_dir: str) -> bool:
        if not any(model is known for known in ours):
            return upstream(model, output_dir)
        trainer.save_adapter(output_dir)
        return True

    vars(save_fsdp2_lora_adapter)["upstream"] = upstream
    shard.save_fsdp2_lora_adapter = save_fsdp2_lora_adapter
