"""Print the ranks of a run as a table that fits 80 columns."""

from collections.abc import Mapping, Sequence
from statistics import mean

from rich.console import Console
from rich.text import Text

from axolotl_layersel.common.tables import Column, Grid, lay_out, make_grids
from axolotl_layersel.common.terminal import clean, make_console


def print_ranks(before: Mapping[str, int], after: Mapping[str, int], console: Console | None = None) -> None:
    """Print the ranks that ``l1ra`` ended with, by layer and type of module, and the means before and after."""
    console = console or make_console()
    total = f"{sum(before.values())} before, {sum(after.values())} now"
    lines = [f"layersel: ranks after l1ra, in all {total}, from {min(after.values())} to {max(after.values())}"]
    grids = make_grids(after)
    for grid in grids:
        if len(grids) > 1:
            lines.append("")
            lines.append(f"{clean(grid.stack)}:" if grid.stack else "outside of the layers:")
        lines += lay_out_ranks(grid, after, console.width, before=before)
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def lay_out_ranks(
    grid: Grid,
    ranks: Mapping[str, int],
    width: int,
    labels: Sequence[str] | None = None,
    before: Mapping[str, int] | None = None,
) -> list[str]:
    """Return the lines of a table of ranks by layer and type of module, with their means.

    Args:
        grid: the modules.
        ranks: by module; a module without one has no LoRA, and counts as rank 0 in the means.
        width: of the lines, at most.
        labels: the names of the layers, if these are not their numbers.
        before: other ranks, whose means are shown too.
    """
    rows = list(grid.layers.values())
    of_kind = {kind: [name for names in grid.list_cells(kind) for name in names] for kind in grid.kinds}
    everything = [name for names in of_kind.values() for name in names]
    ends = {"mean": ranks, **({} if before is None else {"before": before})}

    def average(names: list[str], values: Mapping[str, int] = ranks) -> str:
        return f"{mean(values.get(name, 0) for name in names):.1f}"

    columns = [
        Column(
            "layer" if grid.stack else "module",
            [*(grid.layers if labels is None else labels), *ends],
            left=not grid.stack,
        )
    ]
    for kind, names in of_kind.items():
        cells = [show_ranks([ranks.get(name, 0) for name in cell]) for cell in grid.list_cells(kind)]
        columns.append(Column(kind, [*cells, *(average(names, values) for values in ends.values())]))
    if len(grid.kinds) > 1:
        means = [average([name for names in row.values() for name in names]) for row in rows]
        columns.append(Column("mean", [*means, *(average(everything, values) for values in ends.values())]))
    return [line for _, line in lay_out(columns, width)]


def show_ranks(ranks: list[int]) -> str:
    """Return the rank of a module, a dash for 0, or the lowest and the highest rank of several modules."""
    shown = ["-" if rank == 0 else str(rank) for rank in sorted({min(ranks), max(ranks)})] if ranks else []
    return "..".join(shown)
