"""The page of a comparison: complete, without network, and with every picture in it."""

import logging
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from helpers.comparisons import make_cell, make_comparison, make_failure, plant

from axolotl_layersel.cli.compare import page as pages
from axolotl_layersel.cli.compare.answer import answer
from axolotl_layersel.cli.compare.figures import CurvePoint
from axolotl_layersel.cli.compare.page import write_page
from axolotl_layersel.cli.compare.pictures import (
    average_curve,
    collect_rates,
    format_count,
    list_pictures,
    spread_equal,
)
from axolotl_layersel.cli.compare.summary import summarise
from axolotl_layersel.common.errors import LayerselError

CELLS = [
    *plant({"gradient": -0.03, "random": 0.1, "lora@32": -0.012}),
    make_cell("lora", 0, 2.3, rate=4e-4),
    make_failure("gradient", 0, 8e-4),
]
RATES = dict.fromkeys(["lora", "gradient", "random", "lora@32"], 2e-4)
VOID = {"meta", "br"}


class Reader(HTMLParser):
    """Collects the text, the identifiers and the links of a page, and checks that its elements are closed."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes[key] for key in ("src", "href", "xlink:href") if key in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def read(path):
    """Return the parsed page."""
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A page with all kinds of pictures: its folder, its comparison, and the paths that were returned."""
    folder = tmp_path_factory.mktemp("page")
    comparison = make_comparison(CELLS, best_rates=RATES, notes=["A <note> & more."])
    return folder, comparison, write_page(comparison, folder)


def test_a_page_is_whole_and_needs_no_network(written):
    folder, comparison, paths = written
    reader = read(folder / "report.html")
    text = " ".join("".join(reader.text).split())
    assert answer(comparison).paragraph.replace("`", "").split(". ")[1] in text
    assert "A <note> & more." in text
    assert len(reader.ids) == len(set(reader.ids))
    inside = {link[1:] for link in reader.links if link.startswith("#")}
    assert inside <= set(reader.ids)
    files = {link for link in reader.links if not link.startswith("#")}
    assert files == {str(path.relative_to(folder)) for path in paths[1:]}
    content = (folder / "report.html").read_text()
    referred = set(re.findall(r"url\(#([^)]+)\)", content))
    assert referred and referred <= set(reader.ids)
    assert "<script" not in content
    assert set(re.findall(r"https?://[^\s\"'<]+", content)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_every_picture_is_drawn_as_png_and_svg(written):
    folder, comparison, paths = written
    names = [picture.name for picture in list_pictures(comparison, summarise(comparison))]
    assert names == ["parameters", "time", "rates", "ranks-3-gradient", "ranks-4-random"]
    assert sorted(path.name for path in (folder / "pictures").iterdir()) == sorted(
        f"{name}{ending}" for name in names for ending in (".png", ".svg")
    )
    assert paths == [
        folder / "report.html",
        *(folder / "pictures" / f"{name}{ending}" for name in names for ending in (".png", ".svg")),
    ]
    for path in (folder / "pictures").glob("*.svg"):
        ElementTree.parse(path)


def test_the_arms_are_named_in_the_pictures(written):
    folder, _, _ = written
    for name in ("parameters", "time"):
        svg = (folder / "pictures" / f"{name}.svg").read_text()
        assert all(f">{arm}<" in svg for arm in RATES)


def test_names_of_arms_are_text_and_not_html(tmp_path):
    hostile = "<script>alert(1)</script>\x1b"
    cells = [cell.model_copy(update={"arm": hostile}) if cell.arm == "cka" else cell for cell in plant({"cka": -0.1})]
    comparison = make_comparison(cells, {"lora": ({}, False), hostile: ({}, False)}, yaml="<b>.yml")
    write_page(comparison, tmp_path)
    content = (tmp_path / "report.html").read_text()
    assert "<script" not in content and "<b>" not in content and "\x1b" not in content
    read(tmp_path / "report.html")
    assert all(re.fullmatch(r"[\w.-]+", path.name) for path in (tmp_path / "pictures").iterdir())


def test_a_comparison_without_cells_has_a_page(tmp_path):
    assert write_page(make_comparison([], planned=9), tmp_path) == [tmp_path / "report.html"]
    assert "provisional" in "".join(read(tmp_path / "report.html").text)


def test_a_later_page_has_no_pictures_of_an_earlier_one(tmp_path):
    write_page(make_comparison(plant({"gradient": -0.03, "random": 0.1}, seeds=1)), tmp_path)
    assert (tmp_path / "pictures" / "ranks-2-gradient.png").exists()
    paths = write_page(make_comparison(plant({}, seeds=1)), tmp_path)
    assert sorted(tmp_path.glob("pictures/*")) == sorted(paths[1:])


def test_a_picture_that_cannot_be_drawn_is_one_warning(tmp_path, caplog):
    (tmp_path / "pictures").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        assert write_page(make_comparison(plant({}, seeds=1)), tmp_path) == [tmp_path / "report.html"]
    assert [record.message.partition(" (")[0] for record in caplog.records] == [
        "layersel: not all pictures of the comparison can be drawn"
    ]


def test_a_page_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(LayerselError, match=r"report\.html cannot be written"):
        write_page(make_comparison([]), tmp_path)


def test_curves_are_means_at_shared_steps_after_the_choice():
    cells = [
        make_cell(
            "cka",
            seed,
            2.0,
            curve=[CurvePoint(step=step, seconds=step + seed, validation_loss=3 - seed) for step in steps],
        )
        for seed, steps in enumerate([(0, 10, 20), (0, 20)])
    ]
    assert average_curve(cells) == [(13.0, 2.5), (33.0, 2.5)]


def test_rates_are_those_of_the_first_seed_in_full():
    assert collect_rates(make_comparison([*CELLS, make_cell("lora", 0, 1.0, rate=8e-4, steps=50)]))["lora"] == {
        2e-4: next(cell.validation_loss for cell in CELLS if cell.arm == "lora"),
        4e-4: pytest.approx(2.31),
    }


def test_arms_of_equal_size_are_drawn_next_to_each_other():
    places = spread_equal({"lora": 1000, "cka": 1000, "random": 1005, "lora@32": 2000})
    assert places["lora"] < places["cka"] < places["random"] < places["lora@32"] == 2000
    assert spread_equal({"lora": 1000}) == {"lora": 1000}
    assert [format_count(number) for number in (512, 61_440, 983_040, 7e9)] == ["512", "61.4 k", "983 k", "7 B"]


def test_ink_takes_the_colour_of_the_page(written):
    folder, comparison, _ = written
    picture = list_pictures(comparison, summarise(comparison))[0]
    svg = pages.embed((folder / "pictures" / "parameters.svg").read_text(), picture)
    assert "#000000" not in svg and "#ffffff" not in svg and "currentColor" in svg
