"""Import transformers and PEFT without packages that they load if present, and that a model without weights lacks.

They take half of the time of the imports. Seen with transformers 5.16.1 and PEFT 0.20.0
(``tests/runs/test_doctor_is_quick.py`` fails when a package is loaded anyway, or the models cannot be built without).
"""

import contextlib
import sys
from collections.abc import Iterator

HEAVY = ("sklearn", "torchao", "bitsandbytes", "kernels", "gptqmodel", "tensorflow")


@contextlib.contextmanager
def importing_lightly() -> Iterator[None]:
    """Make the packages in ``HEAVY`` look absent within the block, unless transformers has been imported before."""
    hidden = [] if "transformers" in sys.modules else [name for name in HEAVY if name not in sys.modules]
    # Python raises ModuleNotFoundError for a module that is None here.
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            sys.modules.pop(name, None)
