"""What the plugin sees of a YAML file before Axolotl has checked it."""

import hypothesis
from axolotl.utils.dict import DictDefault
from hypothesis import example, given
from hypothesis import strategies as st
from test_args import VALUES

from axolotl_layersel.errors import LayerselError
from axolotl_layersel.plugin import LayerSelectionPlugin


@hypothesis.settings(max_examples=200, deadline=None)
@given(block=VALUES, key=st.sampled_from([None, "selection", "l1ra", "method"]), kernel=VALUES)
@example(block=[1], key="method", kernel=None)
def test_a_block_of_any_type_is_registered_or_refused_by_its_key(block, key, kernel):
    block = {"selection": {"method": block}} if key == "method" else block if key is None else {key: block}
    try:
        LayerSelectionPlugin().register(DictDefault({"layersel": block, "lora_o_kernel": kernel}))
    except LayerselError as error:
        assert str(error).startswith(("layersel.", "lora_o_kernel: "))
