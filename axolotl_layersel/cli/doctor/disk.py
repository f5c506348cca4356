"""The disk that checkpoints take."""

from axolotl_layersel.cli.doctor.case import Case, Fact
from axolotl_layersel.cli.doctor.layers import count_room
from axolotl_layersel.cli.doctor.memory import COMPONENT_BYTES, FP32, count_optimizer, list_trained_sizes, make
from axolotl_layersel.cli.doctor.model import Model
from axolotl_layersel.config.strict_block import as_whole

# The number of checkpoints that Axolotl 0.19.0 keeps by default.
DEFAULT_LIMIT = 4
SAVED_BYTES = COMPONENT_BYTES - FP32  # of l1ra for each component: all but the gate's gradient


def describe_disk(case: Case, model: Model) -> list[Fact]:
    """Return the size of an adapter and of a checkpoint, and of all that are kept. Small files are left out."""
    choice = case.choice
    assert choice is not None, "the case has a model"
    whole = sum(each.numel() for each in model.base_parameters.values() if each.requires_grad)
    frozen = case.selection is not None and case.selection.unselected == "freeze"
    parameters = choice.plain if frozen else choice.most
    adapter = case.lora_bytes * (parameters + whole)
    facts = [make("adapter", adapter, "The adapter takes {}.")]
    state = count_optimizer(case.optimizer, list_trained_sizes(case, model))
    if state is None:
        return facts
    total = adapter + state
    if case.block.l1ra is not None:
        modules = len(choice.modules) if choice.kept is not None else len(model.sizes)
        ranks = FP32 * count_room(case, model) + SAVED_BYTES * case.max_rank * modules
        total += ranks
        facts.append(make("ranks", ranks, "The state of l1ra takes {}."))
    facts.append(make("checkpoint", total, "A checkpoint, with the optimizer's state, takes {}."))
    limit = as_whole(case.data.get("save_total_limit")) or DEFAULT_LIMIT
    facts.append(make("kept", limit * total + adapter, f"{limit} checkpoints are kept at most: {{}} with the adapter."))
    return facts
