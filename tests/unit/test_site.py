"""The manual is built as a site in strict mode, and a browser that shows it asks no other host for anything."""

import importlib.util
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers.documents import PAGES
from helpers.places import ROOT
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

LOADING = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "link": "href"}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))
    return folder


class Loaded(HTMLParser):
    """Collects what a browser loads to show a page."""

    def __init__(self):
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag, attrs):
        address = dict(attrs).get(LOADING.get(tag, ""))
        if address:
            self.addresses.append(address)


def test_every_page_is_built_and_can_be_found_without_a_server(site):
    pages = {path.stem for path in PAGES}
    assert {path.parent.name for path in site.glob("*/index.html")} == pages - {"index"}
    found = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    assert {entry["location"].split("/")[0] for entry in found if "/" in entry["location"]} == pages - {"index"}


def test_a_browser_asks_no_other_host(site):
    for path in site.rglob("*.html"):
        loaded = Loaded()
        text = path.read_text()
        loaded.feed(text)
        assert loaded.addresses and [name for name in loaded.addresses if re.match(r"(\w+:)?//", name)] == []
        assert 'data-md-component="source"' not in text, "the theme would ask GitHub about the repository"
    for path in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(\w+:)?//", path.read_text())
    scripts = [path.read_text() for path in site.glob("assets/javascripts/*.js")]
    assert scripts and not any("unpkg.com" in text or "jsdelivr" in text for text in scripts)


def test_pictures_are_drawn_by_a_script_of_the_site_where_it_was_fetched(site):
    hooks = load_script("hooks")
    drawn = [path for path in site.rglob("*.html") if 'class="mermaid"' in path.read_text()]
    assert len(drawn) >= 3
    for path in drawn:
        names = re.findall(r'<script src="([^"]*mermaid[^"]*)"', path.read_text())
        assert [(path.parent / name).resolve() for name in names] == (
            [site / "assets" / "mermaid.min.js"] if hooks.MERMAID.exists() else []
        )
        assert all((path.parent / name).exists() for name in names)


def load_script(name: str):
    """Return a script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("link", ["../example_configs/none.yml", "none.md", "start.md#none"])
def test_a_link_to_nothing_is_an_error(link, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# One\n\n[two]({link})\n")
    (tmp_path / "docs" / "start.md").write_text("# Two\n")
    config = load_config(
        str(ROOT / "mkdocs.yml"), docs_dir=str(tmp_path / "docs"), site_dir=str(tmp_path / "site"), nav=None
    )
    with pytest.raises(Abort):
        build(config)


def read_texts(path: Path) -> list[str]:
    """Return the words of a picture and the description of its data."""
    return re.findall(r"<(?:text|dc:description)[^>]*>([^<]*)<", path.read_text())


def test_the_picture_of_the_readme_shows_the_runs_as_they_are(tmp_path):
    pictures = load_script("pictures")
    drawn = tmp_path / "drawn.svg"
    pictures.draw(drawn)
    # The curves' last digits may differ between releases of matplotlib.
    assert read_texts(drawn) == read_texts(pictures.PICTURE), "run `python docs/pictures.py`"
    assert "SmolLM2-135M, l1ra, r 4: +0.10 ± 0.17 %" in read_texts(drawn)[0]
