"""What every checkpoint of a run holds, on every engine."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from peft import PeftModel
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from axolotl_layersel import adapters, engines
from axolotl_layersel.l1ra.redistribution import RankRedistribution
from axolotl_layersel.plan import Plan, plan_path, write_plan


def complete_checkpoints(trainer: Trainer, plan: Plan | None, ranks: RankRedistribution | None) -> None:
    """Make every ``trainer.save_model`` leave a complete plain adapter, the plan, and what resuming needs.

    It is the one writer that checkpoints, the best model and the final save go through, and it runs before a
    checkpoint is pushed to a hub, which ``on_save`` does not.
    """
    upstream_save_model = trainer.save_model
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)

    def save_model(output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = Path(output_dir or trainer.args.output_dir)
        # With gates the files of PEFT itself would not be what the model computes: they are never written.
        with without_saving(model) if ranks else contextlib.nullcontext():
            upstream_save_model(output_dir, _internal_call=True)
        if ranks:
            weights = adapters.save_adapter(trainer, folder, ranks.fold)
            if engines.get_rank() == 0:
                model.create_or_update_model_card(str(folder))
                if folder.name.startswith(PREFIX_CHECKPOINT_DIR):
                    ranks.save(folder, weights)
        elif not engines.upstream_writes_adapter(trainer):
            adapters.save_adapter(trainer, folder)
        if plan and engines.get_rank() == 0:
            write_plan(plan, plan_path(folder))
        if trainer.args.push_to_hub and not _internal_call:
            trainer.push_to_hub(commit_message="Model save", revision=trainer.args.hub_revision)

    trainer.save_model = save_model
    if ranks:
        model.load_adapter = ranks.load_adapter(model.load_adapter)


@contextlib.contextmanager
def without_saving(model: PeftModel) -> Iterator[None]:
    """Let ``model.save_pretrained`` write nothing meanwhile."""
    nothing: Callable[..., None] = lambda *args, **kwargs: None  # noqa: E731
    model.save_pretrained = nothing
    try:
        yield
    finally:
        del model.save_pretrained
