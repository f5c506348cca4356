"""Forked processes that choose and train with a plain Trainer on an engine, and a comparison with one process."""

import copy
import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from axolotl_layersel.common.paths import plan_path
from axolotl_layersel.lora.run import Run
from axolotl_layersel.selection.plan import Plan
from axolotl_layersel.selection.plan_file import read_plan

# The arguments of the trainer on each engine.
ENGINE_ARGUMENTS = {
    "single": {},
    "ddp": {"ddp_find_unused_parameters": False},
    "zero3": {
        "deepspeed": {
            "zero_optimization": {
                "stage": 3,
                "overlap_comm": False,
                "contiguous_gradients": True,
                "stage3_param_persistence_threshold": 0,
                "stage3_gather_16bit_weights_on_model_save": False,
            },
            "gradient_clipping": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "train_batch_size": "auto",
        }
    },
    "fsdp2": {
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "state_dict_type": "FULL_STATE_DICT",
            "reshard_after_forward": True,
        },
    },
}


def make_arguments(engine: str, layer_classes: list[str]) -> dict:
    """Return arguments of a trainer under which two processes share the batches of one.

    ``layer_classes`` are the classes of layers that FSDP2 shards as one.
    """
    arguments = {"per_device_train_batch_size": 4 if engine == "single" else 2, **ENGINE_ARGUMENTS[engine]}
    if engine == "fsdp2":
        arguments = copy.deepcopy(arguments)
        arguments["fsdp_config"]["transformer_layer_cls_to_wrap"] = layer_classes
    return arguments


def train_and_record(trainer, folder: str) -> None:
    """Train, save, and write the name of the engine to ``folder``."""
    trainer.train()
    trainer.save_model()
    record = {"engine": Run.of(trainer).engine.name, "processes": trainer.accelerator.num_processes}
    if trainer.accelerator.is_main_process:
        (Path(folder) / "engine.json").write_text(json.dumps(record))


def launch_processes(zygote, function: str, engine: str, folder: Path, base, **arguments) -> Path:
    """Run ``function`` on the model ``base`` in each process of ``engine``, and return the folder with the results."""
    base.save_pretrained(folder / "base")
    arguments = {**arguments, "engine": engine, "base": str(folder / "base"), "folder": str(folder)}
    world, log = 1 if engine == "single" else 2, folder / "log"
    variables = {"ACCELERATE_USE_FSDP": "true"} if engine == "fsdp2" else {}
    codes = zygote.run(function, arguments, world, log, variables)
    assert codes == [0] * world, Path(f"{log}.0").read_text()[-5000:]
    assert json.loads((folder / "engine.json").read_text()) == {"engine": engine, "processes": world}
    return folder


def check_same_choices(alone: Path, shared: Path, engine: str, choices: Iterable[str], base) -> list[tuple[Plan, Plan]]:
    """Compare the choices and the last adapter of an engine with those of one process, and return the plans of both.

    ``base`` is a model into which stock PEFT loads the last adapter.
    """
    plans = [(read_plan(plan_path(alone / choice)), read_plan(plan_path(shared / choice))) for choice in choices]
    for one, other in plans:
        assert (one.engine, other.engine) == ("single", engine)
        assert (other.selected, other.modules, other.ranks) == (one.selected, one.modules, one.ranks)
        scores = [[layer.score for layer in plan.layers] for plan in (one, other)]
        # For tiny gradients Adam still takes LoRA steps as large as the learning rate, and their rounding depends on
        # the rows that are summed together. A gate's step here is 0.01.
        exactness = {"abs": 1e-3} if one.method == "flexora" else {"rel": 1e-4, "abs": 1e-6}
        assert scores[1] == pytest.approx(scores[0], **exactness)
        assert other.dataset_fingerprint == one.dataset_fingerprint and other.token == one.token
    last = list(choices)[-1]
    one, other = (load_file(folder / last / "adapter_model.safetensors") for folder in (alone, shared))
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, atol=1e-4, rtol=1e-3)
    rebuilt = PeftModel.from_pretrained(base, shared / last)
    assert any(value.any() for key, value in rebuilt.named_parameters() if "lora_B" in key)
    return plans


# The files that each engine reads to resume; a test removes them.
OPTIMIZER_STATES = {"zero3": "global_step*/*zero_pp_rank_1_mp_rank_00_optim_states.pt", "fsdp2": "optimizer.bin"}


def train_and_resume(engine: str, base: str, folder: str) -> None:
    """Train with a plain Trainer on an engine: uninterrupted, resumed, and resumed without one of the files.

    Before that, search with a model whose first layer has inputs without a gradient.
    """
    from transformers import LlamaForCausalLM

    import helpers.cpu_engines  # noqa: F401  # lets the engines run without a GPU
    from axolotl_layersel import L1RAConfig, LayerselConfig, LayerselError, SelectionConfig, prepare_trainer
    from helpers.models import make_lora, make_trainer

    saving = {"use_cpu": False, "save_strategy": "steps", "save_steps": 2}
    arguments = {**make_arguments(engine, ["LlamaDecoderLayer"]), **saving}
    selection = SelectionConfig(method="cosine", num_samples=8, ratio=0.5)
    block = LayerselConfig(
        selection=selection, l1ra=L1RAConfig(update_ratio=0.25, last_update_ratio=0.8, move_ratio=0.3)
    )

    def make(place: str):
        def load(arguments):
            # From a file, because ZeRO-3 then shards it at once.
            return make_lora(LlamaForCausalLM.from_pretrained(base, dtype=torch.float32))

        return make_trainer(load, Path(folder) / place, **arguments)

    search = SelectionConfig(method="flexora", ratio=0.5, flexora={"steps": 2, "val_samples": 4})
    prepare_trainer(make("searched"), LayerselConfig(selection=search))
    trainer = make("whole")
    prepare_trainer(trainer, block)
    train_and_record(trainer, folder)
    checkpoint = Path(folder) / "whole" / "checkpoint-2"
    resumed = make("resumed")
    prepare_trainer(resumed, block, resume_from=str(checkpoint))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    resumed.save_model()

    refused = make("refused")
    resumed.accelerator.wait_for_everyone()
    if resumed.accelerator.is_main_process:
        (lost,) = checkpoint.glob(OPTIMIZER_STATES[engine])
        lost.unlink()
    resumed.accelerator.wait_for_everyone()
    with pytest.raises(LayerselError) as caught:
        prepare_trainer(refused, block, resume_from=str(checkpoint))
    (Path(folder) / f"refusal-{resumed.args.process_index}").write_text(str(caught.value))
