"""Valid settings, and the messages for a file with other settings."""

import pytest
from hypothesis import strategies as st
from pydantic import ValidationError

from axolotl_layersel.config.root import LayerselArgs

# Values that a YAML file can hold.
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from([2**32, 10**30, -(10**400)]),
    st.floats(),
    st.sampled_from(["auto", "last", "0-5", "16", "1e-3", "1e9", "", "positive", "random"]),
    st.text(max_size=5),
    st.binary(max_size=3),
    st.dates(),
)


VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3),
    max_leaves=5,
)


FILE = {"plugins": ["axolotl_layersel.LayerSelectionPlugin"], "adapter": "lora", "lora_r": 4, "lora_alpha": 8}


def say_by_file(block: dict, keys: dict) -> str:
    """Return the messages that refuse a YAML file with ``keys``."""
    with pytest.raises(ValidationError) as caught:
        LayerselArgs.model_validate({**FILE, **keys, "layersel": block})
    return caught.value.errors()[0]["msg"].removeprefix("Value error, ")
