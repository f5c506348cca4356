"""A report that fails is a warning; what ends a run on purpose still ends it."""

import logging

import pytest

from axolotl_layersel.common.errors import warning_instead


# SystemExit is what rich raises where standard output is a closed pipe.
@pytest.mark.parametrize("error", [KeyError("a\nb"), OSError("full"), SystemExit(1)], ids=repr)
def test_the_error_of_a_report_is_one_warning(error, caplog):
    with (
        caplog.at_level(logging.WARNING, "axolotl.layersel"),
        warning_instead("it cannot be drawn", "The run goes on."),
    ):
        raise error
    (message,) = caplog.messages
    assert message.startswith(f"layersel: it cannot be drawn ({type(error).__name__}: ")
    assert message.endswith("). The run goes on.") and "\n" not in message


def test_ctrl_c_passes():
    with pytest.raises(KeyboardInterrupt), warning_instead("it cannot be drawn", "The run goes on."):
        raise KeyboardInterrupt
