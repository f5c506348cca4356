"""Tables and messages print on every terminal, and what files say does not steer it."""

import io

from helpers.plans import make_plan
from typer.testing import CliRunner

from axolotl_layersel.cli.main import app
from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.paths import plan_path
from axolotl_layersel.common.terminal import make_console
from axolotl_layersel.l1ra.records import RankHistory
from axolotl_layersel.reports.plan_table import print_plan
from axolotl_layersel.selection.plan_file import write_plan


def test_a_bar_is_a_bar_where_the_terminal_knows_it():
    output = io.TextIOWrapper(io.BytesIO(), "utf-8")
    print_plan(make_plan(), make_console(output, width=100))
    output.flush()
    assert "█" * 24 in output.buffer.getvalue().decode()


def test_show_writes_out_what_would_steer_a_terminal(tmp_path):
    hostile = "\x1b]0;owned\x07\x1b[2J[bold]x[/] :smile: \u202e\r\n\x9b1m"
    stack = "m"
    modules = [f"{stack}.0.{hostile}"]
    write_plan(make_plan((0.5,), stack=stack, modules=modules, unscored={0: hostile}), plan_path(tmp_path))
    RankHistory({0: {modules[0]: 4}}).write(tmp_path)
    result = CliRunner().invoke(app, ["show", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert not {"\x1b", "\x07", "\x9b", "\r", "\u202e"} & set(result.output)
    assert r"\x1b]0;owned\x07\x1b[2J[bold]x[/] :smile: \u202e\r\n\x9b1m" in result.output.replace("\n", "")
    write_plan(make_plan((0.5,), stack=stack, modules=modules, method="cka"), tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text((tmp_path / "plan.json").read_text().replace('"cka"', '"\\u001b[31mred[/]"'))
    result = CliRunner().invoke(app, ["show", str(tmp_path / "plan.json")])
    assert result.exit_code == 1
    assert len(result.output.splitlines()) == 1
    assert "\x1b" not in result.output


def test_a_message_is_one_line_that_steers_no_terminal():
    assert str(LayerselError("a\x1b[2Jb\nc ä")) == r"a\x1b[2Jb\nc ä"
