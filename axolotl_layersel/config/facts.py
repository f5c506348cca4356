"""What a model's configuration says, read so that a fact that it does not have is None, however it is missing.

Relied on in transformers 5.16.1 (``tests/families/test_configurations.py`` reads all configurations that there are): a
fact that differs between layers, such as ``head_dim`` of Gemma 4, raises a RuntimeError of its own where it is read of
the model.
"""

from typing import Any


def read_fact(config: Any, name: str) -> Any:
    """Return what a configuration says under ``name``; None where it says nothing, or another thing of each layer."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return None


def find_text_config(config: Any) -> Any:
    """Return the configuration of the part of a model that reads tokens, which may be the whole; of several parts that
    read some, that of the one that writes.
    """
    try:
        return config.get_text_config()
    except ValueError:
        return config.get_text_config(decoder=True)
