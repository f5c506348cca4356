"""axolotl-layersel: decide which layers get a LoRA adapter, from the user's own data.

Importing the package loads nothing heavy: ``LayerSelectionPlugin`` is looked up when Axolotl asks for it.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["LayerSelectionPlugin"]


def __getattr__(name: str) -> Any:
    if name == "LayerSelectionPlugin":
        from axolotl_layersel.plugin import LayerSelectionPlugin

        return LayerSelectionPlugin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
