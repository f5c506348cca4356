"""What FSDP2's engine relies on; the runs in test_runs.py assert the rest on the engine itself."""

import ast
import inspect
import textwrap
import types

import pytest
from helpers.models import describe_engine

from axolotl_layersel.engines import find_engine


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


def test_what_fsdp2_is_asked_to_compute_again_is_looked_at_when_the_model_is_prepared():
    from accelerate import Accelerator
    from axolotl.monkeypatch.accelerate.fsdp2 import fsdp2_prepare_model

    for prepare in (Accelerator._prepare_fsdp2, fsdp2_prepare_model):
        assert "plugin.activation_checkpointing:" in inspect.getsource(prepare)


@pytest.mark.parametrize("asked", [True, False])
def test_layers_are_checkpointed_by_transformers_where_fsdp2_was_asked_to(asked):
    from accelerate.utils import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, activation_checkpointing=asked)
    trainer = describe_engine("FSDP", {"fsdp_plugin": plugin})
    trainer.args = types.SimpleNamespace(
        gradient_checkpointing=False,
        gradient_checkpointing_kwargs=None,
        fsdp_config={"version": 2, "activation_checkpointing": asked},
    )
    find_engine(trainer).take_over_checkpointing()
    assert plugin.activation_checkpointing is False
    assert trainer.args.gradient_checkpointing is asked
    assert not trainer.args.fsdp_config.get("activation_checkpointing"), "a second trainer would have both"
    assert trainer.args.gradient_checkpointing_kwargs == ({"use_reentrant": False} if asked else None)


def test_full_state_dicts_of_torchaos_moments_cannot_be_read():
    """``l1ra`` refuses them; where all objects are read, look whether that is still needed."""
    from accelerate.utils.fsdp_utils import load_fsdp_optimizer

    assert "torch.load(input_optimizer_file, weights_only=True)" in inspect.getsource(load_fsdp_optimizer)


@pytest.mark.parametrize(("kind", "whole"), [("FULL_STATE_DICT", True), ("SHARDED_STATE_DICT", False), (None, False)])
def test_the_engine_knows_whether_its_checkpoints_hold_the_optimizers_state_whole(monkeypatch, kind, whole):
    from accelerate.utils import FullyShardedDataParallelPlugin

    monkeypatch.delenv("FSDP_STATE_DICT_TYPE", raising=False)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind)
    assert find_engine(describe_engine("FSDP", {"fsdp_plugin": plugin})).writes_whole_state() is whole
    assert find_engine(describe_engine("NO", {})).writes_whole_state() is False
