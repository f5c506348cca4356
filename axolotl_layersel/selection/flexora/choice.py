"""From a search to a choice: which LoRA modules share a gate, and which are kept."""

from peft import PeftModel
from transformers import Trainer

from axolotl_layersel import engines
from axolotl_layersel.args import FlexoraArgs, SelectionArgs
from axolotl_layersel.errors import LayerselError
from axolotl_layersel.layers import LayerStack
from axolotl_layersel.selection.calibration import fingerprint, has_tokens, read_sample
from axolotl_layersel.selection.choosing import Choice, choose, count_kept
from axolotl_layersel.selection.flexora.gating import choose_positive
from axolotl_layersel.selection.flexora.records import GateHistory
from axolotl_layersel.selection.flexora.search import search_gates


def choose_by_search(
    trainer: Trainer, model: PeftModel, stack: LayerStack, settings: SelectionArgs, seed: int, candidates: list[int]
) -> tuple[Choice, GateHistory]:
    """Search with gates on the ``candidates``, and return what they say is kept; every rank must call this.

    Raises:
        LayerselError: on every rank, if the search cannot be made, or its gates say nothing.
    """
    search = (settings.flexora or FlexoraArgs()).resolve()
    by_module = search.granularity == "module"
    if by_module:
        gated = {name: [name] for name in stack.list_modules(candidates)}
    else:
        gated = {str(layer): stack.lora_modules[layer] for layer in candidates}
    by_share = settings.ratio is not None or settings.num_layers is not None
    if not by_share and len(gated) < 2:
        raise LayerselError(
            f"layersel.selection.keep: 'positive' needs two or more gates to compare, and there is {len(gated)}. Give "
            "more `candidates`, or set `num_layers`."
        )
    keep = engines.decide_on_rank_zero(
        lambda: count_kept(settings, len(gated), f"{search.granularity}s") if by_share else None
    )

    def choose_gates(gates: dict[str, float]) -> list[str]:
        if keep is None:
            return choose_positive(gates)
        names = list(gates)
        return [names[i] for i in choose(list(gates.values()), {}, list(range(len(names))), keep, "flexora")]

    result = search_gates(trainer, model, stack, search, gated, choose_gates, seed)
    gates = result.history.final
    kept = engines.decide_on_rank_zero(lambda: choose_gates(gates))
    scores: list[float | None] = [None] * len(stack.layers)
    for layer in candidates:
        names = stack.lora_modules[layer] if by_module else [str(layer)]
        scores[layer] = max(gates[name] for name in names)
    tokenised = all(has_tokens(row) for row in result.validation)
    samples = [read_sample(values, row) for row, values in zip(result.validation_rows, result.validation) if tokenised]
    choice = Choice(
        modules=[module for name in kept for module in gated[name]],
        scores=scores,
        module_scores=gates if by_module else {},
        rows=result.validation_rows,
        fingerprint=fingerprint(samples) if tokenised else None,
    )
    return choice, result.history
