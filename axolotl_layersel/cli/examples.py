"""Write the example configurations, which lie in ``example_configs`` of a clone and in the installed package."""

import os
from pathlib import Path

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.files import write_atomically

EXAMPLES = Path(__file__).parents[1] / "examples"  # in a clone, a link to example_configs
NAMED = b"example_configs"  # the folder that the examples name in their comments and paths
CLONE_ONLY = ("demo.yml",)  # its model and data are made in a clone
# Neither a comment in a shell script nor a path in YAML needs quotes for these.
PLAIN = frozenset("._-/+@=,")


def write_examples(folder: Path) -> list[Path]:
    """Write the examples to ``folder``, with its name in their commands and paths, and return their paths.

    Raises:
        LayerselError: if a file of the same name with another content is there, before any is written.
    """
    unusual = sorted({char for char in str(folder) if not (char.isalnum() or char in PLAIN)})
    if unusual:
        raise LayerselError(
            f"DIR: {folder} has the character {unusual[0]!r}, which paths in the examples would have to quote. "
            "Give another folder."
        )
    contents = {
        folder / path.relative_to(EXAMPLES): path.read_bytes().replace(NAMED, os.fsencode(folder))
        for path in sorted(EXAMPLES.rglob("*"))
        if path.is_file() and path.name not in CLONE_ONLY and path.parent.name != "__pycache__"
    }
    differing = [path for path, content in contents.items() if os.path.lexists(path) and not holds(path, content)]
    if differing:
        raise LayerselError(
            f"DIR: {differing[0]} is there and differs from the example ({len(differing)} such files). Move it, or "
            "give another folder."
        )
    for path, content in contents.items():
        write_atomically(path, content)
    return list(contents)


def holds(path: Path, content: bytes) -> bool:
    """Return whether ``path`` is a file with this content."""
    try:
        return path.read_bytes() == content
    except OSError:
        return False
