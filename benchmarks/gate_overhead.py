"""Measure the overhead of the gates of ``l1ra`` on the host: the extra CPU time of a LoRA module with a gate.

The LoRA modules are so small that nearly all time is overhead of Python and PyTorch. The model runs forward and
backward in turn without gates, with gates, and without gates but with their gradients computed from those of A. The
result is the median of the rounds. A GPU hides this overhead if a module computes for longer.
"""

import argparse
import statistics
import time

import torch
from measuring import LORA_TARGETS
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from axolotl_layersel.engines.base import Engine
from axolotl_layersel.lora.gates import Gates
from axolotl_layersel.lora.modules import find_lora_modules

PLAIN, GATED, READ = "plain LoRA", "with gates", "gradients read"
WAYS = (PLAIN, GATED, READ)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=80, help="layers of seven modules each")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=arguments.layers,
        num_attention_heads=2,
        vocab_size=64,
        use_cache=False,
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=32, target_modules=LORA_TARGETS))
    modules = find_lora_modules(model.get_base_model())
    downs = {name: [module.lora_A["default"]] for name, module in modules.items()}
    gates = Gates(downs, 32, torch.device("cpu"))
    engine = Engine(None, "single")  # type: ignore[arg-type]  # products of gradients need no trainer
    tokens = torch.arange(8)[None]
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for round_ in range(arguments.rounds + 1):
        for way in WAYS:
            if way == GATED:
                gates.attach()
            started = time.process_time()
            model(input_ids=tokens, labels=tokens).loss.backward()
            if way == READ:
                engine.multiply_by_gradients([linear.weight for (linear,) in downs.values()])
            if round_:  # the first round is a warm-up
                seconds[way].append(time.process_time() - started)
            if way == GATED:
                gates.detach()
            model.zero_grad()
    console, plain = Console(), statistics.median(seconds[PLAIN])
    for way in WAYS:
        taken = statistics.median(seconds[way])
        more = (taken - plain) / len(modules) * 1e6
        console.print(f"{way:>14}: {taken:.3f} s for {len(modules)} modules, {more:.0f} µs a module over plain LoRA")


if __name__ == "__main__":
    main()
