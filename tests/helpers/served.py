"""Three trained adapters of a small Llama, what PEFT computes with them, and what other programs make of their files.

The programs that do not run here are followed by ``update_as``: the change of each weight that their source computes.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from axolotl_layersel import LayerselConfig, prepare_trainer
from helpers.models import make_lora, make_small_llama, make_trainer

VOCABULARY, LAYER_COUNT = 97, 4
# vLLM computes attention on a CPU with heads of 32 and more, and llama.cpp quantises blocks of 32 numbers to 8 bits.
SIZE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
PROMPTS = [[3, 14, 15, 9, 26, 5, 35, 89, 79, 32], [7, 81, 42, 11], list(range(40, 60))]
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Half of the layers with one rank, ranks by score, and ranks that also move in training, followed by the scaling.
BLOCKS: dict[str, dict] = {
    "half": {"selection": {"method": "cka", "ratio": 0.5, "rank_allocation": "same", "num_samples": 16}},
    "gradient": {"selection": {"method": "gradient", "num_samples": 16, "budget": 0.5}},
    "gradient+l1ra": {"selection": {"method": "gradient", "num_samples": 16}, "l1ra": {}, "scaling_exponent": 0.5},
}
IGNORED = 0.1  # the least by which an adapter that is ignored shows in the log-probabilities
EXACT = 1e-4  # the most by which two programs in fp32 differ


@dataclass(frozen=True)
class Served:
    """A base model in ``base`` and adapters of it in folders of their own, with PEFT's log-probabilities.

    Attributes:
        base: the folder of the base model.
        adapters: the folders of the adapters, by their names in ``BLOCKS``.
        expected: log-probabilities of the token after each of ``PROMPTS``, (prompts, vocabulary), by adapter.
        plain: the same of the base model.
    """

    base: Path
    adapters: dict[str, Path]
    expected: dict[str, torch.Tensor]
    plain: torch.Tensor


def make_served(
    folder: Path,
    blocks: dict[str, dict] = BLOCKS,
    steps: int = 12,
    base_model: LlamaForCausalLM | None = None,
    rate: float = 2e-2,
) -> Served:
    """Train the adapters in ``folder`` and return them. ``base_model``: default, a small random Llama."""
    base = folder / "base"
    if base_model is None:
        base_model = make_small_llama(LAYER_COUNT, vocab_size=VOCABULARY, initializer_range=0.15, **SIZE)
    base_model.save_pretrained(base)
    adapters = {}
    for name, block in blocks.items():
        model = make_lora(load(base), TARGETS, lora_alpha=12, task_type="CAUSAL_LM")
        trainer = make_trainer(model, folder / name, max_steps=steps, learning_rate=rate, save_strategy="no")
        prepare_trainer(trainer, LayerselConfig.model_validate(block))
        trainer.train()
        trainer.save_model()
        adapters[name] = folder / name
    expected = {name: compute(PeftModel.from_pretrained(load(base), place)) for name, place in adapters.items()}
    return Served(base, adapters, expected, compute(load(base)))


def load(base: Path) -> LlamaForCausalLM:
    """Return the base model in fp32, in which it was written."""
    return LlamaForCausalLM.from_pretrained(base)


@torch.no_grad()
def compute(model: Any) -> torch.Tensor:
    """Return the log-probabilities of the token after each prompt, (prompts, vocabulary)."""
    rows = [model.eval()(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1) for prompt in PROMPTS]
    return torch.stack(rows)


# --- Programs that are followed, not run ----------------------------------------------------------------------------


def compute_as(reader: str, base: Path, adapter: Path) -> torch.Tensor:
    """Return the log-probabilities that a program computes with an adapter by its source.

    Raises:
        ValueError: if the program refuses the file.
    """
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    model = load(base)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, update in FOLLOWED[reader](config, split(tensors)).items():
            weights[f"{name}.weight"] += update
    return compute(model)


Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]


def split(tensors: dict[str, torch.Tensor]) -> Pairs:
    """Return A and B by the names of modules."""
    names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    return {
        name.removeprefix("base_model.model."): (tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"])
        for name in names
    }


def find_layer(name: str) -> int:
    return int(re.search(r"layers\.(\d+)\.", name)[1])


def update_as_old_vllm(config: dict, pairs: Pairs) -> dict[str, torch.Tensor]:
    """Follow vLLM 0.30, lora/peft_helper.py: one scaling, lora_alpha / r, for all."""
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    return {name: up @ down * scale for name, (down, up) in pairs.items()}


def update_as_tensorrt_llm(config: dict, pairs: Pairs) -> dict[str, torch.Tensor]:
    """Follow TensorRT-LLM, lora_manager.py: ``float(hf_config["lora_alpha"]) / effective_rank``."""
    power = 0.5 if config["use_rslora"] else 1
    return {name: up @ down * (config["lora_alpha"] / down.shape[0] ** power) for name, (down, up) in pairs.items()}


def update_as_tgi(config: dict, pairs: Pairs) -> dict[str, torch.Tensor]:
    """Follow TGI and LoRAX, adapters/lora.py, ``prepare_weights`` and ``load``, on one GPU.

    A type of module that one layer lacks is left out. The first type is scaled by lora_alpha / r; the padded rank
    then replaces r for all others.
    """
    rank, updates = config["r"], {}
    for kind in TARGETS:
        held = {name: pair for name, pair in pairs.items() if name.endswith(f".{kind}")}
        if {find_layer(name) for name in held} != set(range(LAYER_COUNT)):
            continue
        if len({down.shape[0] for down, _ in held.values()}) > 1:
            raise ValueError("stack expects each tensor to be equal size")
        scale = config["lora_alpha"] / (rank**0.5 if config["use_rslora"] else rank)
        updates |= {name: up @ down * scale for name, (down, up) in held.items()}
        own = next(iter(held.values()))[0].shape[0]
        rank = 8 if own <= 8 else (own + 15) // 16 * 16
    return updates


def update_as_sglang(config: dict, pairs: Pairs) -> dict[str, torch.Tensor]:
    """Follow SGLang 0.5.23, srt/lora/lora.py and mem_pool.py.

    It stacks q, k and v, and gate and up, and has one rank and one scaling.
    """
    if isinstance(config["target_modules"], str):
        raise ValueError("Only 'all' or 'all-linear' can be used as the string for target module")
    for number in sorted({find_layer(name) for name in pairs}):
        kinds = {name.rpartition(".")[2] for name in pairs if find_layer(name) == number}
        if "q_proj" in kinds:
            if "v_proj" not in kinds:
                raise KeyError(f"layers.{number}.self_attn.v_proj")
        elif kinds & {"k_proj", "v_proj"}:
            raise ValueError("Cannot find target module name for k_proj or v_proj")
        if "up_proj" in kinds and "gate_proj" not in kinds:
            raise ValueError("Cannot find target module name for up_proj")
    if any(down.shape[0] != config["r"] for down, _ in pairs.values()):
        raise ValueError("LoRA buffer shape does not match weight shape")
    return {name: up @ down * (config["lora_alpha"] / config["r"]) for name, (down, up) in pairs.items()}


FOLLOWED: dict[str, Callable[[dict, Pairs], dict[str, torch.Tensor]]] = {
    "vllm<0.32": update_as_old_vllm,
    "tensorrt-llm": update_as_tensorrt_llm,
    "tgi": update_as_tgi,
    "lorax": update_as_tgi,
    "sglang": update_as_sglang,
}
