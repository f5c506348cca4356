import pytest

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.paths import gates_path
from axolotl_layersel.selection.gate_history import GateHistory


def make_history() -> GateHistory:
    history = GateHistory(["0", "1"])
    history.add(1.5, None, [0.0, 0.0])
    history.add(1.25, 2.5, [0.01, -0.02])
    return history


def test_what_is_read_is_what_was_written(tmp_path):
    make_history().write(tmp_path)
    assert (
        gates_path(tmp_path).read_text()
        == "step,train_loss,validation_loss,0,1\n1,1.5,,0.0,0.0\n2,1.25,2.5,0.01,-0.02\n"
    )
    assert GateHistory.read(tmp_path) == make_history()
    assert make_history().final == {"0": 0.01, "1": -0.02}
    assert GateHistory(["0"]).final == {}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "step,train_loss,validation_loss\n",
        "step,train_loss,validation_loss,0,0\n1,1,,0,0\n",
        "step,train_loss,validation_loss,0\n1,x,,0.5\n",
        "step,train_loss,validation_loss,0\n1,1,,nan\n",
        "step,train_loss,validation_loss,0\n1,1,,\n",
        "step,train_loss,validation_loss,0\n1,1,,0.5,0.5\n",
        "step,train_loss,validation_loss,0\n2,1,,0.5\n",
        "step,train_loss,validation_loss,0\n1,1,,0." + "5" * 200_000 + "\n",
    ],
)
def test_a_damaged_file_is_an_error(tmp_path, content):
    make_history().write(tmp_path)
    gates_path(tmp_path).write_text(content)
    with pytest.raises(LayerselError, match=r"^PATH: .*gates\.csv is damaged .*Remove it, or make a new plan\.$"):
        GateHistory.read(tmp_path)
