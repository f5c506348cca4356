"""What the documentation says of the code is what the code says."""

import importlib.util
from pathlib import Path

import pytest
from helpers.places import COLLECTED, ROOT
from helpers.support import COLUMNS, TABLES, read_file

from axolotl_layersel.config.l1ra import OPTIMIZERS
from axolotl_layersel.config.methods import METHODS


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_holds_the_table_of_methods_as_it_is(generate):
    text = generate.README.read_text()
    assert generate.fill(text) == text, "run `python docs/generate.py`"
    assert all(f"| `{name}` |" in text for name in METHODS)


def test_every_method_has_a_module_of_its_own_or_shares_it_with_its_like():
    for method in METHODS.values():
        assert callable(method.load())
        assert (Path(ROOT) / "axolotl_layersel/selection/methods" / f"{method.module.replace('.', '/')}.py").exists()


def test_the_readme_says_of_every_optimizer_of_l1ra_where_it_works():
    _, _, section = (ROOT / "README.md").read_text().partition("### Optimizers of `l1ra`")
    table = section.partition("## ")[0]
    assert all(f"`{name}`" in table for name in OPTIMIZERS)


def test_the_tables_of_what_works_are_those_of_the_tests(generate, request):
    assert generate.SUPPORT.read_text() == generate.make_support(), "run `python docs/generate.py`"
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
