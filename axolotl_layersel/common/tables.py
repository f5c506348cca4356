"""Tables of LoRA modules: the row and the column of each module, and safe text from files."""

from collections import Counter
from collections.abc import Iterable

from rich.text import Text

from axolotl_layersel.common.terminal import clean


def cell(text: str) -> Text:
    """Return text from a file without markup and control characters."""
    return Text(clean(text))


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
