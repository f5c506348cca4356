"""The published files, the wheel and the source distribution, and their declared dependencies."""

import ast
import importlib.metadata
import json
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.places import ROOT
from helpers.published import call
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from axolotl_layersel import __version__

# The dependencies of the package that `axolotl-layersel show` needs.
NEEDED_BY_SHOW = {"pydantic", "rich", "safetensors", "typer"}
PLAN = {
    "schema_version": 3,
    "method": "cka",
    "layers": [{"layer": 0, "score": 0.25, "selected": False}, {"layer": 1, "score": 0.5, "selected": True}],
    "unselected": "remove",
    "stack": "model.layers",
    "modules": ["model.layers.1.self_attn.q_proj"],
    "settings": {"method": "cka"},
    "seed": 1,
    "calibration_rows": [2, 0, 1],
    "dataset_fingerprint": None,
    "base_model": None,
    "versions": {},
    "engine": "single",
    "processes": 1,
    "seconds": 0.5,
}


@pytest.fixture(scope="session")
def unpacked(built, tmp_path_factory) -> Path:
    """A folder with the installed wheel, to put on the path of the tests' environment."""
    folder = tmp_path_factory.mktemp("unpacked")
    call(sys.executable, "-m", "pip", "install", "--no-deps", "--target", folder, built.wheel, cwd=folder)
    return folder


@pytest.fixture(scope="session")
def requirements(unpacked) -> list[Requirement]:
    """All declared dependencies of the wheel, with extras."""
    (distribution,) = importlib.metadata.distributions(path=[str(unpacked)])
    return [Requirement(line) for line in distribution.requires or []]


@pytest.fixture(scope="session")
def empty_environment(built, requirements, tmp_path_factory) -> Path:
    """The programs of an environment with the wheel and the dependencies of ``show``, without torch and Axolotl."""
    folder = tmp_path_factory.mktemp("environment")
    call(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    programs = folder / "venv" / "bin"
    install = (sys.executable, "-m", "pip", "--python", programs / "python", "install")
    call(*install, *(str(item) for item in requirements if item.name in NEEDED_BY_SHOW and not item.marker), cwd=folder)
    call(*install, "--no-deps", built.wheel, cwd=folder)
    return programs


def test_both_files_pass_the_check_for_an_upload(built, tmp_path):
    text = call(sys.executable, "-m", "twine", "check", "--strict", built.sdist, built.wheel, cwd=tmp_path)
    assert text.count("PASSED") == 2


def test_the_wheel_holds_the_package_alone_and_all_of_it(built):
    names = set(zipfile.ZipFile(built.wheel).namelist())
    metadata = f"axolotl_layersel-{__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"axolotl_layersel", metadata}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "axolotl_layersel").rglob("*.py")}
    examples = {path.relative_to(ROOT / "example_configs") for path in (ROOT / "example_configs").rglob("*.*")}
    examples = {f"axolotl_layersel/examples/{name}" for name in examples if name.suffix != ".pyc"}
    assert {name for name in names if name.startswith("axolotl_layersel/")} == (
        modules | examples | {"axolotl_layersel/py.typed"}
    )
    assert f"{metadata}/licenses/LICENSE" in names


def test_the_source_distribution_holds_the_whole_checkout(built):
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    source = built.sdist.parents[1] / "source"
    made = {"build", "dist", "axolotl_layersel.egg-info"}  # by the build itself
    files = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    assert {str(file) for file in files if file.parts[0] not in made} - names == set()
    assert {"tests/conftest.py", "docs/support.json", "benchmarks/gpu.sh", "example_configs/slurm.sh"} <= names
    assert not [name for name in names if name.endswith(".pyc") or name.startswith("demo/work")]


def test_the_metadata_say_what_a_reader_of_an_index_needs(unpacked):
    (distribution,) = importlib.metadata.distributions(path=[str(unpacked)])
    metadata = distribution.metadata
    assert (metadata["Name"], metadata["Version"]) == ("axolotl-layersel", __version__)
    assert (metadata["License-Expression"], metadata["License-File"]) == ("Apache-2.0", "LICENSE")
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    named = [line.rpartition(" ")[2] for line in metadata.get_all("Classifier") if " :: Python :: 3." in line]
    python = SpecifierSet(metadata["Requires-Python"])
    assert named == [version for minor in range(6, 20) if (version := f"3.{minor}") in python]
    assert set(metadata.get_all("Provides-Extra")) == {"deepspeed", "plots", "docs", "dev"}
    assert {(entry.group, entry.name) for entry in distribution.entry_points} == {
        ("console_scripts", "axolotl-layersel"),
        ("axolotl.cli_commands", "layersel"),
        ("torch.backends", "axolotl_layersel"),
    }
    assert all(callable(entry.load()) for entry in distribution.entry_points)


@pytest.mark.parametrize("command", [["axolotl-layersel"], ["python", "-m", "axolotl_layersel"]])
def test_plans_are_shown_where_neither_torch_nor_axolotl_is(empty_environment, command, tmp_path):
    program, *arguments = command
    command = [empty_environment / program, *arguments]
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    assert call(*command, "--version", cwd=tmp_path) == f"axolotl-layersel {__version__}\n"
    text = call(*command, "show", "plan.json", cwd=tmp_path)
    assert "layersel: method cka keeps 1 of 2 layers (1); the others are without an adapter" in text
    rows = [line.split() for line in text.splitlines() if "█" in line]
    assert rows == [["0", "0.25", "█" * 12], ["1", "0.5", "█" * 24, "yes"]]


def test_examples_and_the_schema_are_written_where_neither_torch_nor_axolotl_is(empty_environment, tmp_path):
    command = empty_environment / "axolotl-layersel"
    call(command, "examples", "mine", cwd=tmp_path)
    text = (ROOT / "example_configs" / "slurm.sh").read_text()
    assert (tmp_path / "mine" / "slurm.sh").read_text() == text.replace("example_configs", "mine")
    assert (tmp_path / "mine" / "deepspeed" / "zero2.json").exists()
    assert "selection" in json.loads(call(command, "schema", cwd=tmp_path))["$defs"]["LayerselConfig"]["properties"]


def test_that_environment_really_lacks_torch_and_axolotl(empty_environment, tmp_path):
    code = "import importlib.util as u; print([n for n in ('torch', 'axolotl', 'axolotl_layersel') if u.find_spec(n)])"
    assert call(empty_environment / "python", "-c", code, cwd=tmp_path) == "['axolotl_layersel']\n"


@pytest.mark.nightly
def test_the_plugin_of_the_wheel_is_imported_beside_axolotl(unpacked, tmp_path):
    code = (
        "import sys, axolotl_layersel; from axolotl.integrations.base import BasePlugin, load_plugin;"
        "plugin = load_plugin('axolotl_layersel.LayerSelectionPlugin');"
        "assert isinstance(plugin, axolotl_layersel.LayerSelectionPlugin) and isinstance(plugin, BasePlugin);"
        "print(axolotl_layersel.__file__, sys.modules[type(plugin).__module__].__file__, sep='\\n')"
    )
    text = call(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(unpacked))
    assert all(Path(line).is_relative_to(unpacked) for line in text.splitlines()[-2:])


def test_axolotl_has_the_command_too(unpacked, tmp_path):
    beside = {"cwd": tmp_path, "PYTHONPATH": str(unpacked)}
    (line,) = (line for line in call("axolotl", "--help", **beside).splitlines() if line.startswith("  layersel "))
    assert line.split()[1:4] == ["Choose", "the", "layers"]
    text = call("axolotl", "layersel", "--help", **beside)
    assert "Usage: axolotl layersel [OPTIONS] COMMAND" in text
    assert "--install-completion" not in text, "that would complete axolotl itself"
    run = tmp_path / "run"
    (run / "layersel").mkdir(parents=True)
    (run / "layersel" / "plan.json").write_text(json.dumps(PLAN))
    (run / "layersel" / "ranks.csv").write_text(
        "step,module,rank\n0,model.layers.1.self_attn.q_proj,8\n9,model.layers.1.self_attn.q_proj,5\n"
    )
    text = call("axolotl", "layersel", "show", "run", **beside)
    # Axolotl prints its logo first.
    shown = text[text.index("layersel: method") :]
    assert "layersel: ranks after l1ra, in all 8 before, 5 now, from 5 to 5" in shown
    command = "from axolotl_layersel.cli.main import app; app()"
    assert shown == call(sys.executable, "-c", command, "show", "run", **beside)


def test_axolotls_door_to_the_command_loads_neither_torch_nor_axolotl(unpacked, tmp_path):
    code = (
        "import sys, click; from importlib.metadata import entry_points;"
        "(door,) = entry_points(group='axolotl.cli_commands', name='layersel'); command = door.load();"
        "print(isinstance(command, click.Command), sorted({'torch', 'axolotl', 'transformers'} & set(sys.modules)))"
    )
    assert call(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(unpacked)) == "True []\n"


def find_imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield the top-level package of every import in a file, and whether importing the file runs it."""

    def walk(node: ast.AST, at_once: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], at_once) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module).partition(".")[0], at_once
        elif isinstance(node, ast.If):
            at_once = at_once and "TYPE_CHECKING" not in ast.unparse(node.test)
        else:
            at_once = at_once and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, at_once)

    yield from walk(ast.parse(path.read_text()), True)


def find_packages(distribution: str) -> set[str]:
    """Return the top-level packages and modules that a distribution installs."""
    return {file.parts[0].removesuffix(".py") for file in importlib.metadata.files(distribution) or []}


def test_everything_that_is_imported_is_declared(requirements):
    required = {item.name for item in requirements if not item.marker}
    extras = {item.name for item in requirements if item.marker and "dev" not in str(item.marker)}
    contents = {name: find_packages(name) for name in required | extras}
    imported, imported_at_once = set(), set()
    for path in (ROOT / "axolotl_layersel").rglob("*.py"):
        for package, at_once in find_imports(path):
            if package in sys.stdlib_module_names or package == "axolotl_layersel":
                continue
            # Several distributions may install modules into one package, as Axolotl's do.
            providers = {name for name, packages in contents.items() if package in packages}
            assert providers, f"{path} imports {package}, which pyproject.toml does not declare"
            imported |= providers
            imported_at_once |= providers if at_once else set()
    assert {"torch", "matplotlib", "deepspeed"} <= imported, "imports within functions are seen too"
    assert imported_at_once <= required, "an extra may be imported only where it is used"
    assert required <= imported, "nothing is declared that is not imported"


def test_what_is_installed_is_what_is_declared(requirements):
    for item in requirements:
        assert item.specifier.contains(importlib.metadata.version(item.name)), str(item)
        assert any(bound.operator in (">=", "==") for bound in item.specifier), f"{item.name} has no lower bound"
