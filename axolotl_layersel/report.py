"""Tables for people."""

from rich.console import Console
from rich.table import Table

from axolotl_layersel.plan import Plan

BAR_WIDTH = 24


def make_table(plan: Plan) -> Table:
    """Return the plan as a table: layer, score, a bar relative to the highest score, and what was chosen."""
    table = Table()
    table.add_column("layer", justify="right")
    table.add_column("score", justify="right")
    table.add_column("", width=BAR_WIDTH)
    table.add_column("chosen")
    highest = max((choice.score for choice in plan.layers if choice.score is not None), default=0.0)
    for choice in plan.layers:
        score = "-" if choice.score is None else f"{choice.score:.4g}"
        share = 0.0 if choice.score is None or highest <= 0 else max(choice.score, 0.0) / highest
        bar = "█" * round(share * BAR_WIDTH)
        table.add_row(
            str(choice.layer), score, bar, "yes" if choice.selected else "", style="bold" if choice.selected else "dim"
        )
    return table


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Print what was chosen, the plan's table, and under it why layers have no score."""
    console = console or Console()
    others = "frozen" if plan.unselected == "freeze" else "without an adapter"
    count = f"{len(plan.selected)} of {len(plan.layers)} layers"
    console.print(f"layersel: method {plan.method} keeps {count}; the others are {others}", highlight=False)
    console.print(make_table(plan))
    for layer, reason in sorted(plan.unscored.items()):
        console.print(f"layer {layer} is not scored: {reason}")
