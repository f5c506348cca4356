"""Tables of modules: no number is cut, and no line is wider than asked."""

from hypothesis import given
from hypothesis import strategies as st

from axolotl_layersel.common.tables import Column, lay_out, make_grids

SHORT = st.text(st.characters(codec="ascii", exclude_characters="\x7f", min_codepoint=33), max_size=12)


def lines_of(columns: list[Column], width: int) -> list[str]:
    return [line for _, line in lay_out(columns, width)]


@given(st.lists(st.tuples(SHORT, st.lists(SHORT.filter(bool), min_size=3, max_size=3)), min_size=1, max_size=20))
def test_no_cell_is_cut_and_no_line_is_too_wide(columns):
    columns = [Column("layer", ["0", "1", "10"]), *(Column(heading, cells) for heading, cells in columns)]
    lines = list(lay_out(columns, 40))
    assert all(len(line) <= 40 for _, line in lines)
    for row in range(3):
        shown = [line.split() for number, line in lines if number == row]
        assert {cells[0] for cells in shown} == {columns[0].cells[row]}
        assert [cell for cells in shown for cell in cells[1:]] == [column.cells[row] for column in columns[1:]]


def test_a_table_that_fits_is_one_table_with_headings_in_one_line():
    columns = [Column("layer", ["0", "11"]), Column("q_proj", ["8", "-"]), Column("order", ["██", "█"], left=True)]
    assert list(lay_out(columns, 80)) == [
        (None, "layer  q_proj  order"),
        (0, "    0       8  ██"),
        (1, "   11       -  █"),
    ]


def test_headings_are_split_before_columns_are_moved_into_another_table():
    columns = [Column("layer", ["0"]), *(Column(f"SelfAttention.{name}", ["16"]) for name in "qk")]
    assert lines_of(columns, 30) == [
        "             Self        Self",
        "       Attention.  Attention.",
        "layer           q           k",
        "    0          16          16",
    ]
    assert lines_of(columns, 20) == [
        "             Self",
        "       Attention.",
        "layer           q",
        "    0          16",
        "",
        "             Self",
        "       Attention.",
        "layer           k",
        "    0          16",
    ]


def test_names_cannot_control_the_terminal():
    assert lines_of([Column("\x1b[2J", ["\x07"])], 80) == [r"\x1b[2J", r"   \x07"]


def test_modules_are_grouped_by_their_list_of_layers():
    vision = [f"model.visual.blocks.{layer}.attn.{name}" for layer in range(2) for name in ("qkv", "proj")]
    language = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    grids = make_grids([*vision, *language, "lm_head"])
    assert [(grid.stack, list(grid.layers), grid.kinds) for grid in grids] == [
        ("model.visual.blocks", ["0", "1"], ["qkv", "proj"]),
        ("model.layers", ["0", "1"], ["q_proj"]),
        ("", ["lm_head"], [""]),
    ]
    assert grids[0].list_cells("proj") == [[vision[1]], [vision[3]]]


def test_many_experts_share_a_column():
    few = [f"model.layers.0.mlp.experts.{expert}.{name}" for expert in range(2) for name in ("w1", "w2")]
    assert make_grids(few)[0].kinds == ["0.w1", "0.w2", "1.w1", "1.w2"]
    many = [f"model.layers.0.mlp.experts.{expert}.{name}" for expert in range(8) for name in ("w1", "w2")]
    (grid,) = make_grids(["model.layers.0.self_attn.q_proj", *many])
    assert grid.kinds == ["q_proj", "*.w1", "*.w2"]
    assert grid.list_cells("*.w2") == [many[1::2]]
