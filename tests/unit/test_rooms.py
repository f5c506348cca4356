"""Folders of the package are concepts, and imports run one way down through them."""

import ast
import graphlib
from pathlib import Path

import pytest

import axolotl_layersel

PACKAGE = Path(axolotl_layersel.__file__).parent
# A folder imports from those before it, and the package's own file only looks names up when they are asked for.
ORDER = ["common", "config", "engines", "lora", "l1ra", "selection", "reports", "training", "plugin", "cli"]
HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "axolotl"}


def name_module(path: Path) -> str:
    """Return a module's name below the package; a folder's own is the folder's."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


MODULES = {name_module(path): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def list_imports(tree: ast.Module) -> set[str]:
    """Return the full names of what a module imports, wherever in it, also for the type checker only."""
    nodes = list(ast.walk(tree))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    parts = {
        f"{node.module}.{alias.name}" for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert not any(node.level for node in nodes if isinstance(node, ast.ImportFrom)), "imports are absolute"
    return plain | parts


def find_own(name: str) -> str | None:
    """Return the module of the package that an imported name is or lies in, or None for another library's."""
    package, _, rest = name.partition(".")
    if package != PACKAGE.name or not rest:
        return None
    return rest if rest in MODULES else rest.rpartition(".")[0]


OWN = {name: {own for full in list_imports(tree) if (own := find_own(full))} for name, tree in MODULES.items()}


def find_floor(module: str) -> int:
    return ORDER.index(module.partition(".")[0])


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name.partition(".")[0] in ORDER))
def test_a_module_imports_from_its_own_folder_and_those_below(module):
    above = [other for other in OWN[module] if other and find_floor(other) > find_floor(module)]
    assert not above, f"{module} imports {above}, which lie above it"


def test_every_module_lies_in_a_folder_of_the_order():
    assert {name.partition(".")[0] for name in MODULES} == {*ORDER, "", "__main__"}


def test_no_modules_import_each_other_in_a_circle():
    order = graphlib.TopologicalSorter({name: others - {""} for name, others in OWN.items() if name})
    assert set(order.static_order()) == set(MODULES) - {""}


def test_no_setting_needs_torch_to_be_checked():
    reached, todo = set(), {name for name in MODULES if name.startswith("config.")}
    while todo:
        name = todo.pop()
        reached.add(name)
        todo |= OWN[name] - reached
    libraries = {name: {full.partition(".")[0] for full in list_imports(MODULES[name])} & HEAVY for name in reached}
    assert len(reached) > 10
    assert {name: found for name, found in libraries.items() if found} == {}


@pytest.mark.parametrize("folder", sorted({path.parent for path in PACKAGE.rglob("*.py")} - {PACKAGE}))
def test_every_folder_says_what_it_is_in_one_sentence(folder):
    sentence = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    assert sentence and sentence.splitlines()[0].endswith(".") and len(sentence.splitlines()[0].split()) > 4
