"""The memory of a process, in bytes, by formulas; ``tests/unit/cli/doctor`` compares them with measurements.

Seen in bitsandbytes 0.50.2: a weight of 4 bits has a scale of 8 bits for each 64 values, and a number of fp32 for each
256 scales; one of 8 bits has a number of fp32 for each output. Its 8-bit moments have a number of fp32 for each 256
values, and tensors under 4096 values keep moments of fp32. torchao 0.17.0 does the same with its moments.
"""

import math
from collections.abc import Callable, Iterable

from axolotl_layersel.cli.doctor.case import Case, Fact
from axolotl_layersel.cli.doctor.layers import count_room
from axolotl_layersel.cli.doctor.model import Model
from axolotl_layersel.common.sizes import format_bytes
from axolotl_layersel.config.strict_block import as_whole
from axolotl_layersel.lora.modules import count_experts, list_linear, list_parameters
from axolotl_layersel.selection.passes.sizes import (
    LOGITS_AT_A_TIME,
    OVERSAMPLING,
    STREAMED_TOKENS,
    STREAMED_TOKENS_BACKWARD,
)

FP32, STEP = 4, 4  # bytes
SMALL, BLOCK = 4096, 256
LOGIT_BYTES = 12  # of a logit with its loss and its gradient
# Bytes of l1ra for each component: gate, gradient, two moments (fp32), steps (int64), and whether it is in use.
COMPONENT_BYTES = 4 * FP32 + 8 + 1
GATE_BYTES = 2 * FP32  # of the search: a gate and its gradient on the device
SCALE_BLOCK = 64


# --- Optimizer states -----------------------------------------------------------------------------------------------


def count_fp32_moments(size: int) -> int:
    """Return the bytes of AdamW's state of a tensor with ``size`` values: two moments, and the step."""
    return 2 * FP32 * size + STEP


def count_8bit_moments(size: int) -> int:
    """Return the bytes of two moments of 8 bits with their scales; small tensors have moments of fp32."""
    return 2 * FP32 * size if size < SMALL else 2 * (size + FP32 * math.ceil(size / BLOCK))


MOMENTS: dict[str, Callable[[int], int]] = {
    "adamw_torch": count_fp32_moments,
    "adamw_torch_fused": count_fp32_moments,
    "paged_adamw_32bit": lambda size: 2 * FP32 * size,
    "adamw_bnb_8bit": count_8bit_moments,
    "adamw_8bit": count_8bit_moments,
    "paged_adamw_8bit": count_8bit_moments,
    "adamw_torch_8bit": count_8bit_moments,
    "ao_adamw_fp8": count_8bit_moments,
}


def count_optimizer(name: str, sizes: Iterable[int]) -> int | None:
    """Return the bytes of an optimizer's state of tensors with so many values; None for an unknown optimizer."""
    return sum(map(MOMENTS[name], sizes)) if name in MOMENTS else None


def list_trained_sizes(case: Case, model: Model) -> list[int]:
    """Return the number of values in each tensor that trains; with the most parameters that the choice can train."""
    choice = case.choice
    assert choice is not None, "the case has a model"
    names = choice.modules if choice.kept is not None else list(model.sizes)
    factor = count_room(case, model) / (sum(model.sizes[name] for name in names) or 1)
    adapter = model.peft.active_adapters[0]
    sizes = []
    for name in names:
        sizes += [round(factor * each.numel()) for each in list_parameters(model.base, adapter, name)]
    return [*sizes, *(each.numel() for each in model.base_parameters.values() if each.requires_grad)]


# --- Weights --------------------------------------------------------------------------------------------------------


def count_base(case: Case, model: Model) -> int:
    """Return the bytes of the base model's weights, on all processes together if they are split."""
    from torch import nn

    output = model.base.get_output_embeddings()
    linear = {
        id(module.weight): module.weight.shape[0]
        for module in model.base.modules()
        if isinstance(module, nn.Linear) and module is not output
    }
    total = 0
    for parameter in model.base_parameters.values():
        size = parameter.numel()
        if id(parameter) not in linear:
            total += case.dtype_bytes * size
        elif case.data.get("load_in_4bit"):
            scales = math.ceil(size / SCALE_BLOCK)
            total += math.ceil(size / 2) + scales + FP32 * math.ceil(scales / BLOCK)
        elif case.data.get("load_in_8bit"):
            total += size + FP32 * linear[id(parameter)]
        else:
            total += case.dtype_bytes * size
    return total


# --- The passes over calibration rows -------------------------------------------------------------------------------


def count_sketches(case: Case, model: Model) -> int:
    """Return the bytes of the sketches of ``method: gradient``, and of the directions that make them."""
    settings = case.selection
    assert settings is not None, "a method is used"
    highest = settings.max_rank or (case.max_rank if case.block.l1ra else 4 * case.lora_r)
    highest = case.lora_r if settings.rank_allocation == "same" else highest
    width, total, inputs = highest + OVERSAMPLING, 0, set()
    inside = {name for names in model.stack.lora_modules.values() for name in names}
    for name, module in model.lora_modules.items():
        if name not in inside:
            continue
        given, returned = module.in_features, module.out_features
        assert given is not None and returned is not None, "PEFT has made A and B by them"
        total += 2 * FP32 * count_experts(module) * returned * min(width, given)
        inputs.add(given)
    return total + sum(FP32 * given * min(width, given) for given in inputs)


def count_batch_tokens(case: Case, backward: bool) -> int:
    """Return the most tokens of a pass that scores: those of a batch of training, or more on engines that stream."""
    length = as_whole(case.data.get("sequence_len")) or 512
    rows = as_whole(case.data.get("micro_batch_size")) or 1
    most = STREAMED_TOKENS_BACKWARD if backward else STREAMED_TOKENS
    return length * (max(rows, most // length) if case.splits_weights else rows)


def describe_pass(case: Case, model: Model) -> list[Fact]:
    """Return the memory of the passes that score, which is free again before training."""
    method, settings = case.method, case.selection
    if method is None or settings is None or not method.draws_rows:
        return []
    facts = []
    hidden, vocabulary = model.read_size("hidden_size"), model.read_size("vocab_size")
    tokens, layers = count_batch_tokens(case, method.needs_backward), len(model.stack.layers)
    if method.name == "gradient":
        facts.append(make("sketches", count_sketches(case, model), "The sketches of method gradient take {}."))
    if method.needs_backward:
        keeps = method.name == "gradient" and not (case.data.get("gradient_checkpointing") or case.splits_weights)
        if keeps:
            facts.append(Fact("hidden_states", None, "The pass keeps the activations of all layers, as training does."))
        else:
            states = layers * tokens * hidden * case.dtype_bytes
            text = f"Hidden states between {layers} layers, for {tokens:,} tokens, take {{}}."
            facts.append(make("hidden_states", states, text))
        logits = LOGIT_BYTES * min(LOGITS_AT_A_TIME, tokens * vocabulary)
        facts.append(make("logits", logits, "The logits of a few tokens at a time take at most {}."))
    if method.name == "cka" and settings.granularity == "layer":
        kept = FP32 * (settings.num_samples or 0) * (layers + len(model.stack.sides)) * hidden
        facts.append(make("states", kept, "One hidden state a layer and row, on the CPU of process 0, takes {}."))
    if case.splits_weights:
        text = "One layer and the parts outside of the layers are whole while it runs: {}."
        facts.append(make("whole_layer", count_whole(case, model), text))
    return facts


def count_whole(case: Case, model: Model) -> int:
    """Return the bytes of the largest layer and of everything outside of the layers."""
    layers = [sum(each.numel() for each in layer.parameters()) for layer in model.stack.layers]
    total = sum(each.numel() for each in model.base_parameters.values()) + sum(model.sizes.values())
    return case.dtype_bytes * (max(layers) + total - sum(layers))


# --- The section ----------------------------------------------------------------------------------------------------


def make(key: str, count: int, text: str) -> Fact:
    """Return a fact about a number of bytes, which stands for ``{}`` in the text."""
    return Fact(key, count, text.format(format_bytes(count)))


def describe_memory(case: Case, model: Model) -> list[Fact]:
    """Return the memory of each process."""
    shared, room = case.processes, count_room(case, model)
    split = shared if case.splits_weights else 1
    sizes = list_trained_sizes(case, model)
    facts = [
        make("weights", count_base(case, model) // split, "The weights of the base model take {}."),
        make("lora", case.lora_bytes * room // split, "The LoRA weights that train take {}."),
    ]
    gradients = case.lora_bytes * sum(sizes) // (shared if case.engine in ("zero2", "zero3", "fsdp2") else 1)
    facts.append(make("gradients", gradients, "Their gradients take {}."))
    state = count_optimizer(case.optimizer, sizes)
    sharded = shared if case.engine in ("zero1", "zero2", "zero3", "fsdp2") else 1
    if state is None:
        facts.append(Fact("optimizer", None, f"The memory of optimizer: {case.optimizer} is not known."))
    else:
        if case.engine.startswith("zero") and case.lora_bytes < FP32:
            state += FP32 * sum(sizes)  # masters
        facts.append(make("optimizer", state // sharded, f"The states of {case.optimizer} take {{}}."))
    if case.block.l1ra is not None and case.choice is not None:
        names = case.choice.modules if case.choice.kept is not None else model.sizes
        linear = list_linear({name: model.lora_modules[name] for name in names})
        gates = COMPONENT_BYTES * case.max_rank * len(linear)
        facts.append(make("gates", gates, "The gates of l1ra and their moments take {}."))
    if case.method is not None and case.method.name == "flexora":
        count = GATE_BYTES * len(model.units or [])
        facts.append(make("search_gates", count, "The gates of the search take {}."))
    return facts
