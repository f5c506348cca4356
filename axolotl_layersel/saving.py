"""What every checkpoint of a run holds, on every engine."""

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from axolotl_layersel import nodes
from axolotl_layersel.contents import record_path, write_record
from axolotl_layersel.engines import collectives
from axolotl_layersel.l1ra.records import ranks_path
from axolotl_layersel.l1ra.redistribution import RankRedistribution
from axolotl_layersel.l1ra.state import state_path
from axolotl_layersel.plan import Plan, plan_path, write_plan
from axolotl_layersel.run import Run
from axolotl_layersel.selection.methods.flexora.records import gates_path
from axolotl_layersel.trainers import let_one_process_write, note_in_state, unwrap_model
from axolotl_layersel.writer import AdapterWriter

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
    """Let ``writer`` write every adapter of the run, with the plan beside it and, in a checkpoint, what resuming needs.

    There are three ways to save. ``trainer.save_model`` writes checkpoints, the best model, and the end on ZeRO-3; it
    runs before a push to a hub, as ``on_save`` does not. The model's ``save_pretrained`` writes the end on one process,
    DDP and ZeRO-1/2, from one process alone. Writers that gather shards themselves call what is returned.

    ``lora`` and ``given``: see ``contents.write_record``.

    Returns:
        What saves to a folder; every rank must call it.
    """
    trainer, model = run.trainer, run.model
    upstream_save_model = trainer.save_model
    upstream_save_pretrained = model.save_pretrained
    silent = False

    def save(folder: str | Path) -> None:
        folder = Path(folder)
        if ranks:  # SIGTERM asks for a checkpoint after the callbacks of the step
            ranks.check_finite(trainer.state.global_step)
        # Upstream takes a checkpoint for the best one where its folder is there, which it must be on every node.
        nodes.make_folder(folder)
        weights = writer.save(folder)
        note = collectives.decide_on_rank_zero(lambda: write_beside(folder, weights))
        if note:  # the Trainer's own state is written after this
            note_in_state(trainer, note)
        if trainer.args.save_on_each_node or not folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            nodes.share_files(run, folder, ADAPTER_FILES + list_records())

    def write_beside(folder: Path, weights: dict[str, torch.Tensor]) -> str | None:
        model.create_or_update_model_card(str(folder))
        is_checkpoint = folder.name.startswith(PREFIX_CHECKPOINT_DIR)
        if is_checkpoint:
            # An earlier run may have left a checkpoint of this step, which would seem to be one of this run.
            for path in list_unwritten(folder):
                path.unlink(missing_ok=True)
        if ranks and is_checkpoint:
            ranks.save(folder, weights)
        if plan:
            write_plan(plan, plan_path(folder))
        return write_record(folder, trainer.state.global_step, lora, given) if is_checkpoint else None

    def list_unwritten(folder: Path) -> list[Path]:
        return [*([] if plan else [plan_path(folder)]), *([] if ranks else [ranks_path(folder), state_path(folder)])]

    def save_model(output_dir: str | None = None, _internal_call: bool = False) -> None:
        nonlocal silent
        # Upstream writes everything but the adapter. Its adapter would ignore gates, lack frozen weights on ZeRO-3, and
        # be missing on FSDP2 with SHARDED_STATE_DICT.
        silent = True
        try:
            upstream_save_model(output_dir, _internal_call=True)
        finally:
            silent = False
        save(output_dir or run.output_dir)
        if trainer.args.push_to_hub and not _internal_call:
            trainer.push_to_hub(commit_message="Model save", revision=trainer.args.hub_revision)

    def save_pretrained(self: PeftModel, save_directory: str, is_main_process: bool = True, **options: Any) -> None:
        if self is not model:
            type(self).save_pretrained(self, save_directory, is_main_process=is_main_process, **options)
        elif options.get("state_dict") is not None and not silent:
            # The caller has gathered these weights for another program, which generates text with them.
            upstream_save_pretrained(save_directory, is_main_process=is_main_process, **options)
        elif is_main_process and not silent:
            writer.save_alone(save_directory)
            model.create_or_update_model_card(str(save_directory))

    let_one_process_write(trainer)
    trainer.save_model = save_model  # type: ignore[method-assign]  # of this trainer alone
    # A method, not a closure over the model: a deep copy of the model saves itself.
    model.save_pretrained = types.MethodType(save_pretrained, model)  # type: ignore[method-assign]
    if ranks:
        model.load_adapter = ranks.load_adapter(model.load_adapter)  # type: ignore[method-assign]
    return save


def list_records() -> list[str]:
    """Return the files of this package that may lie in the folder of a run or of a checkpoint, as paths in it."""
    return [str(path("")) for path in (plan_path, gates_path, ranks_path, state_path, record_path)]


def take_over_fsdp2_writer(trainer: Any) -> None:
    """Let ``trainer.save_adapter`` write what Axolotl's own writer of FSDP2 adapters would, past the trainer.

    Axolotl calls that at the end of every FSDP2 run, and for the checkpoints of one with a quantised base.
    """
    from axolotl.integrations.expert_parallel import shard

    upstream = getattr(shard.save_fsdp2_lora_adapter, "upstream", shard.save_fsdp2_lora_adapter)
    model: Any = unwrap_model(trainer)
    # Preference training hands the base model over.
    ours = (model, model.get_base_model())

    def save_fsdp2_lora_adapter(model: nn.Module, output_dir: str) -> bool:
        if not any(model is known for known in ours):
            return upstream(model, output_dir)
        trainer.save_adapter(output_dir)
        return True

    vars(save_fsdp2_lora_adapter)["upstream"] = upstream
    shard.save_fsdp2_lora_adapter = save_fsdp2_lora_adapter
