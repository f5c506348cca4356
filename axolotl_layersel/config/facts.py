"""Attributes of a model's configuration, read such that a missing one is None.

Seen with transformers 5.16.1: reading an attribute that differs between layers, such as ``head_dim`` of Gemma 4, raises
a RuntimeError. ``tests/families/test_configurations.py`` reads every configuration of transformers.
"""

from typing import Any


def read_fact(config: Any, name: str) -> Any:
    """Return the attribute ``name`` of a configuration; None if it has none, or one that differs between layers."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return None


def find_text_config(config: Any) -> Any:
    """Return the configuration of the part of a model that reads tokens, which may be the whole model.

    If several parts read tokens, it is the decoder's.
    """
    try:
        return config.get_text_config()
    except ValueError:
        return config.get_text_config(decoder=True)
