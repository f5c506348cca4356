"""Print the ranks of a run as a table."""

from collections.abc import Mapping
from statistics import mean

from rich.console import Console
from rich.table import Table

from axolotl_layersel.common.tables import arrange, cell
from axolotl_layersel.common.terminal import make_console


def make_rank_table(before: Mapping[str, int], after: Mapping[str, int]) -> Table:
    """Return a table of ranks by layer (rows) and type of module (columns), with their means before and after."""
    layers, kinds = arrange(after)
    table = Table()
    for heading in ("layer", *kinds, "mean"):
        table.add_column(cell(heading), justify="right", overflow="fold")
    for layer, row in layers.items():
        ranks = {kind: after[name] for kind, name in row.items()}
        table.add_row(cell(layer), *(str(ranks.get(kind, "")) for kind in kinds), f"{mean(ranks.values()):.1f}")
    table.add_section()
    members = {kind: [row[kind] for row in layers.values() if kind in row] for kind in kinds}
    for heading, all_ranks in (("mean", after), ("before", before)):
        means = [mean(all_ranks[name] for name in names) for names in members.values()]
        table.add_row(heading, *(f"{number:.1f}" for number in means), f"{mean(all_ranks.values()):.1f}")
    return table


def print_ranks(before: Mapping[str, int], after: Mapping[str, int], console: Console | None = None) -> None:
    console = console or make_console()
    total = f"{sum(before.values())} before, {sum(after.values())} now"
    console.print(f"layersel: ranks after l1ra, in all {total}, from {min(after.values())} to {max(after.values())}")
    console.print(make_rank_table(before, after))
