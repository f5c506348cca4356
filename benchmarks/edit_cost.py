"""Measure the CPU time in which one process edits A, B, their fp32 masters and their moments when rank moves.

The matrices have the shapes of LoRA on all linear modules of Llama-70B. One of its 80 layers is edited and counted 80
times. On ZeRO-3 the process holds one of ``--processes`` flat partitions. On FSDP2 it holds whole DTensors, as the only
process.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed
from rich.console import Console
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from axolotl_layersel.engines.edits import Edit, edit_data, fill
from axolotl_layersel.engines.fsdp2 import find_start

# Outputs and inputs of a layer's modules.
MODULES = [(8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), (28672, 8192), (28672, 8192), (8192, 28672)]
LAYERS = 80
# Tensors to edit per matrix: the weights and two moments, and on ZeRO-3 the masters of the weights.
COPIES = {"ZeRO-3": 4, "FSDP2": 3}
CHANGED = torch.tensor([1, 5, 7])


def list_matrices(rank: int) -> list[tuple[torch.Size, Edit]]:
    """Return the shapes of A and B of every module of a layer, and edits of three components of each."""
    downs = [(torch.Size((rank, inputs)), fill(CHANGED, 0, 0)) for _, inputs in MODULES]
    ups = [(torch.Size((outputs, rank)), fill(CHANGED, 1, 0)) for outputs, _ in MODULES]
    return downs + ups


def time_layer(change: Callable[[], None], repeats: int) -> float:
    """Return the median CPU time of an edit in seconds, after one warm-up."""
    seconds = []
    for _ in range(repeats + 1):
        started = time.process_time()
        change()
        seconds.append(time.process_time() - started)
    return statistics.median(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=32, help="rank that modules have room for")
    parser.add_argument(
        "--processes", type=int, default=1024, help="number of processes that ZeRO-3 splits weights over"
    )
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    matrices = list_matrices(arguments.rank)

    parts = [torch.randn(-(-shape.numel() // arguments.processes)) for shape, _ in matrices]

    def change_parts() -> None:
        for part, (shape, edit) in zip(parts, matrices):
            for _ in range(COPIES["ZeRO-3"]):
                edit(part, 5 * part.numel(), shape)

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    shards = [distribute_tensor(torch.randn(shape), mesh, [Shard(0)]) for shape, _ in matrices]

    def change_shards() -> None:
        for shard, (shape, edit) in zip(shards, matrices):
            for _ in range(COPIES["FSDP2"]):
                edit_data(shard.to_local(), find_start(shard), shape, edit)

    console = Console()
    for name, change in (("ZeRO-3", change_parts), ("FSDP2", change_shards)):
        seconds = time_layer(change, arguments.repeats) * LAYERS
        console.print(f"{name}: {seconds:.2f} s for {LAYERS * len(MODULES)} modules")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
