"""Run Axolotl's real distributed engines (DDP, ZeRO-1/2/3, FSDP2) on a machine without a GPU.

The tests' YAML files list it first under ``plugins:``. It does nothing if CUDA is available.
Each patch, and why (seen with axolotl 0.19.0, torch 2.13.0, deepspeed 0.18.9, accelerate 1.13.0):

* accelerate picks no backend on a machine without a GPU unless ``ACCELERATE_USE_CPU`` is set, and with
  that variable a DeepSpeed run silently becomes DDP: the variable stays unset and gloo is named here.
* accelerate would ask ``torch.cuda`` for a device index, and Axolotl for a "cuda" mesh under FSDP2.
* gloo refuses to write into the autograd views that ZeRO-1/2 hand it; detached tensors share memory.
* DeepSpeed gathers several ZeRO-3 parameters at once and waits for the last only, which is right on NCCL,
  where operations end in order. On gloo it would read weights that have not arrived, so each one is waited for.
* DeepSpeed compiles an operation for a sum in shared memory, two minutes on a machine without it. Only inference calls
  it, and a run that is killed while it compiles leaves a lock on which all later ones wait forever.
* transformers and accelerate refuse bf16 without a GPU, although the CPU computes in it.
* Axolotl's ``device_map`` names a GPU in every run with several processes, and again for QLoRA on FSDP2.
* bitsandbytes 0.50 packs 4-bit weights again at their first use in evaluation mode if the CPU has
  instructions for bf16, and fails if a width is not a multiple of the block of 64. The check for such a CPU is off.
"""

import json
import os
import sys
from pathlib import Path

import accelerate.accelerator
import accelerate.state
import bitsandbytes.nn.modules
import torch
import transformers.training_args
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from axolotl.integrations.base import BasePlugin
from axolotl.loaders import ModelLoader


def _name_gloo(self, cpu=False, sagemaker_dp=False, backend=None):
    if int(os.environ.get("LOCAL_RANK", -1)) == -1:
        return None, None
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return "gloo", DistributedType.MULTI_GPU if fsdp else DistributedType.MULTI_CPU


def _patch() -> None:
    PartialState._prepare_backend = _name_gloo
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))

    build_device_mesh = ParallelismConfig.build_device_mesh
    ParallelismConfig.build_device_mesh = lambda self, device_type: build_device_mesh(self, "cpu")

    for module in (accelerate.accelerator, accelerate.state):
        module.is_bf16_available = lambda *args: True
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True

    set_device_map = ModelLoader._set_device_map_config

    def set_device_map_to_cpu(self):
        set_device_map(self)
        if self.is_qlora_and_fsdp_enabled:
            self.model_kwargs["device_map"] = {"": "cpu"}

    ModelLoader._set_device_map_config = set_device_map_to_cpu

    bitsandbytes.nn.modules.has_avx512bf16 = lambda: False

    from deepspeed.comm.torch import TorchBackend

    # The attribute `torch` of deepspeed.comm is PyTorch itself.
    sys.modules[TorchBackend.__module__].build_shm_op = lambda: None

    all_gather = TorchBackend.all_gather_into_tensor

    def all_gather_detached(self, output_tensor, input_tensor, group=None, async_op=False):
        work = all_gather(self, output_tensor.detach(), input_tensor.detach(), group=group, async_op=async_op)
        if work is not None:
            work.wait()
        return work

    TorchBackend.all_gather_into_tensor = all_gather_detached


if not torch.cuda.is_available():
    _patch()


class CpuEnginesPlugin(BasePlugin):
    """Lets a YAML file written for GPUs run on CPU processes, and records which engine ran."""

    def load_datasets(self, cfg, preprocess=False):
        if not torch.cuda.is_available():
            cfg.device_map = None

    def post_trainer_create(self, cfg, trainer):
        from axolotl_layersel.engines import find_engine

        accelerator = trainer.accelerator
        if accelerator.is_main_process:
            record = {
                "distributed_type": accelerator.distributed_type.value,
                "engine": find_engine(trainer).name,
                "processes": accelerator.num_processes,
            }
            Path(cfg.output_dir).mkdir(parents=True, exist_ok=True)
            (Path(cfg.output_dir) / "engine.json").write_text(json.dumps(record))
