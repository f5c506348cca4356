"""A command of typer's whose help describes its arguments.

Click 8.5 takes the help of an argument from its own constructor, to which typer 0.25 does not pass it, so it is lost.
"""

from typing import Any

from typer.core import TyperArgument, TyperCommand
from typer.utils import get_params_from_function


class DescribedCommand(TyperCommand):
    """A command that reads the help of its arguments from the annotations of its function."""

    def __init__(self, *args: Any, **values: Any) -> None:
        super().__init__(*args, **values)
        annotated = get_params_from_function(self.callback) if self.callback else {}
        for param in self.params:
            if isinstance(param, TyperArgument) and not param.help and param.name in annotated:
                param.help = getattr(annotated[param.name].default, "help", None)
