"""The calls of communication that the package adds to a run on several processes, and what training itself sends."""

from axolotl_layersel.cli.doctor.case import Case, Fact
from axolotl_layersel.cli.doctor.layers import count_room
from axolotl_layersel.cli.doctor.model import Model
from axolotl_layersel.common.sizes import format_bytes
from axolotl_layersel.config.l1ra import OPTIMIZERS

# Calls of ``RankRedistribution.update``: gates are broadcast, and two gathers compare the processes.
CALLS_OF_AN_UPDATE = 3


def count_step_calls(case: Case) -> int:
    """Return the calls that l1ra adds to each optimizer step: gates have a gradient to be averaged, or read A's."""
    if case.block.l1ra is None or case.processes == 1:
        return 0
    if case.engine == "fsdp2":
        return 1
    library = OPTIMIZERS.get(case.optimizer)
    reads_weights = not case.engine.startswith("zero") and library == "PyTorch"
    return 0 if case.block.l1ra.rule == "saliency" and reads_weights else 1


def describe_collectives(case: Case, model: Model) -> list[Fact]:
    """Return the calls of communication of an optimizer step and of an update of rank."""
    if case.processes == 1:
        return [Fact("step", 0, "One process communicates with no other.")]
    sent = case.lora_bytes * count_room(case, model)
    facts = [
        Fact("gradient_bytes", sent, f"Each optimizer step averages {format_bytes(sent)} of LoRA's gradients."),
        Fact("step", count_step_calls(case), f"The package adds {count_step_calls(case)} calls to an optimizer step."),
    ]
    if case.block.l1ra is not None:
        text = f"An update of rank has {CALLS_OF_AN_UPDATE} calls: a broadcast and two gathers."
        facts.append(Fact("update", CALLS_OF_AN_UPDATE, text))
    return facts
