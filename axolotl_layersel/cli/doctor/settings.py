"""What of the ``layersel`` block takes effect, and the engine, the kernels and the optimizer that it runs with."""

from axolotl_layersel.cli.checking import describe_settings
from axolotl_layersel.cli.doctor.case import Case, Fact
from axolotl_layersel.config.engines import LABELS
from axolotl_layersel.config.gate_requirements import GPU_KERNELS, LORA_KERNELS
from axolotl_layersel.config.l1ra import OPTIMIZERS
from axolotl_layersel.config.root import describe_unread

TITLES = {"single": "one process", "ddp": "DDP", "zero0": "DeepSpeed", "zero1": "ZeRO-1", "zero2": "ZeRO-2", **LABELS}


def describe_engine(case: Case) -> list[Fact]:
    """Return the engine that the file will run on."""
    count = f"{case.processes} process{'es' if case.processes > 1 else ''}"
    title = TITLES.get(case.engine, case.engine)
    where = f"{title}, with {count}" if case.engine != "single" else "one process, or DDP if it is started on several"
    return [
        Fact("name", case.engine, f"The run uses {where}."),
        Fact(
            "splits_weights",
            case.splits_weights,
            "Each process holds a part of the weights."
            if case.splits_weights
            else "Every process holds all weights of the model.",
        ),
    ]


def describe_effect(case: Case) -> list[Fact]:
    """Return what the block asks for, and its keys that nothing reads."""
    if case.block.selection is None and case.block.l1ra is None:
        return [Fact("effect", {}, "No part of `layersel` takes effect, so this report is on plain LoRA.")]
    facts = [Fact("effect", case.block.model_dump(mode="json", exclude_none=True), describe_settings(case.block))]
    unread = describe_unread(case.written)
    if unread:
        facts.append(Fact("unread", sorted(case.written.list_unread()), f"{unread[0].upper()}{unread[1:]}."))
    return facts


def describe_kernels(case: Case) -> list[Fact]:
    """Return which of Axolotl's fused LoRA kernels are on, and whether the optimizer fits."""
    asked = {key: case.data[key] for key in LORA_KERNELS if case.data.get(key) is not None}
    method = case.method
    if asked:
        on = [key for key, value in asked.items() if value]
        text = f"The file sets these fused LoRA kernels: {', '.join(on) or 'none'}."
    else:
        on = []
        text = "Axolotl switches on its fused LoRA kernels by itself on a GPU, and they stay off without one."
    if any(key in GPU_KERNELS for key in on):
        text += " lora_mlp_kernel needs a GPU."
    if case.block.l1ra is not None:
        text += " They compute with the gates of l1ra."
    if method is not None and method.needs_data:
        gated = method.name == "flexora" and not case.splits_weights
        by_gates = gated and case.selection and case.selection.flexora
        stays = bool(by_gates and by_gates.hypergradient == "first_order")
        text += " They stay on during the search." if stays else " They are off while layers are chosen."
    name = case.optimizer
    moves = case.block.l1ra is not None
    supported = name in OPTIMIZERS
    why = "l1ra clears its moments where rank moves" if moves and supported else "it stays as it is"
    return [
        Fact("kernels", {"set": asked, "fused": on}, text),
        Fact("optimizer", name, f"The optimizer is {name}; {why}."),
    ]
