"""What DeepSpeed's engines rely on; the runs in test_runs.py assert the rest on the engines themselves."""

import inspect
import types

import pytest
from helpers.models import describe_engine

from axolotl_layersel.common.errors import LayerselError, raise_first
from axolotl_layersel.config.engines import find_engine_faults, moves_state
from axolotl_layersel.engines import find_engine


def test_a_partitioned_parameter_says_where_its_parts_are():
    from deepspeed.runtime.zero import partition_parameters

    source = inspect.getsource(partition_parameters)
    for attribute in ("ds_tensor", "ds_numel", "ds_process_group"):
        assert f"param.{attribute} = " in source


def test_each_rank_holds_its_part_of_what_deepspeed_splits_where_an_edit_looks_for_it():
    from deepspeed.runtime.zero import partition_parameters
    from deepspeed.utils.tensor_fragment import set_full_hp_param

    source = inspect.getsource(set_full_hp_param)
    assert "torch.narrow(value.flatten(), 0, lp_frag_address.start, lp_frag_address.numel)" in source
    assert "hp_fragment = self._hp_mapping.get_hp_fragment(optim_state_key)" in source
    assert "hp_fragment.data.copy_(value_fragment.data)" in source
    source = inspect.getsource(partition_parameters)
    assert "start = partition_size * self.get_partition_rank()" in source
    assert "param.ds_tensor.copy_(src_tensor)" in source


def test_deepspeed_links_the_state_of_the_first_group_of_parameters_only():
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils import mixed_precision_linkage

    source = inspect.getsource(DeepSpeedZeroOptimizer._optimizer_step)
    stepped = source.index("self.optimizer.param_groups = [original_param_groups[group_no]]")
    assert stepped < source.index("self._lazy_init_hp_params_optimizer_state()"), "after the step of one group"
    source = inspect.getsource(DeepSpeedZeroOptimizer._lazy_init_hp_params_optimizer_state)
    assert "if not self._hp_optimizer_states_linked:" in source
    assert "self.single_partition_of_fp32_groups[i]" in source
    source = inspect.getsource(mixed_precision_linkage.lazy_init_hp_params_optimizer_state)
    assert "set_optim_state_fragment(flat_hp_partition, optimizer_state[flat_hp_partition])" in source


def test_what_holds_a_deepspeed_engine_that_was_destroyed_is_let_go_of():
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    for hook in ("self.module_forward_pre_hook = ", "self.module_forward_post_hook = "):
        assert hook in inspect.getsource(DeepSpeedEngine.__init__)
        assert hook.split()[0] not in inspect.getsource(DeepSpeedEngine.destroy), "it removes its hooks by itself now"
    assert "p._z3_optimizer = self" in inspect.getsource(DeepSpeedZeroOptimizer_Stage3)


def test_a_second_engine_can_be_built_over_the_parameters_of_the_first():
    from accelerate import Accelerator
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero import partition_parameters

    assert "ds_active_sub_modules" in inspect.getsource(partition_parameters)
    assert hasattr(DeepSpeedEngine, "empty_partition_cache")
    assert "engine.destroy()" in inspect.getsource(Accelerator.free_memory)


def describe_deepspeed(content: dict):
    return find_engine(
        describe_engine(
            "DEEPSPEED", {"deepspeed_plugin": types.SimpleNamespace(zero_stage=3, deepspeed_config=content)}
        )
    )


def test_a_deepspeed_file_with_an_optimizer_under_which_rank_cannot_move_is_refused():
    describe_deepspeed({"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 3}}).check_optimizer()
    with pytest.raises(LayerselError, match="Lamb keeps no Adam moments"):
        describe_deepspeed({"optimizer": {"type": "Lamb"}}).check_optimizer()


@pytest.mark.parametrize("key", ["offload_param", "offload_optimizer"])
@pytest.mark.parametrize("device", ["cpu", "nvme"])
def test_what_deepspeed_keeps_on_disk_is_refused_where_it_is_read_or_written(key, device):
    content = {"zero_optimization": {"stage": 3, key: {"device": device}}}
    blocks = {
        "read": {"selection": {"method": "cka"}},
        "searched": {"selection": {"method": "flexora"}},
        "moved": {"l1ra": {}},
    }
    for kind, block in blocks.items():
        refused = device == "nvme" and (kind != "read" or key == "offload_param")
        for check in (
            lambda block=block: describe_deepspeed(content).check_storage(moves_state(block)),
            lambda block=block: raise_first(find_engine_faults({"deepspeed": content, "layersel": block})),
        ):
            if refused:
                with pytest.raises(
                    LayerselError, match=f"zero_optimization.{key}.device: nvme in its file keeps tensors on disk"
                ):
                    check()
            else:
                check()
