"""Fork training processes from one that has imported Axolotl already.

An ``axolotl`` process spends most of its time on imports. This server imports once, and then forks the processes
of every job with the environment that torchrun would set, so that a test takes only the time of the run itself.
The children run Axolotl's own entry points, and replace nothing of it.

Jobs come as JSON lines on standard input, ``{"id", "target", "args", "world", "env", "log", "port"}``;
answers go to standard output: ``{"id", "pids"}`` once started and ``{"id", "codes"}`` at the end. ``args`` may be a
list, one for each process. A job with ``nodes`` (see nodes.py) distributes its processes over them.
"""

import atexit
import ctypes
import gc
import importlib
import json
import os
import random
import sys
import threading
import traceback

import coverage
import numpy
import torch

from helpers.nodes import INTERFACE

# What runs import, also late in them. Imported by each process anew, it would take half of its time.
IMPORTED = [
    "accelerate",
    "axolotl.cli.checks",
    "axolotl.cli.config",
    "axolotl.cli.train",
    "axolotl.common.datasets",
    "axolotl.core.builders",
    "axolotl.integrations.expert_parallel.shard",
    "axolotl.model_support.qwen4_exp",
    "axolotl.monkeypatch.accelerate.fsdp2",
    "axolotl.monkeypatch.accelerate.fsdp2_quantized",
    "axolotl.monkeypatch.accelerate.parallelism_config",
    "axolotl.monkeypatch.attention.fa2_hub_kernel",
    "axolotl.monkeypatch.attention.large_head",
    "axolotl.monkeypatch.deepspeed_utils",
    "axolotl.monkeypatch.models.mamba_utils",
    "axolotl.monkeypatch.torchao_optim",
    "axolotl.monkeypatch.transformers.trainer_loss_calc",
    "axolotl.monkeypatch.transformers_fa_utils",
    "axolotl.train",
    "axolotl.utils.quantization",
    "bitsandbytes",
    "deepspeed",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "fsspec.implementations.chained",
    "peft.tuners.lora.bnb",
    "peft.utils.transformers_weight_conversion",
    "scipy.io",
    "torch.distributed.algorithms.ddp_comm_hooks.default_hooks",
    "torch.distributed.checkpoint.state_dict",
    "torch.utils.cpp_extension",
    "torch.utils.serialization.config",
    "transformers.hf_argparser",
    "transformers.models.gemma4.modeling_gemma4",
    "transformers.models.llama.modeling_llama",
    # The package, and what watches it. Runs that are started as users do import it anew.
    "axolotl_layersel.engines.fsdp2",
    "axolotl_layersel.engines.zero",
    "axolotl_layersel.plugin",
    "axolotl_layersel.selection.methods.cka",
    "axolotl_layersel.training.ending",
    "axolotl_layersel.training.preflight",
    "axolotl_layersel.training.prepare",
    "helpers.cpu_engines",
    "helpers.probe",
]
REPLY = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # the output of libraries must not mix with the answers
LOCK = threading.Lock()


def reply(**message) -> None:
    with LOCK:
        REPLY.write(json.dumps(message) + "\n")


def save_coverage() -> None:
    """Save the coverage of this process, if it is measured.

    Coverage's patch of ``os._exit`` would do so too, but also in processes that load data. There a thread of the plugin
    calls ``os._exit`` while the main thread may do so as well, and two threads that save at once crash the process.
    """
    measured = coverage.Coverage.current()
    if measured is not None:
        measured.save()


def enter(node: dict) -> None:
    """Move this process, which has one thread, to a node."""
    if node["holder"] is not None:
        libc = ctypes.CDLL(None, use_errno=True)
        for kind in ("net", "mnt", "uts"):
            handle = os.open(f"/proc/{node['holder']}/ns/{kind}", os.O_RDONLY)
            if libc.setns(handle, 0):
                raise OSError(ctypes.get_errno(), f"setns {kind}")
            os.close(handle)
        os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE
    os.chdir(node["folder"])


def run_child(job: dict, rank: int) -> None:
    """Run the target in this forked process and leave with its exit code."""
    os.setpgid(0, 0)
    atexit._clear()  # exit handlers that the server registered are for the server only
    log = os.open(f"{job['log']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(job["env"])
    if job["world"] > 1:
        nodes = job["nodes"] or [None]
        local = job["world"] // len(nodes)
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank % local),
            GROUP_RANK=str(rank // local),
            WORLD_SIZE=str(job["world"]),
            LOCAL_WORLD_SIZE=str(local),
            MASTER_ADDR=job["nodes"][0]["address"] if job["nodes"] else "127.0.0.1",
            MASTER_PORT=str(job["port"]),
        )
        if job["nodes"]:
            enter(nodes[rank // local])
    # A fork inherits the parent's random state, unlike processes that are started separately.
    random.seed()
    numpy.random.seed(int.from_bytes(os.urandom(4), "little"))
    torch.seed()
    sys.argv = [job["target"]]
    module, _, function = job["target"].partition(":")
    code = 1
    try:
        args = job["args"][rank] if isinstance(job["args"], list) else job["args"]
        getattr(importlib.import_module(module), function)(**args)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    save_coverage()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait(job: dict, pids: list[int]) -> None:
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    reply(id=job["id"], codes=codes)


def main() -> None:
    for name in IMPORTED:
        importlib.import_module(name)

    # Objects of the imports stay alive, so the garbage collector of the children can skip them.
    gc.collect()
    gc.freeze()
    reply(ready=True)
    for line in sys.stdin:
        job = json.loads(line)
        pids = []
        for rank in range(job["world"]):
            pid = os.fork()
            if pid == 0:
                run_child(job, rank)
            pids.append(pid)
        reply(id=job["id"], pids=pids)
        threading.Thread(target=wait, args=(job, pids), daemon=True).start()


if __name__ == "__main__":
    main()
