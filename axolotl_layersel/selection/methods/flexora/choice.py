"""From a search to a choice: the units that have a gate, and those that are kept."""

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.experts import KEY, describe_gated_experts
from axolotl_layersel.engines.collectives import decide_on_rank_zero
from axolotl_layersel.lora.modules import list_linear
from axolotl_layersel.selection.choosing import choose_highest
from axolotl_layersel.selection.data.calibration import fingerprint, has_tokens, read_sample
from axolotl_layersel.selection.methods.flexora.gating import choose_positive
from axolotl_layersel.selection.methods.flexora.search import search_gates
from axolotl_layersel.selection.types import Choice, Selection


def choose(selection: Selection) -> Choice:
    """Search with gates on the candidates, and return the choice by them. Every process must call this.

    Raises:
        LayerselError: on every process, if the search cannot be made, or its gates decide nothing.
    """
    settings, search, units = selection.settings, selection.settings.flexora, selection.units
    assert search is not None, "the method has these settings"
    if settings.keep is not None and len(units) < 2:
        raise LayerselError(
            f"layersel.selection.keep: 'positive' needs two or more gates to compare, and there is {len(units)}. Give "
            "more `candidates`, or set `num_layers`."
        )
    keep = selection.count_kept() if settings.keep is None else None

    def choose_gates(gates: dict[str, float]) -> list[str]:
        if keep is None:
            return choose_positive(gates)
        names = list(gates)
        highest = choose_highest(list(gates.values()), {}, list(range(len(names))), keep, selection.method)
        return [names[i] for i in highest]

    result = search_gates(selection, search, find_gated(selection), choose_gates)
    gates = result.history.final
    kept = set(decide_on_rank_zero(lambda: choose_gates(gates)))
    tokenised = all(has_tokens(row) for row in result.validation)
    samples = [read_sample(values, row) for row, values in zip(result.validation_rows, result.validation) if tokenised]
    return Choice(
        modules=[module for unit in units if unit.name in kept for module in unit.modules],
        scores=selection.find_highest_by_layer(gates),
        module_scores={m: gates[unit.name] for unit in units for m in unit.modules if not selection.by_layer},
        rows=result.validation_rows,
        fingerprint=fingerprint(samples) if tokenised else None,
        history=result.history,
    )


def find_gated(selection: Selection) -> dict[str, list[str]]:
    """Return the names of the linear LoRA modules under the gate of each unit, by unit name.

    Raises:
        LayerselError: if a unit has none, such as one of experts only.
    """
    linear, settings = list_linear(selection.run.lora_modules), selection.settings
    gated = {unit.name: [name for name in unit.modules if name in linear] for unit in selection.units}
    bare = [name for name, modules in gated.items() if not modules]
    if len(bare) == len(gated):
        raise LayerselError(describe_gated_experts("layersel.selection.method: flexora"))
    if bare:
        way_out = "`granularity: layer`" if settings.granularity != "layer" else "`candidates` without it"
        raise LayerselError(
            f"layersel.selection.granularity: {settings.granularity!r} with method flexora needs a linear LoRA module "
            f"in every {settings.granularity}, and {bare[0]} has LoRA on experts only, where no gate can be. Set "
            f"{way_out}, or leave experts out of lora_target_modules and {KEY}."
        )
    return gated
