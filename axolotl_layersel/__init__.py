"""axolotl-layersel: decide which layers get a LoRA adapter, from the user's own data.

``LayerSelectionPlugin`` is for Axolotl. ``prepare_trainer`` does the same for a plain ``transformers.Trainer``, as a
``LayerselConfig`` says. Importing the package loads nothing heavy: each name is looked up when it is asked for.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from axolotl_layersel.common.errors import LayerselError
    from axolotl_layersel.config.flexora import FlexoraArgs as FlexoraConfig
    from axolotl_layersel.config.l1ra import L1RAArgs as L1RAConfig
    from axolotl_layersel.config.root import LayerselBlock as LayerselConfig
    from axolotl_layersel.config.selection import SelectionArgs as SelectionConfig
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

# Where each public name is, and what it is called there: the settings are those of the YAML file.
SOURCES = {
    "FlexoraConfig": ("config.flexora", "FlexoraArgs"),
    "L1RAConfig": ("config.l1ra", "L1RAArgs"),
    "LayerSelectionPlugin": ("plugin", "LayerSelectionPlugin"),
    "LayerselConfig": ("config.root", "LayerselBlock"),
    "LayerselError": ("common.errors", "LayerselError"),
    "SelectionConfig": ("config.selection", "SelectionArgs"),
    "prepare_trainer": ("training.prepare", "prepare_trainer"),
}


def __getattr__(name: str) -> Any:
    if name not in SOURCES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = SOURCES[name]
    try:
        return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
    except ImportError as error:
        if name != "LayerSelectionPlugin" or "axolotl.integrations.base" not in sys.modules:
            raise
        # Axolotl passes over a plugin with an ImportError, and would train plain LoRA.
        raise RuntimeError(
            f"plugins: {__name__}.{name} cannot be loaded: {error}. Install axolotl-layersel again."
        ) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
