"""Tables of LoRA modules in plain text: the row and the column of each module, and lines that fit a width."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len

from axolotl_layersel.common.terminal import clean

GAP = "  "
# With more types of modules than this in a layer, those whose names differ only in a number share a column.
MOST_COLUMNS = 12


# --- Lines ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading, a cell for each row, and whether the cells are aligned on the left."""

    heading: str
    cells: list[str]
    left: bool = False


def lay_out(columns: Sequence[Column], width: int) -> Iterator[tuple[int | None, str]]:
    """Yield the lines of a table that is at most ``width`` characters wide, each with its row, None for headings.

    No cell is cut. If the columns are too wide, their headings are split into words. If they still are, the table is
    followed by further ones with the rest of the columns. The first column names the rows, and each table begins with
    it. Control characters of names are escaped.
    """
    columns = [Column(clean(each.heading), [clean(cell) for cell in each.cells], each.left) for each in columns]
    first, rest = columns[0], list(columns[1:])
    splits = sum(map(find_width, columns)) + len(GAP) * len(rest) > width
    while True:
        taken, used = [first], find_width(first, splits)
        while rest and (len(taken) == 1 or used + len(GAP) + find_width(rest[0], splits) <= width):
            used += len(GAP) + find_width(rest[0], splits)
            taken.append(rest.pop(0))
        yield from format_lines(taken, splits)
        if not rest:
            return
        yield None, ""


def split_heading(heading: str, splits: bool) -> list[str]:
    """Return the lines of a heading: if it ``splits``, one for each word of a name such as ``SelfAttention.q``."""
    return re.findall(r"[A-Z]*[^.A-Z]*\.?", heading)[:-1] if splits and heading else [heading]


def find_width(column: Column, splits: bool = False) -> int:
    """Return the width of a column, whose heading may be split into words."""
    return max(map(cell_len, [*split_heading(column.heading, splits), *column.cells]))


def format_lines(columns: Sequence[Column], splits: bool) -> Iterator[tuple[int | None, str]]:
    """Yield the lines of one table, see ``lay_out``."""
    headings = [split_heading(column.heading, splits) for column in columns]
    height = max(map(len, headings))
    tops = [[""] * (height - len(lines)) + lines for lines in headings]
    widths = [find_width(column, splits) for column in columns]
    lines = zip(*([*top, *column.cells] for top, column in zip(tops, columns)))
    for number, cells in enumerate(lines, start=-height):
        padded = []
        for text, width, column in zip(cells, widths, columns):
            padding = " " * (width - cell_len(text))
            padded.append(text + padding if column.left else padding + text)
        yield number if number >= 0 else None, GAP.join(padded).rstrip()


# --- Modules ----------------------------------------------------------------------------------------------------------


@dataclass
class Grid:
    """The modules of one list of layers.

    Attributes:
        stack: the name of the list; empty for modules that are in no layer.
        layers: the modules of each layer by type, by the layer's number. A type that stands for several, such as
            ``experts.*.w1``, has several modules.
        kinds: the types, in order.
    """

    stack: str
    layers: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    kinds: list[str] = field(default_factory=list)

    def list_cells(self, kind: str) -> list[list[str]]:
        """Return the modules of a type in each layer."""
        return [row.get(kind, []) for row in self.layers.values()]


def make_grids(modules: Iterable[str]) -> list[Grid]:
    """Return modules by list of layers, by layer, and by type, all in order; those in no layer are by their names.

    Modules that PEFT has wrapped in another LoRA module are left out, see ``find_places``.
    """
    grids: dict[str, Grid] = {}
    for name, (_, column) in find_places(modules).items():
        stack, layer, _ = split_at_layer(name)
        grid = grids.setdefault(stack if layer else "", Grid(stack if layer else ""))
        row, kind = (layer, column) if layer else (name, "")
        grid.layers.setdefault(row, {}).setdefault(kind, []).append(name)
    for grid in grids.values():
        grid.kinds = list(dict.fromkeys(kind for row in grid.layers.values() for kind in row))
        if len(grid.kinds) > MOST_COLUMNS:
            merge_numbered(grid)
    return list(grids.values())


def merge_numbered(grid: Grid) -> None:
    """Give types whose names differ only in numbers, such as those of experts, one column."""
    merged = {kind: re.sub(r"(?<![^.])\d+(?![^.])", "*", kind) for kind in grid.kinds}
    for layer, row in grid.layers.items():
        joined: dict[str, list[str]] = {}
        for kind, names in row.items():
            joined.setdefault(merged[kind], []).extend(names)
        grid.layers[layer] = joined
    grid.kinds = list(dict.fromkeys(merged.values()))


def arrange(modules: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Return the names of modules by row and column, see ``find_places``, and the columns, both in order."""
    rows: dict[str, dict[str, str]] = {}
    for name, (row, column) in find_places(modules).items():
        rows.setdefault(row, {})[column] = name
    return rows, list(dict.fromkeys(column for row in rows.values() for column in row))


def find_places(modules: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return a distinct row and column for each module, such as ``("3", "q_proj")``.

    Modules that PEFT has wrapped in another LoRA module, which are chosen together with it, are left out.

    The row is the number of the layer, after the stack's name if there are several stacks; outside of a stack it is the
    name without its last part. The column is the module's type, after as many parts of its name as distinguish it from
    the others in its row.
    """
    split = {name: split_at_layer(name) for name in modules if not name.endswith(".base_layer")}
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
    """Return the stack of a module, the number of its layer, and the parts of its name within the layer.

    Outside of a stack, these are the name without its last part, an empty text, and the last part.
    """
    parts = module.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if at is None or at == len(parts) - 1:
        return ".".join(parts[:-1]), "", parts[-1:]
    return ".".join(parts[:at]), parts[at], parts[at + 1 :]
