"""Make every way to save a model write a complete checkpoint or adapter, on every engine."""

import functools
import inspect
import os
import tempfile
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors.torch import load_file
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from axolotl_layersel.common.errors import warning_instead
from axolotl_layersel.common.paths import gates_path, list_pictures, plan_path, ranks_path, state_path
from axolotl_layersel.engines import collectives
from axolotl_layersel.engines.trainers import let_one_process_write, note_in_state, replacing, unwrap_model
from axolotl_layersel.l1ra.redistribution import RankRedistribution
from axolotl_layersel.lora.readers import AdapterFile, read_adapter_file
from axolotl_layersel.lora.run import Run
from axolotl_layersel.lora.writer import AdapterWriter
from axolotl_layersel.reports.model_card import Recipe, complete_card, describe_layers
from axolotl_layersel.reports.outcome import Outcome
from axolotl_layersel.selection.plan import Plan
from axolotl_layersel.selection.plan_file import write_plan
from axolotl_layersel.training import nodes
from axolotl_layersel.training.contents import record_path, write_record

ADAPTER_FILES = [SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME]


@dataclass
class RunSaves:
    """Every way to save the run's adapter: with the plan, and in a checkpoint the files to resume from.

    There are three ways to save. ``trainer.save_model`` writes checkpoints, the best model, and the final adapter on
    ZeRO-3; it runs before a push to a hub, ``on_save`` does not. The model's ``save_pretrained`` writes the final
    adapter on one process, DDP and ZeRO-1/2, where only one process calls it. Writers that gather shards themselves,
    such as Axolotl's for FSDP2, call ``save``.

    Attributes:
        run: a prepared one.
        writer: writes its adapter, and checks the file.
        plan: written next to the adapter.
        ranks: written next to it, and in a checkpoint the state to move them on from.
        lora: the settings of LoRA, see ``contents.write_record``.
        given: those of the YAML file, see there.
        recipe: how the choice was made, for model cards.
        file: the facts of the adapter's files that were written last, on process 0.
        silent: whether ``save_pretrained`` writes nothing for now.
    """

    run: Run
    writer: AdapterWriter
    plan: Plan | None
    ranks: RankRedistribution | None
    lora: dict[str, Any]
    given: dict[str, Any]
    recipe: Recipe
    file: AdapterFile | None = None
    silent: bool = False

    def install(self) -> None:
        """Let the trainer and its model save by this object."""
        trainer, model, ranks = self.run.trainer, self.run.model, self.ranks
        self.upstream_save_model = trainer.save_model
        self.upstream_save_pretrained = model.save_pretrained

        @functools.wraps(self.upstream_save_model)
        def save_model(output_dir: str | None = None, _internal_call: bool = False) -> None:
            self.save_model(output_dir, _internal_call)

        @functools.wraps(type(model).save_pretrained)
        def save_pretrained(model: PeftModel, *args: Any, **options: Any) -> None:
            self.save_pretrained(model, *args, **options)

        let_one_process_write(trainer)
        trainer.save_model = save_model  # type: ignore[method-assign]  # of this trainer only
        # A method, not a closure over the model, so that a deep copy of the model saves itself.
        model.save_pretrained = types.MethodType(save_pretrained, model)  # type: ignore[method-assign]

        @replacing(trainer, "create_model_card")
        def create_model_card(upstream: Callable, *args: Any, **options: Any) -> None:
            # Axolotl writes the card anew at the end, trainers of TRL also with checkpoints, and both before a push.
            upstream(*args, **options)
            if trainer.is_world_process_zero():
                self.complete_card(self.run.output_dir)

        if ranks:
            load_adapter = ranks.load_adapter(type(model).load_adapter)
            model.load_adapter = types.MethodType(load_adapter, model)  # type: ignore[method-assign]

    def save(self, folder: str | Path) -> None:
        """Save to a folder, and in a checkpoint's also the files to resume from; every process must call this."""
        trainer, folder = self.run.trainer, Path(folder)
        if self.ranks:  # SIGTERM requests a checkpoint after the callbacks of the step
            self.ranks.check_finite(trainer.state.global_step)
        # Upstream accepts a checkpoint as the best one only if its folder exists, which it must on every node.
        nodes.make_folder(folder)
        weights = self.writer.save(folder)
        note = collectives.decide_on_rank_zero(lambda: self.write_further_files(folder, weights))
        if note:  # the Trainer writes its own state after this
            note_in_state(trainer, note)
        if trainer.args.save_on_each_node or not folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            nodes.share_files(self.run, folder, ADAPTER_FILES + list_records())

    def write_further_files(self, folder: Path, weights: dict[str, torch.Tensor]) -> str | None:
        """Write all but the adapter, and return what ``contents.write_record`` does, None outside of checkpoints."""
        self.write_card(folder)
        is_checkpoint = folder.name.startswith(PREFIX_CHECKPOINT_DIR)
        if is_checkpoint:
            # The folder may be an earlier run's, whose files would seem to be of this run.
            stale = [] if self.plan else [plan_path(folder)]
            stale += [] if self.ranks else [ranks_path(folder), state_path(folder)]
            for path in stale:
                path.unlink(missing_ok=True)
        if self.ranks and is_checkpoint:
            self.ranks.save(folder, weights)
        if self.plan:
            write_plan(self.plan, plan_path(folder))
        step = self.run.trainer.state.global_step
        return write_record(folder, step, self.lora, self.given) if is_checkpoint else None

    def save_model(self, output_dir: str | None, internal: bool) -> None:
        """Do what ``Trainer.save_model`` does; ``internal``: whether the Trainer itself calls it."""
        trainer = self.run.trainer
        # Upstream writes all files but the adapter. Its adapter would ignore gates, lack frozen weights on ZeRO-3, and
        # be missing on FSDP2 with SHARDED_STATE_DICT.
        self.silent = True
        try:
            self.upstream_save_model(output_dir, _internal_call=True)
        finally:
            self.silent = False
        self.save(output_dir or self.run.output_dir)
        if trainer.args.push_to_hub and not internal:
            trainer.push_to_hub(commit_message="Model save", revision=trainer.args.hub_revision)

    def save_pretrained(self, model: PeftModel, *args: Any, **options: Any) -> None:
        """Do what ``PeftModel.save_pretrained`` does, for ``model`` or a deep copy of it."""
        given = find_arguments(type(model).save_pretrained, model, *args, **options)
        selected = given["selected_adapters"]
        selected = list(model.peft_config) if selected is None else list(selected)
        # The caller may have gathered weights for another program that generates text, or ask PEFT to convert factors.
        converts = given.get("state_dict") is not None or given["path_initial_model_for_weight_conversion"] is not None
        if model is not self.run.model:
            type(model).save_pretrained(model, *args, **options)
        elif self.silent:
            return
        elif converts or self.run.adapter not in selected:
            self.upstream_save_pretrained(*args, **options)
        else:
            others = [name for name in selected if name != self.run.adapter]
            if given["is_main_process"]:
                self.save_alone(
                    Path(given["save_directory"]), given["safe_serialization"], given["save_embedding_layers"]
                )
            if others:
                del given["self"]
                self.upstream_save_pretrained(**{**given, "selected_adapters": others})

    def save_alone(self, folder: Path, as_safetensors: bool, embeddings: bool | Literal["auto"]) -> None:
        """Save the adapter on this process only, as it calls ``save_pretrained``."""
        if as_safetensors:
            self.writer.save_alone(folder, embeddings)
        else:
            pickle_adapter(folder, lambda place: self.writer.save_alone(place, embeddings))
        self.write_card(folder)

    def write_card(self, folder: Path) -> None:
        """Write PEFT's model card to ``folder``, which holds the adapter, with the section on layer selection."""
        with warning_instead(f"the model card in {folder} cannot be written", "The adapter is complete."):
            self.run.model.create_or_update_model_card(str(folder))
        self.complete_card(folder, reads=True)

    def complete_card(self, folder: Path, reads: bool = False) -> None:
        """Write the section on layer selection into a model card, or log a warning: the adapter must not be lost.

        ``reads``: whether ``folder`` holds an adapter that was just written.
        """
        with warning_instead(f"the model card in {folder} lacks the section on layers", "The adapter is complete."):
            if reads:
                self.file = read_adapter_file(folder) if (folder / SAFETENSORS_WEIGHTS_NAME).exists() else None
            outcome = Outcome(self.plan, self.ranks.history if self.ranks else None, self.file)
            complete_card(folder, describe_layers(outcome, self.recipe))


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
    own = [path("") for path in (plan_path, gates_path, ranks_path, state_path, record_path)]
    return [str(path) for path in (*own, *list_pictures(""))]


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
