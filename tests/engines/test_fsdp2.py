"""What FSDP2's engine relies on; the runs in test_runs.py assert the rest on the engine itself."""

import ast
import inspect
import textwrap


def test_fsdp2s_full_state_dict_is_read_by_rank_zero_and_broadcast_upstream():
    """The restore of FSDP2 adapters works around this function; if it changed, look whether it is still needed."""
    from accelerate.utils.fsdp_utils import load_fsdp_model

    tree = ast.parse(textwrap.dedent(inspect.getsource(load_fsdp_model)))
    assert "accelerator.is_fsdp2" in ast.unparse(tree)
    assert "state_dict = {}" in ast.unparse(tree)


def test_shards_can_be_found_in_the_whole():
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert list(inspect.signature(compute_local_shape_and_global_offset).parameters)[:3] == [
        "global_shape",
        "mesh",
        "placements",
    ]


def test_parameters_of_a_sharded_model_are_known_by_the_address_of_their_shard():
    from accelerate import Accelerator

    assert "p._local_tensor.data_ptr() if isinstance(p, DTensor)" in inspect.getsource(Accelerator._prepare_fsdp2)
