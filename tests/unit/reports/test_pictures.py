"""Pictures that are read: every name at the end of a line has a place of its own."""

import logging
import random
import sys
from dataclasses import asdict
from itertools import combinations, pairwise
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy
import pytest
import torch
from helpers.plans import list_modules, make_plan, make_search
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text
from typer.testing import CliRunner

from axolotl_layersel.cli.main import app
from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.paths import gates_path, list_pictures, picture_path, plan_path
from axolotl_layersel.config.selection import SelectionConfig
from axolotl_layersel.l1ra.records import RankHistory
from axolotl_layersel.reports.pictures import (
    MOST_NAMES,
    OUTERMOST,
    RunPictures,
    check_picture,
    draw_gate_lines,
    draw_gates,
    draw_layer_scores,
    draw_moved_ranks,
    make_figure,
    make_title,
    spread_out,
    write_figure,
)
from axolotl_layersel.selection.plan_file import write_plan


@given(st.dictionaries(st.integers().map(str), st.floats(0, 1), min_size=1, max_size=40), st.floats(0.001, 0.1))
def test_names_are_spread_out_within_the_picture_in_their_order(heights, gap):
    spread = spread_out(heights, gap)
    assert set(spread) == set(heights)
    assert all(-1e-9 <= height <= 1 + 1e-9 for height in spread.values())
    room = min(gap, 1 / max(1, len(heights) - 1))
    ordered = sorted(spread.values())
    assert all(upper - lower >= room - 1e-9 for lower, upper in pairwise(ordered))
    assert all(spread[one] <= spread[other] for one in heights for other in heights if heights[one] < heights[other])
    near = sorted(heights.values())
    if all(upper - lower >= gap for lower, upper in pairwise(near)):
        assert spread == pytest.approx(heights)


@pytest.mark.parametrize(
    ("names", "named"),
    [
        ([str(layer) for layer in range(12)], 12),
        ([str(layer) for layer in range(32)], 32),
        ([str(layer) for layer in range(80)], 36),
        (list_modules(80), 2 * OUTERMOST),
    ],
    ids=["12", "32", "80", "modules"],
)
def test_what_is_kept_stands_out_and_no_name_covers_another(names, named):
    history = make_search(names)
    kept = [name for name, gate in history.final.items() if gate > 0]
    figure = make_figure((13, 8.8), "a run")
    axes = figure.subplots()
    draw_gate_lines(axes, history, kept)
    figure.draw_without_rendering()
    lines = dict(zip(names, axes.lines))
    assert all(
        (line.get_linewidth() > 0.65 and line.get_color() != "0.75") == (name in kept) for name, line in lines.items()
    )
    texts = [text for text in axes.texts if text.get_text()]
    assert len(texts) == len({text.get_text() for text in texts}) == named
    assert axes.get_legend() is None
    boxes = [Text.get_window_extent(text) for text in texts]  # without the line to it
    axes_box = axes.get_window_extent()
    assert all(box.x0 > axes_box.x1 and box.y0 > axes_box.y0 - box.height for box in boxes)
    assert all(box.y1 < axes_box.y1 + box.height and box.x1 <= figure.bbox.x1 for box in boxes)
    for one, other in combinations(boxes, 2):
        assert not one.shrunk(1, 0.9).overlaps(other.shrunk(1, 0.9))
    if len(kept) <= MOST_NAMES:
        assert {text.get_text() for text in texts if text.get_fontweight() == "bold"} == {f"layer {n}" for n in kept}


@pytest.mark.parametrize("ending", ["png", "pdf", "svg", "JPG"])
def test_a_picture_is_what_its_ending_says(tmp_path, ending):
    beginnings = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml", "JPG": b"\xff\xd8"}
    path = tmp_path / f"picture.{ending}"
    check_picture(path)
    write_figure(lambda: draw_gates(make_search(list_modules(3)), list_modules(3)[::2], "a run"), [path])
    assert path.read_bytes().startswith(beginnings[ending])
    moved = {0: dict.fromkeys(list_modules(3), 4), 20: dict.fromkeys(list_modules(3), 3)}
    write_figure(lambda: draw_moved_ranks(moved, "a run"), [path])
    assert path.read_bytes().startswith(beginnings[ending])
    assert list(tmp_path.iterdir()) == [path]


def test_every_ending_that_is_offered_can_be_written(tmp_path):
    with pytest.raises(LayerselError) as error:
        check_picture(tmp_path / "picture.txt")
    endings = str(error.value).partition("Use one of ")[2].rstrip(".").split(", ")
    assert {"png", "pdf", "svg"} <= set(endings)
    ranks = {0: {"model.layers.0.q_proj": 4}}
    for ending in endings:
        write_figure(lambda: draw_moved_ranks(ranks, "a run"), [tmp_path / f"picture.{ending}"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.txt", "x.txt: '.txt' is not an ending of a picture. Use one of "),
        ("x", "x: it lacks the ending of a picture. Use one of "),
        ("file/x.png", "file cannot be made (File exists). Give another path."),
        ("file/nowhere/x.png", "file/nowhere cannot be made (Not a directory). Give another path."),
        ("folder.png", "folder.png is a folder. Give the path of a file"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_before_anything_is_shown(tmp_path, name, message):
    plan = make_plan()
    write_plan(plan, plan_path(tmp_path))
    make_search(["0", "1", "2"]).write(tmp_path)
    RankHistory({0: {plan.modules[0]: 4}}).write(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    result = CliRunner().invoke(app, ["show", str(tmp_path), "--picture", str(tmp_path / name)])
    assert result.exit_code == 1
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert result.output.startswith("axolotl-layersel: --picture: ")
    assert message in result.output
    assert len(result.output.splitlines()) == 1


def test_show_draws_all_that_a_run_has(tmp_path):
    plan = make_plan(scores=[0.5, -0.2, 0.1])
    write_plan(plan, plan_path(tmp_path))
    make_search(["0", "1", "2"]).write(tmp_path)
    RankHistory({0: {plan.modules[0]: 4}}).write(tmp_path)
    result = CliRunner().invoke(app, ["show", str(tmp_path), "--picture", str(tmp_path / "run.png")])
    assert result.exit_code == 0, result.output
    names = ["run.png", "run-gates.png", "run-scores.png"]
    assert {path.name for path in tmp_path.glob("*.png")} == set(names)
    assert result.output.splitlines()[-3:] == [f"picture: {tmp_path / name}" for name in names]


MODULES = list_modules(3)
SCORES = {name: None if "k_proj" in name else 0.5 * index for index, name in enumerate(MODULES)}
RANKS = dict.fromkeys(MODULES[::2], 4)
PLANS = {
    "layers": make_plan(),
    "negative": make_plan(scores=[-0.5, -0.1], selected=(1,)),
    "layers with ranks": make_plan(ranks={"model.layers.0.self_attn.q_proj": 8}),
    "modules": make_plan(modules=MODULES[::2], module_scores=SCORES, granularity="module"),
    "ranks": make_plan(modules=MODULES[::2], module_scores=SCORES, granularity="module", ranks=RANKS),
    "ranks only": make_plan(scores=[None] * 3, modules=MODULES[::2], ranks=RANKS),
    "80 layers": make_plan(scores=[layer / 80 for layer in range(80)], selected=tuple(range(40))),
}


def read_texts(path: Path) -> list[str]:
    """Return the texts of an SVG file in order."""
    return [text.text for text in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text") if text.text]


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_is_drawn_with_its_scores_and_ranks(name, tmp_path):
    plan, folder = PLANS[name], tmp_path / "a-run"
    write_plan(plan, plan_path(folder))
    RunPictures(folder, plan, "hub/Small-1B").draw_plan()
    drawn = {path.name for path in (folder / "layersel").iterdir()} - {"plan.json"}
    wanted = [*([] if name == "ranks only" else ["scores"]), *(["ranks"] if plan.ranks else [])]
    assert drawn == {f"{name}{ending}" for name in wanted for ending in (".png", ".svg")}
    for name in wanted:
        texts = read_texts(picture_path(folder, name, ".svg"))
        assert "a-run: cka on Small-1B" in texts
        if name == "ranks":
            assert texts.count("8" if 8 in plan.ranks.values() else "4") >= len(plan.ranks)
        elif plan.module_scores:
            assert set(texts) >= {f"{score:.2f}" for score in plan.module_scores.values() if score is not None}


def test_a_run_and_show_draw_the_same_bytes_whatever_the_style_of_the_process(tmp_path):
    plan, folder = make_plan(), tmp_path / "a-run"
    history = RankHistory({0: {plan.modules[0]: 4}, 5: {plan.modules[0]: 3}})
    write_plan(plan, plan_path(folder))
    history.write(folder)
    pictures = RunPictures(folder, plan, plan.base_model)

    def draw() -> None:
        pictures.draw_plan()
        pictures.draw_ranks(history)

    draw()
    drawn = {path.name: path.read_bytes() for path in (folder / "layersel").iterdir()}
    with matplotlib.rc_context({"font.size": 30, "savefig.dpi": 20}):
        before, states = dict(matplotlib.rcParams), (random.getstate(), torch.get_rng_state(), numpy.random.get_state())
        draw()
        for ending in (".png", ".svg"):
            result = CliRunner().invoke(app, ["show", str(folder), "--picture", str(tmp_path / f"show{ending}")])
            assert result.exit_code == 0, result.output
        assert dict(matplotlib.rcParams) == before
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    assert str(numpy.random.get_state()) == str(states[2])
    assert {path.name: path.read_bytes() for path in (folder / "layersel").iterdir()} == drawn
    for ending in (".png", ".svg"):
        assert (tmp_path / f"show{ending}").read_bytes() == drawn[f"ranks{ending}"]
        assert (tmp_path / f"show-scores{ending}").read_bytes() == drawn[f"scores{ending}"]


def test_pictures_of_an_earlier_run_do_not_remain_next_to_a_new_plan(tmp_path):
    earlier = make_plan(scores=[0.5, -0.2, 0.1], ranks={"model.layers.0.self_attn.q_proj": 8})
    write_plan(earlier, plan_path(tmp_path))
    make_search(["0", "1", "2"]).write(tmp_path)
    RunPictures(tmp_path, earlier, None).draw_plan()
    assert all(path.exists() for path in list_pictures(tmp_path))
    gates_path(tmp_path).unlink()
    RunPictures(tmp_path, make_plan(), None).draw_plan()
    assert [path.stem for path in list_pictures(tmp_path) if path.exists()] == ["scores"] * 2
    RunPictures(tmp_path, make_plan(scores=[None] * 3), None).draw_plan()
    assert not any(path.exists() for path in list_pictures(tmp_path))


def test_a_picture_that_cannot_be_drawn_is_one_warning_and_no_error(tmp_path, caplog):
    plan = make_plan()
    write_plan(plan, plan_path(tmp_path))
    picture_path(tmp_path, "scores", ".png").mkdir()
    pictures = RunPictures(tmp_path, plan, None)
    with caplog.at_level(logging.INFO, "axolotl.layersel"):
        pictures.draw_plan()
        pictures.draw_plan()
    (warning,) = caplog.records
    assert warning.levelname == "WARNING"
    assert "not all pictures of the run can be drawn (IsADirectoryError: " in warning.message
    assert f"`axolotl-layersel show {tmp_path} --picture FILE` draws them later" in warning.message


def test_pictures_of_an_earlier_run_do_not_remain_where_new_ones_cannot_be_drawn(tmp_path, caplog):
    plan = make_plan()
    write_plan(plan, plan_path(tmp_path))
    RunPictures(tmp_path, plan, None).draw_plan()
    gates_path(tmp_path).write_text("damaged")
    RunPictures(tmp_path, plan, None).draw_plan()
    assert "not all pictures of the run can be drawn" in caplog.text
    assert not any(path.exists() for path in list_pictures(tmp_path))


def test_without_matplotlib_one_line_says_how_to_get_pictures_and_old_ones_go(tmp_path, monkeypatch, caplog):
    plan = make_plan()
    write_plan(plan, plan_path(tmp_path))
    pictures = RunPictures(tmp_path, plan, None)
    pictures.draw_plan()
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as Python marks a package that cannot be imported
    with caplog.at_level(logging.INFO, "axolotl.layersel"):
        pictures.draw_plan()
        pictures.draw_ranks(RankHistory({0: RANKS, 3: RANKS}))
    (line,) = caplog.messages
    assert line.startswith(
        "layersel: no pictures are drawn, because matplotlib is not installed: pip install 'axolotl-layersel[plots]'."
    )
    assert not any(path.exists() for path in list_pictures(tmp_path))


@pytest.mark.parametrize(
    ("place", "title"),
    [
        ("runs/one", "one: cka on Llama-3.1-8B"),
        ("runs/one/checkpoint-4", "one/checkpoint-4: cka on Llama-3.1-8B"),
        ("runs/one/layersel/plan.json", "one: cka on Llama-3.1-8B"),
        ("plans/plan.json", "plan.json: cka on Llama-3.1-8B"),
    ],
)
def test_a_picture_says_which_run_it_is_of(tmp_path, place, title):
    assert make_title(tmp_path / place, "cka", "meta-llama/Llama-3.1-8B") == title
    assert make_title(tmp_path / place, "cka", None) == title.removesuffix(" on Llama-3.1-8B")


def test_the_layers_that_a_plan_keeps_stand_out():
    plan = make_plan(scores=[0.5, None, 0.1, 0.2], selected=(0, 3))
    axes = make_figure((6, 5), "a run").subplots()
    draw_layer_scores(axes, plan)
    assert [bar.get_width() for bar in axes.patches] == [0.5, 0.0, 0.1, 0.2]
    colours = [bar.get_facecolor() for bar in axes.patches]
    assert colours[0] == colours[3] != colours[1] == colours[2]
    assert [label.get_fontweight() for label in axes.get_yticklabels()] == ["bold", "normal", "normal", "bold"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0 ●", "1   ", "2   ", "3 ●"]
    assert [text.get_text() for text in axes.texts] == ["0.5", "not scored", "0.1", "0.2"]


def test_show_draws_a_plan_into_a_folder_that_it_makes(tmp_path):
    write_plan(make_plan(), tmp_path / "plan.json")
    picture = tmp_path / "new" / "folder" / "plan.png"
    result = CliRunner().invoke(app, ["show", str(tmp_path / "plan.json"), "--picture", str(picture)])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1] == f"picture: {picture}"
    assert picture.exists()


def test_a_plan_without_scores_and_ranks_is_not_drawn(tmp_path):
    settings = asdict(SelectionConfig(method="last", num_layers=1).resolve(run_seed=1))
    plan = make_plan(scores=[None] * 3, selected=(2,), method="last", settings=settings, calibration_rows=[])
    write_plan(plan, tmp_path / "plan.json")
    result = CliRunner().invoke(app, ["show", str(tmp_path / "plan.json"), "--picture", str(tmp_path / "plan.png")])
    assert result.exit_code == 1
    assert result.output.splitlines()[-1].startswith(
        "axolotl-layersel: --picture: the plan of method last has neither scores nor ranks to draw."
    )


def test_names_are_drawn_as_they_are_and_not_as_formulas(tmp_path):
    names = [f"model.layers.{layer}.$\\frac{name}" for layer in range(2) for name in ("$a", "\x1b[31m")]
    write_figure(lambda: draw_gates(make_search(names), names[:1], "$\\frac"), [tmp_path / "gates.svg"])
    write_figure(lambda: draw_moved_ranks({0: dict.fromkeys(names, 4)}, "$a$"), [tmp_path / "ranks.svg"])
    assert "$\\frac" in read_texts(tmp_path / "gates.svg")
    assert "$a$" in read_texts(tmp_path / "ranks.svg")
