"""Pictures that are read: every name at the end of a line has a place of its own."""

from dataclasses import asdict
from itertools import combinations, pairwise

import pytest
from helpers.plans import list_modules, make_plan, make_search
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text
from typer.testing import CliRunner

from axolotl_layersel.cli.main import app
from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.paths import plan_path
from axolotl_layersel.config.selection import SelectionConfig
from axolotl_layersel.l1ra.records import RankHistory
from axolotl_layersel.reports.pictures import (
    MOST_NAMES,
    OUTERMOST,
    check_picture,
    draw_gate_lines,
    draw_gates,
    draw_layer_scores,
    draw_plan,
    draw_ranks,
    make_figure,
    spread_out,
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
    figure = make_figure((13, 8))
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
    draw_gates(make_search(list_modules(3)), list_modules(3)[::2], path)
    assert path.read_bytes().startswith(beginnings[ending])
    draw_ranks({0: dict.fromkeys(list_modules(3), 4), 20: dict.fromkeys(list_modules(3), 3)}, path)
    assert path.read_bytes().startswith(beginnings[ending])
    assert list(tmp_path.iterdir()) == [path]


def test_every_ending_that_is_offered_can_be_written(tmp_path):
    with pytest.raises(LayerselError) as error:
        check_picture(tmp_path / "picture.txt")
    endings = str(error.value).partition("Use one of ")[2].rstrip(".").split(", ")
    assert {"png", "pdf", "svg"} <= set(endings)
    for ending in endings:
        draw_ranks({0: {"model.layers.0.q_proj": 4}}, tmp_path / f"picture.{ending}")


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


def test_show_draws_both_ranks_and_gates_of_a_run_that_has_both(tmp_path):
    plan = make_plan(scores=[0.5, -0.2, 0.1])
    write_plan(plan, plan_path(tmp_path))
    make_search(["0", "1", "2"]).write(tmp_path)
    RankHistory({0: {plan.modules[0]: 4}}).write(tmp_path)
    result = CliRunner().invoke(app, ["show", str(tmp_path), "--picture", str(tmp_path / "run.png")])
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.glob("*.png")} == {"run.png", "run-gates.png"}
    pictures = [f"picture: {tmp_path / name}" for name in ("run.png", "run-gates.png")]
    assert result.output.splitlines()[-2:] == pictures


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


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_is_drawn_with_its_scores_and_ranks(name, tmp_path):
    draw_plan(PLANS[name], tmp_path / "plan.svg")
    assert (tmp_path / "plan.svg").read_bytes().startswith(b"<?xml")


def test_the_layers_that_a_plan_keeps_stand_out():
    plan = make_plan(scores=[0.5, None, 0.1, 0.2], selected=(0, 3))
    axes = make_figure((6, 5)).subplots()
    draw_layer_scores(axes, plan)
    assert [bar.get_width() for bar in axes.patches] == [0.5, 0.0, 0.1, 0.2]
    colours = [bar.get_facecolor() for bar in axes.patches]
    assert colours[0] == colours[3] != colours[1] == colours[2]
    assert [label.get_fontweight() for label in axes.get_yticklabels()] == ["bold", "normal", "normal", "bold"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1", "2", "3"]


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
    draw_gates(make_search(names), names[:1], tmp_path / "gates.svg")
    draw_ranks({0: dict.fromkeys(names, 4)}, tmp_path / "ranks.svg")
    assert (tmp_path / "gates.svg").exists()
    assert (tmp_path / "ranks.svg").exists()
