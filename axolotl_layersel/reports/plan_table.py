"""Print a plan: what it keeps and saves, and a table of its layers or modules that fits 80 columns."""

from bisect import bisect_right

from rich.console import Console
from rich.text import Text

from axolotl_layersel.common.tables import Column, Grid, lay_out, make_grids
from axolotl_layersel.common.terminal import clean, make_console, make_encodable
from axolotl_layersel.config.layer_names import LayerName, find_layer
from axolotl_layersel.config.selection import Token, describe_token
from axolotl_layersel.reports.outcome import STATES, cut_list, describe_choice, describe_scaling, join_layers
from axolotl_layersel.reports.rank_table import lay_out_ranks, show_ranks
from axolotl_layersel.reports.savings import describe_savings, describe_step_time
from axolotl_layersel.selection.plan import Budget, Plan, Stability, Tower

BAR_WIDTH = 24
FULL_BLOCK = "█"
# By order, because one score that is a thousand times the others would flatten all other bars.
SCALE = "bars: the order of the scores, not their size"
# Two random halves of many layers overlap by a third. Below this value, two choices share less than three in four of
# the layers that each of them keeps.
LOW_OVERLAP = 0.6


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Print what a plan keeps and saves, its table, and why layers have no score."""
    console = console or make_console()

    def tell(text: str, style: str = "") -> None:
        console.print(Text(text, style=style), soft_wrap=True)

    tell(f"layersel: {describe_choice(plan)}")
    if plan.token is not None:
        tell(f"layersel: rows were compared at {describe_tokens(plan.token)}")
    if plan.budget is not None:
        tell(f"layersel: {describe_budget(plan.ranks, plan.budget)}")
    if plan.scaling_exponent:
        tell(f"layersel: {describe_scaling(plan)}")
    tell(f"layersel: {describe_savings(plan)}")
    if plan.step_time is not None:
        tell(f"layersel: {describe_step_time(plan.step_time)}")
    bar = FULL_BLOCK if make_encodable(FULL_BLOCK, console.encoding) == FULL_BLOCK else "#"
    for line, style in lay_out_plan(plan, bar, console.width):
        tell(line, style)
    for tower in plan.outside:
        tell(f"{clean(tower.place)}: {describe_tower(tower, plan.outside_layers)}")
    if plan.stability is not None:
        for seed, layers in plan.stability.selected.items():
            tell(f"seed {seed}: layers {', '.join(map(str, layers))}")
        for sentence, style in describe_stability(plan.stability):
            tell(f"layersel: {sentence}", style)
    for choice in plan.layers:
        if choice.layer in plan.unscored:
            tell(f"layer {choice.layer} is not scored: {clean(plan.unscored[choice.layer])}")


# --- The table --------------------------------------------------------------------------------------------------------


def lay_out_plan(plan: Plan, bar: str, width: int) -> list[tuple[str, str]]:
    """Return the lines of a plan's table, each with its style, at most ``width`` characters wide.

    ``bar``: the character of the bars.
    """
    if plan.granularity == "layer" and not plan.ranks and all(choice.score is None for choice in plan.layers):
        layers = join_layers(plan.selected)
        # The sentence has all of them, unless the list is long.
        return [] if layers == cut_list(layers) else [(f"kept layers: {layers}", "")]
    if plan.granularity == "layer":
        columns = list_layer_columns(plan, bar)
        styles = ["bold" if choice.selected else "dim" for choice in plan.layers]
        lines = [(line, "" if row is None else styles[row]) for row, line in lay_out(columns, width)]
        return [*lines, (SCALE, "")] if any(column.heading == "order" for column in columns) else lines
    grids = make_grids(dict.fromkeys([*plan.module_scores, *plan.modules]))
    cells = PlaceCells(plan)
    missing = plan.ranks.keys() < plan.module_scores.keys()
    of_ranks = "rank of each LoRA module" + (f"; -: {STATES[plan.unselected]}" if missing else "")
    texts = [of_ranks if plan.ranks else cells.describe()]
    for grid in grids:
        labels = [name_row(plan, grid, layer) for layer in grid.layers]
        texts += [""] if len(grids) > 1 else []
        if plan.ranks:
            texts += lay_out_ranks(grid, plan.ranks, width, labels)
        else:
            columns = [Column(kind, list(map(cells.show, grid.list_cells(kind)))) for kind in grid.kinds]
            texts += [line for _, line in lay_out([Column("layer", labels), *columns], width)]
    return [(text, "") for text in texts]


def list_layer_columns(plan: Plan, bar: str) -> list[Column]:
    """Return the columns of a table of layers: scores and ranks only if there are any."""
    columns = [Column("layer", [str(choice.layer) for choice in plan.layers])]
    scores = sorted(choice.score for choice in plan.layers if choice.score is not None)
    if scores:
        columns.append(Column("score", [format_score(choice.score) for choice in plan.layers]))
        bars = ["" if c.score is None else bar * find_length(c.score, scores) for c in plan.layers]
        columns.append(Column("order", [f"{drawn:{BAR_WIDTH}}" for drawn in bars], left=True))
    columns.append(Column("kept", ["yes" if choice.selected else "" for choice in plan.layers]))
    if plan.ranks:
        columns.append(Column("rank", [describe_ranks_in(plan, choice.layer) for choice in plan.layers]))
    return columns


def find_length(score: float, scores: list[float]) -> int:
    """Return the length of the bar of a score: full for the highest of all ``scores``, which are ascending."""
    return max(1, round(BAR_WIDTH * bisect_right(scores, score) / len(scores)))


def format_score(score: float | None) -> str:
    """Return a score as it is printed, or a dash for None."""
    return "-" if score is None else f"{score:.4g}"


def describe_ranks_in(plan: Plan, layer: LayerName) -> str:
    """Return the lowest and the highest rank in a layer, or an empty text without any."""
    inside = [rank for name, rank in plan.ranks.items() if find_layer(plan.stack, name) == layer]
    return show_ranks(inside)


def name_row(plan: Plan, grid: Grid, layer: str) -> str:
    """Return the name of a layer in the plan, or the number in the grid if the plan has no such layer."""
    name = next(iter(next(iter(grid.layers[layer].values()))))
    found = find_layer(plan.stack, name)
    return layer if found is None else str(found)


class PlaceCells:
    """The cells of modules without ranks: their places in the order of scores, and which of them are kept."""

    def __init__(self, plan: Plan) -> None:
        self.scores = {name: score for name, score in plan.module_scores.items() if score is not None}
        self.places = {score: place for place, score in enumerate(sorted({*self.scores.values()}, reverse=True), 1)}
        self.kept = set(plan.modules)

    def describe(self) -> str:
        """Return what the cells are."""
        places = "place of each LoRA module in the order of scores, the highest is 1; " if self.places else ""
        return f"{places}*: kept"

    def show(self, names: list[str]) -> str:
        """Return the cell of a module, or of several that share a column: how many of them are kept."""
        if len(names) > 1:
            return f"{sum(name in self.kept for name in names)}/{len(names)}*"
        return "".join(self.show_one(name) for name in names)

    def show_one(self, name: str) -> str:
        place = str(self.places[self.scores[name]]) if name in self.scores else ""
        return place + ("*" if name in self.kept else " ")


# --- Sentences --------------------------------------------------------------------------------------------------------


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


def describe_stability(stability: Stability) -> list[tuple[str, str]]:
    """Return how far the choices of the seeds agree, with a warning if they do not, each with its style."""
    overlap = (
        f"{len(stability.selected)} seeds agree with a mean overlap (Jaccard) of {stability.overlap:.2f}; 1 is the "
        "same choice each time"
    )
    if stability.overlap >= LOW_OVERLAP:
        return [(overlap, "")]
    warning = (
        "WARNING: the choice depends on the seed, so it says little about your data. Give the method more to look at "
        "(num_samples; for flexora steps and val_samples), or keep more layers."
    )
    return [(overlap, ""), (warning, "yellow")]
