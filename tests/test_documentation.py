"""What the documentation says of the code is what the code says."""

import importlib.util
from pathlib import Path

import pytest
from conftest import ROOT

from axolotl_layersel.l1ra.args import OPTIMIZERS
from axolotl_layersel.selection.methods import METHODS


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
