"""Tables for people; their pictures are in pictures.py."""

from collections import Counter
from collections.abc import Iterable, Mapping
from statistics import mean

from rich.console import Console
from rich.table import Table
from rich.text import Text

from axolotl_layersel.plan import Plan, Stability, Tower
from axolotl_layersel.terminal import clean, make_console, make_encodable

BAR_WIDTH = 24
FULL_BLOCK = "█"
# Two random halves of many layers overlap by a third. Below this, less than three in four of the layers that one of
# two choices keeps are in both.
LOW_OVERLAP = 0.6


def make_table(plan: Plan, bar: str) -> Table:
    """Return the plan as a table: layer, score, a bar relative to the highest score, and what was chosen.

    ``bar``: the character that bars are made of.
    """
    table = Table()
    # Folded where the terminal is narrow: the sign that stands for what is cut off is not in every encoding.
    table.add_column("layer", justify="right", overflow="fold")
    table.add_column("score", justify="right", overflow="fold")
    table.add_column("", width=BAR_WIDTH)
    table.add_column("chosen", overflow="fold")
    highest = max((choice.score for choice in plan.layers if choice.score is not None), default=0.0)
    for choice in plan.layers:
        score = "-" if choice.score is None else f"{choice.score:.4g}"
        share = 0.0 if choice.score is None or highest <= 0 else max(choice.score, 0.0) / highest
        drawn = bar * round(share * BAR_WIDTH)
        style = "bold" if choice.selected else "dim"
        table.add_row(str(choice.layer), score, drawn, "yes" if choice.selected else "", style=style)
    return table


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Print what was chosen, the plan's table, and under it why layers have no score."""
    console = console or make_console()
    others = "frozen" if plan.unselected == "freeze" else "without an adapter"
    count = f"{len(plan.selected)} of {len(plan.layers)} layers"
    if plan.module_scores:
        count = f"{len(plan.modules)} of {len(plan.module_scores)} LoRA modules, in {count}"
    console.print(f"layersel: method {plan.method} keeps {count}; the others are {others}")
    bar = FULL_BLOCK if make_encodable(FULL_BLOCK, console.encoding) == FULL_BLOCK else "#"
    console.print(make_module_table(plan) if plan.module_scores else make_table(plan, bar))
    for tower in plan.outside:
        console.print(f"{clean(tower.place)}: {describe_tower(tower, plan.towers)}", soft_wrap=True)
    if plan.stability is not None:
        print_stability(plan.stability, console)
    for layer, reason in sorted(plan.unscored.items()):
        console.print(f"layer {layer} is not scored: {clean(reason)}")


def describe_tower(tower: Tower, towers: str) -> str:
    """Return how many LoRA modules a place outside of the layers has, or had, and what became of them."""
    count = len(tower.modules)
    if towers == "remove":
        state = "removed"
    elif tower.trained == count:
        state = "kept and trained"
    else:
        state = f"kept, {tower.trained or 'none'} of them trained"
    return f"{count} LoRA module{'s' if count > 1 else ''} outside of the layers, {state}"


def make_module_table(plan: Plan) -> Table:
    """Return the scores of modules by layer (rows) and type (columns); a star marks those that were chosen."""
    layers, kinds = arrange(plan.module_scores)
    table = Table()
    for heading in ("layer", *kinds):
        table.add_column(cell(heading), justify="right", overflow="fold")
    kept = set(plan.modules)
    for layer, row in layers.items():
        cells = {kind: f"{plan.module_scores[name]:.3g}{' *' if name in kept else '  '}" for kind, name in row.items()}
        table.add_row(cell(layer), *(cells.get(kind, "") for kind in kinds))
    return table


def print_stability(stability: Stability, console: Console) -> None:
    """Print what each seed chose and how far the choices agree, with a warning where they do not."""
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


def make_rank_table(before: Mapping[str, int], after: Mapping[str, int]) -> Table:
    """Return the ranks by layer (rows) and type of module (columns), with means, and the means before."""
    layers, kinds = arrange(after)
    table = Table()
    for heading in ("layer", *kinds, "mean"):
        table.add_column(cell(heading), justify="right", overflow="fold")
    for layer, row in layers.items():
        ranks = {kind: after[name] for kind, name in row.items()}
        table.add_row(cell(layer), *(str(ranks.get(kind, "")) for kind in kinds), f"{mean(ranks.values()):.1f}")
    table.add_section()
    members = {kind: [row[kind] for row in layers.values() if kind in row] for kind in kinds}
    for heading, ranks in (("mean", after), ("before", before)):
        means = [mean(ranks[name] for name in names) for names in members.values()]
        table.add_row(heading, *(f"{number:.1f}" for number in means), f"{mean(ranks.values()):.1f}")
    return table


def cell(text: str) -> Text:
    """Return what a file says, to be printed as it stands."""
    return Text(clean(text))


def arrange(modules: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Return the names of modules by row and column of a table, see ``find_places``, and the columns, both in order."""
    rows: dict[str, dict[str, str]] = {}
    for name, (row, column) in find_places(modules).items():
        rows.setdefault(row, {})[column] = name
    return rows, list(dict.fromkeys(column for row in rows.values() for column in row))


def find_places(modules: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return the row and the column of each module in a table, no two the same: ``("3", "q_proj")``.

    The row is the number of the layer, with the stack's name where there are several, such as a vision tower's; outside
    of a stack it is what the name begins with. The column is the module's type, with as much of its name before it
    as tells it from the others in its row, such as an attention to the encoder.
    """
    split = {name: split_at_layer(name) for name in modules}
    several = len({stack for stack, layer, _ in split.values() if layer}) > 1
    rows = {
        name: f"{stack}.{layer}" if layer and several else layer or stack for name, (stack, layer, _) in split.items()
    }
    columns = {name: path[-1] for name, (_, _, path) in split.items()}
    for length in range(2, 1 + max((len(path) for _, _, path in split.values()), default=0)):
        counts = Counter((rows[name], columns[name]) for name in split)
        ambiguous = {column for (_, column), count in counts.items() if count > 1}
        columns.update({name: ".".join(split[name][2][-length:]) for name in split if columns[name] in ambiguous})
    return {name: (rows[name], columns[name]) for name in split}


def split_at_layer(module: str) -> tuple[str, str, list[str]]:
    """Return the name of the stack that a module is in, the number of its layer, and the parts of its name in that.

    Outside of a stack: what its name begins with, nothing, and the last part.
    """
    parts = module.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if at is None or at == len(parts) - 1:
        return ".".join(parts[:-1]), "", parts[-1:]
    return ".".join(parts[:at]), parts[at], parts[at + 1 :]


def print_ranks(before: Mapping[str, int], after: Mapping[str, int], console: Console | None = None) -> None:
    """Print the rank that every module started and ended with."""
    console = console or make_console()
    total = f"{sum(before.values())} before, {sum(after.values())} now"
    console.print(f"layersel: ranks after l1ra, in all {total}, from {min(after.values())} to {max(after.values())}")
    console.print(make_rank_table(before, after))
