"""What the documentation says of the code is what the code says."""

import importlib.util
from pathlib import Path

import pytest
import typer
from helpers.documents import find_section
from helpers.places import COLLECTED, ROOT
from helpers.support import COLUMNS, TABLES, read_file

from axolotl_layersel.cli.main import app
from axolotl_layersel.config.l1ra import OPTIMIZERS, L1RAConfig
from axolotl_layersel.config.methods import METHODS


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_hold_what_is_made_from_the_code(generate):
    pages = generate.make_pages()
    stale = [path.name for path, text in pages.items() if path.read_text() != text]
    assert stale == [], "run `python docs/generate.py`"
    assert all(f"| `{name}` |" in pages[generate.SELECTION] for name in METHODS)


def test_a_default_or_a_help_that_changes_makes_a_page_stale(generate, monkeypatch):
    monkeypatch.setattr(L1RAConfig.model_fields["update_ratio"], "default", 0.2)
    assert generate.make_keys() != generate.KEYS.read_text()
    monkeypatch.setattr(app.registered_commands[0].callback, "__doc__", "Choose.")
    assert generate.make_commands() != generate.COMMANDS.read_text()


def test_the_reference_holds_every_key_and_every_option(generate):
    keys, commands = generate.KEYS.read_text(), generate.COMMANDS.read_text()
    for block, _ in generate.BLOCKS.values():
        assert all(f"| `{name}` |" in keys for name in block.model_fields)
    for command in typer.main.get_group(app).commands.values():
        assert f"## axolotl-layersel {command.name}" in commands
        assert all(f"| `{name}` |" in commands for param in command.params for name in param.opts if "-" in name)


def test_every_method_has_a_module_of_its_own_or_shares_it_with_its_like():
    for method in METHODS.values():
        assert callable(method.load())
        assert (Path(ROOT) / "axolotl_layersel/selection/methods" / f"{method.module.replace('.', '/')}.py").exists()


def test_a_page_says_of_every_optimizer_of_l1ra_where_it_works():
    table = find_section("l1ra.md", "Optimizers of `l1ra`")
    assert all(f"`{name}`" in table for name in OPTIMIZERS)


def test_the_tables_of_what_works_are_those_of_the_tests(generate, request):
    assert generate.COLUMNS == COLUMNS and set(generate.TABLES) == set(TABLES)
    collected = request.session.stash[COLLECTED]
    # Of a file of which single tests were asked for, the others were not collected.
    parts = {Path(argument.partition("::")[0]).name for argument in request.config.args if "::" in argument}
    files = {name.partition("::")[0] for name in collected}
    files = {name for name in files if Path(name).name not in parts}
    gone = {name for name in read_file() if name.partition("::")[0] in files} - collected
    assert not gone, "these tests are no longer there: remove docs/support.json and run `pytest --write-support`"


def test_tests_that_contradict_each_other_make_no_table(generate):
    entries = [
        {"table": "model", "row": "Llama", "tested": ["cka"], "refused": {}},
        {"table": "model", "row": "Llama", "tested": [], "refused": {"cka": "no"}},
    ]
    with pytest.raises(ValueError, match="model Llama: tests disagree on cka"):
        generate.make_support_table(entries, "model")
    table = generate.make_support_table([entries[0], {**entries[1], "row": "Other", "tested": ["last"]}], "model")
    llama, other = [line.split(" | ") for line in table.splitlines()[2:4]]
    assert llama[:3] == ["| Llama", "yes", "?"]
    assert other[:2] == ["| Other", "no (1)"] and other[COLUMNS.index("last") + 1] == "yes"
    assert table.endswith("\n\n1. no")
