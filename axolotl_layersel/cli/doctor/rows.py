"""The rows that will be scored."""

import math

from axolotl_layersel.cli.doctor.case import Case, Fact
from axolotl_layersel.config.strict_block import as_mapping


def describe_rows(case: Case) -> list[Fact]:
    """Return how many rows a method reads, and how many of them each process does."""
    method, settings = case.method, case.selection
    if method is None or settings is None or not method.needs_data:
        return [Fact("rows", 0, "No row is scored.")]
    if settings.flexora is not None:
        search = settings.flexora
        text = (
            f"The search trains for {search.steps} optimizer steps, and validates on up to {search.val_samples} rows "
            f"of the {'training' if search.val_source == 'train' else 'eval'} set."
        )
        return [Fact("rows", search.val_samples, text), Fact("steps", search.steps, "")]
    count = settings.num_samples or 0
    alone = case.engine == "fsdp2" and as_mapping(case.data.get("fsdp_config")).get("cpu_ram_efficient_loading")
    each = count if alone else math.ceil(count / case.processes)
    written = case.block.selection is not None and case.block.selection.num_samples is not None
    text = f"{count} training rows are scored" + ("." if written else ", or all of a smaller set.")
    by = "process 0 scores all of them" if alone else f"each process scores {each} of them"
    return [
        Fact("rows", count, text),
        Fact("rows_of_a_process", each, f"Of these, {by}." if case.processes > 1 else ""),
    ]
