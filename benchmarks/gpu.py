"""Check and measure on GPUs: gates in fused kernels and across processes, step times and peak memory.

``gpu.sh`` starts it with one process per GPU. The model has the shapes of Llama-3.2-1B and random weights. Each arm
trains it for some steps with a plain Trainer, on NCCL if there are several processes. The arms are plain LoRA, stock
PEFT in half of the layers, AdaLoRA, and this package, with and without Axolotl's fused LoRA kernels.
"""

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from axolotl.monkeypatch import lora_kernels
from axolotl.utils.dict import DictDefault
from measuring import LORA_TARGETS, MIB, PeakMemory, StepTimer, draw_rows, run_quietly
from peft import AdaLoraConfig, LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.engines import collectives
from axolotl_layersel.engines.moments import find_moments, unwrap_optimizer
from axolotl_layersel.l1ra.callback import RankCallback
from axolotl_layersel.l1ra.redistribution import RankRedistribution
from axolotl_layersel.lora.gates import Gates
from axolotl_layersel.lora.kernels import give_gates_to_kernels, while_choosing, without_fused_lora
from axolotl_layersel.training.prepare import prepare_trainer

KERNELS = {"lora_qkv_kernel": True, "lora_o_kernel": True, "lora_mlp_kernel": True}
WARMUP_STEPS = 3
# fp32 in a different order, without TF32.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        kernels: whether Axolotl's fused LoRA kernels are on.
        highest: whether plain LoRA has the rank that l1ra has room for.
        half: whether stock PEFT has LoRA only in the upper half of the layers.
        block: the settings of the package.
        optimizer: the name of the optimizer for the Trainer.
    """

    kernels: bool = False
    highest: bool = False
    half: bool = False
    adalora: bool = False
    block: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "adamw_torch_fused"


HALF = {"selection": {"method": "last", "ratio": 0.5}}
ARMS = {
    "lora": Arm(),
    "lora, kernels": Arm(kernels=True),
    "lora at max_rank": Arm(highest=True),
    "lora at max_rank, kernels": Arm(highest=True, kernels=True),
    "l1ra": Arm(block={"l1ra": {}}),
    "l1ra, kernels": Arm(block={"l1ra": {}}, kernels=True),
    "l1ra by pressure, kernels": Arm(block={"l1ra": {"rule": "pressure"}}, kernels=True),
    "l1ra, kernels, adamw_bnb_8bit": Arm(block={"l1ra": {}}, kernels=True, optimizer="adamw_bnb_8bit"),
    "l1ra, kernels, paged_adamw_8bit": Arm(block={"l1ra": {}}, kernels=True, optimizer="paged_adamw_8bit"),
    "l1ra, kernels, paged_adamw_32bit": Arm(block={"l1ra": {}}, kernels=True, optimizer="paged_adamw_32bit"),
    "adalora": Arm(adalora=True),
    "half by stock peft": Arm(half=True),
    "half by last": Arm(block=HALF),
    "half by last, kernels": Arm(block=HALF, kernels=True),
    "half by cka, kernels": Arm(block={"selection": {"method": "cka", "num_samples": 16, "ratio": 0.5}}, kernels=True),
    "ranks by gradient, kernels": Arm(block={"selection": {"method": "gradient", "num_samples": 16}}, kernels=True),
    "half by flexora": Arm(
        block={"selection": {"method": "flexora", "ratio": 0.5, "flexora": {"steps": 6, "val_samples": 16}}},
        kernels=True,
    ),
}


def make_config(arguments: argparse.Namespace) -> LlamaConfig:
    """Return the configuration of Llama-3.2-1B, or of the size on the command line."""
    heads = max(1, arguments.hidden_size // 64)
    return LlamaConfig(
        hidden_size=arguments.hidden_size,
        intermediate_size=4 * arguments.hidden_size,
        num_hidden_layers=arguments.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        vocab_size=arguments.vocabulary,
        tie_word_embeddings=True,
        use_cache=False,
    )


def put_kernels_on(model: PeftModel | PeftMixedModel, device: str) -> None:
    """Patch a model with Axolotl's fused LoRA kernels, as Axolotl does; the kernel for the MLP needs a GPU."""
    wanted = {**KERNELS, "lora_mlp_kernel": device == "cuda"}
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        lora_kernels.patch_self_attn_lora(DictDefault({**wanted, "base_model": folder}))
    lora_kernels.apply_lora_kernel_patches(model, DictDefault(wanted))


def watch_moments(ranks: RankRedistribution) -> list[int]:
    """Compare the moments before and after each update, and return a list of how many values each update clears.

    Raises:
        RuntimeError: in training, if a cleared value is not zero, or another value changes.
    """
    engine, counts = ranks.run.engine, []
    zero_moments = engine.zero_moments

    def watched(parameter: torch.Tensor, components: torch.Tensor, dim: int) -> None:
        state = unwrap_optimizer(ranks.run.trainer.optimizer).state.get(parameter, {})
        moments = find_moments(state, "its optimizer") if state else []
        before = [moment.values.clone() for moment in moments]
        zero_moments(parameter, components, dim)
        for moment, values in zip(moments, before):
            expected = values.index_fill(dim, components.to(values.device), moment.zero)
            if not torch.equal(moment.values, expected):
                raise RuntimeError(f"{moment.name} differs in more than the {len(components)} cleared components")
            counts.append(int((expected != values).sum()))

    engine.zero_moments = watched
    return counts


def make_arm(arguments: argparse.Namespace, arm: Arm, folder: str) -> tuple[Trainer, StepTimer]:
    """Return the trainer of an arm."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    with torch.device(arguments.device):
        base: Any = LlamaForCausalLM(make_config(arguments))
        base.to(dtype)
    rank = 2 * arguments.rank if arm.highest else arguments.rank
    settings: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": LORA_TARGETS}
    if arm.adalora:
        steps = {"tinit": 1, "tfinal": 2, "deltaT": 2, "total_step": arguments.steps}
        model = get_peft_model(base, AdaLoraConfig(init_r=2 * rank, target_r=rank, **steps, **settings))
    else:
        upper = list(range(arguments.layers // 2, arguments.layers)) if arm.half else None
        settings |= {"layers_to_transform": upper, "layers_pattern": "layers" if upper else None}
        model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, **settings))
    model.enable_input_require_grads()
    # After an arm with kernels the attention class stays patched; without kernels it calls the LoRA modules.
    lora_kernels.apply_lora_kernel_patches(model, DictDefault({}))
    if arm.kernels:
        put_kernels_on(model, arguments.device)
    timer = StepTimer(arguments.device, None)
    values = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=arguments.batch_size,
        max_steps=arguments.steps,
        learning_rate=1e-4,
        optim=arm.optimizer,
        bf16=arguments.device == "cuda",
        use_cpu=arguments.device == "cpu",
        seed=0,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        gradient_checkpointing=arguments.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if arguments.checkpointing else None,
        ddp_find_unused_parameters=False,
    )
    rows = draw_rows(arguments, arguments.tokens, 64)
    trainer = Trainer(model.to(arguments.device), values, train_dataset=rows)
    if arm.adalora:
        trainer.add_callback(Allocation())
    return trainer, timer


class Allocation(TrainerCallback):
    """Calls AdaLoRA's allocation of rank after each step."""

    def on_optimizer_step(self, args, state, control, model, **kwargs) -> None:
        getattr(model, "module", model).base_model.update_and_allocate(state.global_step + 1)


def run_arm(arguments: argparse.Namespace, arm: Arm) -> dict[str, Any]:
    """Train an arm, and return its times, memory and results."""
    # All processes need the same folder, and cannot communicate before the trainer exists.
    with tempfile.TemporaryDirectory() as parent, contextlib.ExitStack() as stack:
        stack.callback(os.chdir, os.getcwd())
        os.chdir(parent)
        trainer, timer = make_arm(arguments, arm, "run")
        with PeakMemory(arguments.device) as choosing:
            if arm.block:
                block = LayerselConfig.model_validate(arm.block)
                with while_choosing(trainer, block.selection):
                    prepare_trainer(trainer, block)
        callbacks = trainer.callback_handler.callbacks
        redistributions = [callback.ranks for callback in callbacks if isinstance(callback, RankCallback)]
        zeroed = [watch_moments(ranks) for ranks in redistributions]
        trainer.add_callback(timer)
        with PeakMemory(arguments.device) as training:
            trainer.train()
    mine = {name: p.detach().float().sum().item() for name, p in trainer.model.named_parameters() if p.requires_grad}
    mine |= {name: rank for ranks in redistributions for name, rank in ranks.components.ranks().items()}
    return {
        "seconds": timer.seconds[WARMUP_STEPS:],
        "choosing_peak_bytes": choosing.bytes,
        "training_peak_bytes": training.bytes,
        "moments_set_to_zero": sum(map(sum, zeroed)),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "ranks_agree": all(other == mine for other in collectives.gather_from_all(mine)),
    }


def check_kernels(arguments: argparse.Namespace, in_four_bits: bool) -> float:
    """Return the largest difference between gradients with gates in the kernels and with gates on LoRA modules.

    The model has two layers in fp32. The difference is relative to the largest gradient of the same kind.
    """
    torch.manual_seed(0)
    config = make_config(arguments)
    config.num_hidden_layers, config.vocab_size = 2, 256
    base = LlamaForCausalLM(config)
    if in_four_bits:
        with tempfile.TemporaryDirectory() as folder:
            base.save_pretrained(folder)
            quantisation = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.float32,
            )  # fmt: skip
            base = LlamaForCausalLM.from_pretrained(folder, quantization_config=quantisation, dtype=torch.float32)
    settings: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": LORA_TARGETS}
    model = get_peft_model(base, LoraConfig(r=arguments.rank, lora_alpha=2 * arguments.rank, **settings))
    model.to(arguments.device)
    put_kernels_on(model, arguments.device)
    assert give_gates_to_kernels(), "this Axolotl gives kernels no gates"
    named = dict(model.named_parameters())
    downs = {name: module for name, module in model.named_modules() if name.endswith("lora_A.default")}
    gates = Gates({name: [down] for name, down in downs.items()}, arguments.rank, torch.device(arguments.device))
    with torch.no_grad():
        for name in named:
            if "lora_B" in name:
                named[name].normal_(std=0.1)
        gates.values.uniform_(0.25, 1.25)
    gates.attach()
    ids = torch.randint(256, (2, 64), device=arguments.device)

    def differentiate() -> dict[str, torch.Tensor]:
        model.zero_grad()
        gates.clear_gradient()
        model(ids, labels=ids).loss.backward()
        found = {name: parameter.grad for name, parameter in named.items() if parameter.grad is not None}
        return {name: gradient.clone() for name, gradient in found.items()} | {"gates": gates.gradient.clone()}

    found = differentiate()
    with without_fused_lora(model):
        expected = differentiate()
    sizes: dict[str, float] = {}
    for name, gradient in expected.items():
        kind = name.partition(".lora_")[2]
        sizes[kind] = max(sizes.get(kind, 0.0), gradient.abs().max().item())
    return max(
        (found[name] - gradient).abs().max().item() / sizes[name.partition(".lora_")[2]]
        for name, gradient in expected.items()
    )


def make_table(results: dict[str, dict[str, Any]]) -> Table:
    """Return the medians of every arm as a table, with ratios to the first arm."""
    table = Table("arm", "s a step", "of lora", "peak MiB", "of lora", "last loss", "moments set to 0", "ranks agree")
    first = next(iter(results.values()))
    for name, result in results.items():
        seconds, peak = statistics.median(result["seconds"]), result["training_peak_bytes"]
        table.add_row(
            name,
            f"{seconds:.4f}",
            f"{seconds / statistics.median(first['seconds']):.3f}",
            f"{peak / MIB:.0f}",
            f"{peak / first['training_peak_bytes']:.3f}",
            f"{result['losses'][-1]:.4f}",
            str(result["moments_set_to_zero"] or ""),
            "yes" if result["ranks_agree"] else "NO",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--hidden-size", type=int, default=2048, help="a multiple of 64")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of each row")
    parser.add_argument("--batch-size", type=int, default=4, help="rows of a micro-batch on each process")
    parser.add_argument(
        "--steps", type=int, default=30, help=f"steps of each arm; the first {WARMUP_STEPS} are not timed"
    )
    parser.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="PATH", help="file for all measurements")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    if arguments.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    checks: dict[str, Callable[[], float]] = {"fp32 base": lambda: check_kernels(arguments, in_four_bits=False)}
    if arguments.device == "cuda":  # Axolotl's kernels read 4-bit weights there
        checks["4-bit base"] = lambda: check_kernels(arguments, in_four_bits=True)
    differences = {name: check() for name, check in checks.items()}
    results = {}
    for name in arguments.arms:
        results[name] = run_quietly(run_arm, arguments, ARMS[name])
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
    if collectives.get_rank() == 0:
        console = Console(width=120)
        console.print(make_table(results))
        for name, difference in differences.items():
            word = "holds" if difference <= TOLERANCE else "FAILS"
            console.print(f"gates in kernels, {name}: gradients differ by {difference:.1e} of the largest ({word})")
        if arguments.json:
            settings = {name: str(value) for name, value in vars(arguments).items()}
            document = {"settings": settings, "kernel_differences": differences, "arms": results}
            document["definitions"] = {name: asdict(ARMS[name]) for name in results}
            arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    failed = [name for name, result in results.items() if not result["ranks_agree"]]
    if failed or max(differences.values()) > TOLERANCE:
        raise SystemExit(f"not correct: processes differ in {failed}, kernels by {differences}")


if __name__ == "__main__":
    main()
