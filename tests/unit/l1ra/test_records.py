from io import StringIO

import pytest
from helpers.records import RANKS
from typer.testing import CliRunner

from axolotl_layersel.cli.main import app
from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.tables import find_places
from axolotl_layersel.common.terminal import make_console
from axolotl_layersel.l1ra.records import RankHistory, describe_update
from axolotl_layersel.reports.rank_table import print_ranks


def test_the_history_comes_back_from_its_file(tmp_path):
    history = RankHistory({0: dict.fromkeys(RANKS, 4), 20: RANKS})
    history.write(tmp_path)
    text = (tmp_path / "layersel" / "ranks.csv").read_text()
    assert text.splitlines()[:2] == ["step,module,rank", "0,model.layers.0.self_attn.q_proj,4"]
    assert len(text.splitlines()) == 7
    assert RankHistory.read(tmp_path) == history


def test_an_update_is_described_in_numbers_for_trackers():
    numbers = describe_update(RANKS, dict.fromkeys(RANKS, 10), pool=1, pruned=3, added=2)
    assert numbers == {
        "layersel/total_rank": 11,
        "layersel/pool": 1,
        "layersel/trainable_parameters_in_use": 110,
        "layersel/components_pruned": 3,
        "layersel/components_added": 2,
        "layersel/rank/q_proj": 2.5,
        "layersel/rank/up_proj": 6,
    }


def test_the_table_shows_ranks_by_layer_and_type():
    output = StringIO()
    print_ranks(dict.fromkeys(RANKS, 4), RANKS, make_console(output, width=100))
    lines = [line.split() for line in output.getvalue().splitlines()]
    assert ["0", "2", "6", "4.0"] in lines
    assert ["1", "3", "3.0"] in lines
    assert ["mean", "2.5", "6.0", "3.7"] in lines
    assert ["before", "4.0", "4.0", "4.0"] in lines
    assert "in all 12 before, 11 now, from 2 to 6" in output.getvalue()


def test_modules_of_one_name_and_number_have_places_of_their_own():
    attention = ["self_attn", "encoder_attn"]
    decoder = [f"model.decoder.layers.0.{name}.q_proj" for name in attention]
    encoder = "model.encoder.layers.0.self_attn.q_proj"
    assert find_places([*decoder, "lm_head"]) == {
        decoder[0]: ("0", "self_attn.q_proj"),
        decoder[1]: ("0", "encoder_attn.q_proj"),
        "lm_head": ("", "lm_head"),
    }
    both = find_places([decoder[0], encoder])
    assert both == {
        decoder[0]: ("model.decoder.layers.0", "q_proj"),
        encoder: ("model.encoder.layers.0", "q_proj"),
    }
    experts = [f"model.layers.1.mlp.experts.{i}.{name}" for i in range(2) for name in ("w1", "w2")]
    assert len(set(find_places([*experts, "model.layers.0.mlp.up_proj"]).values())) == 5
    output = StringIO()
    print_ranks({decoder[0]: 4, encoder: 4}, {decoder[0]: 1, encoder: 7}, make_console(output, width=100))
    assert [line.split() for line in output.getvalue().splitlines()[2:]] == [
        ["model.decoder.layers:"],
        ["layer", "q_proj"],
        ["0", "1"],
        ["mean", "1.0"],
        ["before", "4.0"],
        [],
        ["model.encoder.layers:"],
        ["layer", "q_proj"],
        ["0", "7"],
        ["mean", "7.0"],
        ["before", "4.0"],
    ]


def test_show_prints_and_draws_the_ranks_of_a_run_without_a_plan(tmp_path):
    RankHistory({0: dict.fromkeys(RANKS, 4), 20: RANKS}).write(tmp_path)
    result = CliRunner().invoke(app, ["show", str(tmp_path), "--picture", str(tmp_path / "ranks.png")])
    assert result.exit_code == 0
    assert "in all 12 before, 11 now" in result.output
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_nothing_is_refused(tmp_path):
    result = CliRunner().invoke(app, ["show", str(tmp_path), "--picture", str(tmp_path / "ranks.png")])
    assert result.exit_code == 1
    assert "holds no layersel/plan.json" in result.output.replace("\n", " ")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "it is empty"),
        (b"\n", "its first line is not step,module,rank"),
        (b"step,module,rank\n", "its steps do not ascend from 0"),
        (b"step,module,rnk\n0,a,1\n", "its first line is not"),
        (b"step,module,rank\n0,a\n", "line 2 has 2 fields"),
        (b"step,module,rank\n0,a,1,2\n", "line 2 has 4 fields"),
        (b"step,module,rank\n0,a,-1\n", "'-1' is not a whole number of at least 0"),
        (b"step,module,rank\n0,a,1.5\n", "'1.5' is not a whole number of at least 0"),
        (b"step,module,rank\n0,a,nan\n", "'nan' is not a whole number of at least 0"),
        (b"step,module,rank\n0,a," + b"9" * 20 + b"\n", "is not a whole number of at least 0"),
        (b"step,module,rank\n0,a,1\n0,a,1\n", "line 3 names 'a' a second time"),
        (b"step,module,rank\n0,a,1\n3,b,1\n", "it lists other modules at step 3"),
        (b"step,module,rank\n3,a,1\n0,a,1\n", "its steps do not ascend from 0"),
        (b"step,module,rank\n0," + b"a" * 200_000 + b",1\n", "field larger than field limit"),
        (b'step,module,rank\n0,"a,1\n', "unexpected end of data"),
        (b"step,module,rank\n0,\xff,1\n", "UnicodeDecodeError"),
    ],
)
def test_ranks_that_are_damaged_are_one_line_that_says_where(tmp_path, content, fault):
    path = tmp_path / "layersel" / "ranks.csv"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(LayerselError, match=f"^KEY: .*ranks.csv is damaged .*{fault}"):
        RankHistory.read(tmp_path, "KEY")
    result = CliRunner().invoke(app, ["show", str(tmp_path)])
    assert result.exit_code == 1
    assert len(result.output.splitlines()) == 1
