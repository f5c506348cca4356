"""What tables of LoRA modules share: which row and column a module has, and how text of files is printed."""

from collections import Counter
from collections.abc import Iterable

from rich.text import Text

from axolotl_layersel.common.terminal import clean


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

    What PEFT has wrapped within another LoRA module, which is chosen with that, has none.

    The row is the number of the layer, with the stack's name where there are several, such as a vision tower's; outside
    of a stack it is what the name begins with. The column is the module's type, with as much of its name before it
    as tells it from the others in its row, such as an attention to the encoder.
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
    """Return the name of the stack that a module is in, the number of its layer, and the parts of its name in that.

    Outside of a stack: what its name begins with, nothing, and the last part.
    """
    parts = module.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if at is None or at == len(parts) - 1:
        return ".".join(parts[:-1]), "", parts[-1:]
    return ".".join(parts[:at]), parts[at], parts[at + 1 :]
