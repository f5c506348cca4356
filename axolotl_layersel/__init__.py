"""axolotl-layersel: choose the layers that get a LoRA adapter from the user's own data.

``LayerSelectionPlugin`` is for Axolotl. ``prepare_trainer`` does the same for a plain ``transformers.Trainer``, with a
``LayerselConfig``. Importing the package is fast: each name is imported when it is used.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from axolotl_layersel.common.errors import LayerselError
    from axolotl_layersel.config.flexora import FlexoraConfig
    from axolotl_layersel.config.l1ra import L1RAConfig
    from axolotl_layersel.config.root import LayerselConfig
    from axolotl_layersel.config.selection import SelectionConfig
    from axolotl_layersel.plugin import LayerSelectionPlugin
    from axolotl_layersel.training.prepare import prepare_trainer

__version__ = "0.1.0"
__all__ = [
    "FlexoraConfig",
    "L1RAConfig",
    "LayerSelectionPlugin",
    "LayerselConfig",
    "LayerselError",
    "SelectionConfig",
    "prepare_trainer",
]

# The module of each public name.
SOURCES = {
    "FlexoraConfig": "config.flexora",
    "L1RAConfig": "config.l1ra",
    "LayerSelectionPlugin": "plugin",
    "LayerselConfig": "config.root",
    "LayerselError": "common.errors",
    "SelectionConfig": "config.selection",
    "prepare_trainer": "training.prepare",
}


def __getattr__(name: str) -> Any:
    if name not in SOURCES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{SOURCES[name]}"), name)
    except ImportError as error:
        if name != "LayerSelectionPlugin" or "axolotl.integrations.base" not in sys.modules:
            raise
        # Axolotl ignores a plugin with an ImportError, and would train plain LoRA.
        raise RuntimeError(
            f"plugins: {__name__}.{name} cannot be loaded: {error}. Install axolotl-layersel again."
        ) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
