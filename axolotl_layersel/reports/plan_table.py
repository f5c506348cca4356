"""A plan as a table."""

from rich.console import Console
from rich.table import Table

from axolotl_layersel.common.tables import arrange, cell
from axolotl_layersel.common.terminal import clean, make_console, make_encodable
from axolotl_layersel.config.layer_names import find_layer
from axolotl_layersel.config.selection import Token, describe_token
from axolotl_layersel.selection.plan import Budget, Plan, Stability, Tower

BAR_WIDTH = 24
FULL_BLOCK = "█"
# Two random halves of many layers overlap by a third. Below this value, two choices share less than three in four of
# the layers that each of them keeps.
LOW_OVERLAP = 0.6


def make_table(plan: Plan, bar: str) -> Table:
    """Return the plan as a table: layer, score, a bar relative to the highest score, and whether it was chosen.

    ``bar``: the character of the bars.
    """
    table = Table()
    # Folded in narrow terminals, because not every encoding has the ellipsis of a cut text.
    table.add_column("layer", justify="right", overflow="fold")
    table.add_column("score", justify="right", overflow="fold")
    table.add_column("", width=BAR_WIDTH)
    table.add_column("chosen", overflow="fold")
    if plan.ranks:
        table.add_column("rank", justify="right", overflow="fold")
    highest = max((choice.score for choice in plan.layers if choice.score is not None), default=0.0)
    for choice in plan.layers:
        score = format_score(choice.score, 4)
        share = 0.0 if choice.score is None or highest <= 0 else max(choice.score, 0.0) / highest
        drawn = bar * round(share * BAR_WIDTH)
        style = "bold" if choice.selected else "dim"
        cells = [str(choice.layer), score, drawn, "yes" if choice.selected else ""]
        if plan.ranks:
            inside = [rank for name, rank in plan.ranks.items() if find_layer(plan.stack, name) == choice.layer]
            cells.append("-".join(map(str, sorted({min(inside), max(inside)}))) if inside else "")
        table.add_row(*cells, style=style)
    return table


def format_score(score: float | None, digits: int) -> str:
    """Return a score as it is printed, or a dash for None."""
    return "-" if score is None else f"{score:.{digits}g}"


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Print a summary, the plan's table, and why layers have no score."""
    console = console or make_console()
    others = "frozen" if plan.unselected == "freeze" else "without an adapter"
    count = f"{len(plan.selected)} of {len(plan.layers)} layers"
    if plan.module_scores:
        count = f"{len(plan.modules)} of {len(plan.module_scores)} LoRA modules, in {count}"
    console.print(f"layersel: method {plan.method} keeps {count}; the others are {others}")
    if plan.token is not None:
        console.print(f"layersel: rows were compared at {describe_tokens(plan.token)}", soft_wrap=True)
    bar = FULL_BLOCK if make_encodable(FULL_BLOCK, console.encoding) == FULL_BLOCK else "#"
    if plan.budget is not None:
        console.print(describe_budget(plan.ranks, plan.budget), soft_wrap=True)
    console.print(make_module_table(plan) if plan.module_scores else make_table(plan, bar))
    for tower in plan.outside:
        console.print(f"{clean(tower.place)}: {describe_tower(tower, plan.outside_layers)}", soft_wrap=True)
    if plan.stability is not None:
        print_stability(plan.stability, console)
    for choice in plan.layers:
        if choice.layer in plan.unscored:
            console.print(f"layer {choice.layer} is not scored: {clean(plan.unscored[choice.layer])}")


def describe_tokens(token: Token | dict[str, Token]) -> str:
    """Return the token of a plan in words, which can have one for each side."""
    if isinstance(token, str):
        return describe_token(token)
    return "; ".join(f"{describe_token(each)} in the {clean(side)}" for side, each in token.items())


def describe_budget(ranks: dict[str, int], budget: Budget) -> str:
    """Return the range of ranks, and how much of the budget they take."""
    low, high = min(ranks.values()), max(ranks.values())
    span = f"rank {high}" if low == high else f"ranks from {low} to {high}"
    spent = f"{budget.spent:,} of {budget.allowed:,} parameters are spent"
    if budget.even:
        spent += f", {budget.even:,} of them evenly, where no gain is more than noise"
    return f"{span}; {spent}; LoRA in all candidates has {budget.lora:,}"


def describe_tower(tower: Tower, towers: str) -> str:
    """Return the number of LoRA modules in a place outside the layers, and whether they are kept and trained."""
    count = len(tower.modules)
    if towers == "remove":
        state = "removed"
    elif tower.trained == count:
        state = "kept and trained"
    else:
        state = f"kept, {tower.trained or 'none'} of them trained"
    return f"{count} LoRA module{'s' if count > 1 else ''} outside of the layers, {state}"


def make_module_table(plan: Plan) -> Table:
    """Return the scores of modules by layer (rows) and type (columns).

    Modules that are kept have their rank after the score, or a star if all ranks are the same.
    """
    layers, kinds = arrange(plan.module_scores)
    table = Table()
    for heading in ("layer", *kinds):
        table.add_column(cell(heading), justify="right", overflow="fold")
    marks = {name: str(plan.ranks.get(name, "*")) for name in plan.modules}
    width = max(map(len, marks.values()))
    for place, row in layers.items():
        layer = find_layer(plan.stack, next(iter(row.values())))
        cells = {
            kind: f"{format_score(plan.module_scores[name], 3)} {marks.get(name, ''):>{width}}"
            for kind, name in row.items()
        }
        table.add_row(cell(place if layer is None else str(layer)), *(cells.get(kind, "") for kind in kinds))
    return table


def print_stability(stability: Stability, console: Console) -> None:
    """Print the layers that each seed chose and how far the choices agree, with a warning if they do not."""
    for seed, layers in stability.selected.items():
        console.print(f"seed {seed}: layers {', '.join(map(str, layers))}")
    console.print(
        f"layersel: {len(stability.selected)} seeds agree with a mean overlap (Jaccard) of {stability.overlap:.2f}; "
        "1 is the same choice each time",
    )
    if stability.overlap < LOW_OVERLAP:
        console.print(
            "layersel: WARNING: the choice depends on the seed, so it says little about your data. Give the method "
            "more to look at (num_samples; for flexora steps and val_samples), or keep more layers.",
            style="yellow",
        )
