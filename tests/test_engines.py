"""What engines.py relies on beyond documented interfaces: each fails loudly when a library changes it.

The distributed halves of these facts are asserted by the runs in test_runs.py on the engines themselves.
"""

import ast
import inspect
import json
import re
import textwrap
import types
from datetime import timedelta
from importlib.metadata import version

import pytest
import torch
from conftest import make_lora, make_small_llama, make_trainer
from transformers import (
    DefaultFlowCallback,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer_callback import CallbackHandler, ExportableState

from axolotl_layersel import engines
from axolotl_layersel.args import LayerselBlock, SelectionArgs
from axolotl_layersel.errors import LayerselError
from axolotl_layersel.prepare import prepare_trainer

COUNTER = "early_stopping_patience_counter"
SEEN = {"axolotl": "0.19.0", "transformers": "5.16.1", "accelerate": "1.13.0", "peft": "0.20.0"}


class Counting(TrainerCallback, ExportableState):
    """Counts the steps that it sees."""

    count = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.count += 1

    def state(self):
        return {"args": {}, "attributes": {"count": self.count}}


@pytest.mark.parametrize("library", SEEN)
def test_the_versions_are_those_that_were_looked_at(library):
    assert version(library) == SEEN[library], "read the list at the head of engines.py against the new version"


def test_checkpoints_are_written_by_save_model_before_they_are_pushed():
    source = inspect.getsource(Trainer._save_checkpoint)
    assert source.index("self.save_model(output_dir, _internal_call=True)") < source.index("_push_from_checkpoint")
    assert list(inspect.signature(Trainer.save_model).parameters) == ["self", "output_dir", "_internal_call"]


@pytest.mark.parametrize("method", ["_load_from_checkpoint", "_load_best_model"])
def test_lora_weights_are_restored_by_the_models_own_load_adapter_alone(method):
    """Ragged adapters do not fit the modules in training: what restores them takes the place of this one call."""
    source = inspect.getsource(getattr(Trainer, method))
    assert source.count("model.load_adapter(") == (2 if method == "_load_from_checkpoint" else 1)


def test_adapter_files_come_from_the_models_own_save_pretrained():
    from axolotl.core.trainers.base import AxolotlTrainer

    for trainer in (Trainer, AxolotlTrainer):
        source = inspect.getsource(trainer._save)
        assert source.count("save_pretrained(") >= 2 and "self.model.save_pretrained(" in source


def test_axolotl_saves_by_the_three_ways_that_are_taken_over():
    from axolotl import train
    from axolotl.core.trainers.base import AxolotlTrainer

    end = inspect.getsource(train.save_trained_model)
    quantised = inspect.getsource(AxolotlTrainer._save_fsdp2_quantized_lora_adapter)
    for source in (end, quantised):
        # Looked up when it is called: it can be another function by then.
        assert re.search(
            r"from axolotl.integrations.expert_parallel.shard import \(?\s*save_fsdp2_lora_adapter", source
        )
    assert "is_deepspeed_zero3_enabled():" in end and end.count("trainer.save_model(cfg.output_dir)") == 2
    assert end.count("model.save_pretrained(cfg.output_dir)") == 2


def test_shards_can_be_found_in_the_whole():
    from deepspeed.runtime.zero import partition_parameters
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert list(inspect.signature(compute_local_shape_and_global_offset).parameters)[:3] == [
        "global_shape",
        "mesh",
        "placements",
    ]
    source = inspect.getsource(partition_parameters)
    for attribute in ("ds_tensor", "ds_numel", "ds_process_group"):
        assert f"param.{attribute} = " in source


def test_the_embeddings_hooks_are_found_by_their_name_however_many_there_are():
    model = make_lora(make_small_llama())
    embeddings = model.get_base_model().model.embed_tokens
    for _ in range(3):
        model.enable_input_require_grads()
    assert len(embeddings._forward_hooks) >= 3
    assert embeddings(torch.tensor([[3]])).requires_grad
    kept = embeddings.register_forward_hook(lambda *args: None)
    engines.remove_embedding_hooks(model)
    assert list(embeddings._forward_hooks) == [kept.id], "a hook of somebody else's is gone, or one of theirs is left"
    assert not embeddings(torch.tensor([[3]])).requires_grad


def test_fsdp2s_full_state_dict_is_read_by_rank_zero_and_broadcast_upstream():
    """The restore of FSDP2 adapters works around this function; if it changed, look whether it is still needed."""
    from accelerate.utils.fsdp_utils import load_fsdp_model

    tree = ast.parse(textwrap.dedent(inspect.getsource(load_fsdp_model)))
    assert "accelerator.is_fsdp2" in ast.unparse(tree)
    assert "state_dict = {}" in ast.unparse(tree)


def test_training_looks_for_a_stop_after_an_epoch_only_and_keeps_what_callbacks_counted():
    loop = inspect.getsource(Trainer._inner_training_loop)
    begin, epoch, stop = (loop.index(part) for part in ("on_train_begin(", "self._run_epoch(", "should_training_stop"))
    assert begin < epoch < stop and loop.count("_run_epoch(") == 1
    assert "args.eval_on_start" in loop[begin:epoch]
    save = inspect.getsource(Trainer._save_checkpoint)
    assert "self.state.stateful_callbacks[cb_name].append(cb_state)" in save
    assert "restore_callback_states_from_checkpoint" in inspect.getsource(Trainer._load_callback_state)


def test_callbacks_get_their_counts_back_and_stay_what_and_where_they_are():
    stopping, other = EarlyStoppingCallback(early_stopping_patience=5), EarlyStoppingCallback(early_stopping_patience=9)
    callbacks = [DefaultFlowCallback(), stopping, other]
    counts = [0, 0, 1, 0, 3, 2]  # of both, at the start and in two checkpoints
    entries = [{"args": {"early_stopping_patience": 4}, "attributes": {COUNTER: count}} for count in counts]
    engines.restore_callbacks(callbacks, TrainerState(stateful_callbacks={"EarlyStoppingCallback": entries}))
    assert [callback.early_stopping_patience_counter for callback in callbacks[1:]] == [3, 2]
    assert callbacks[1:] == [stopping, other] and stopping.early_stopping_patience == 5
    engines.restore_callbacks(callbacks[:2], TrainerState(stateful_callbacks={"EarlyStoppingCallback": entries[2]}))
    assert stopping.early_stopping_patience_counter == 1


def test_a_callback_that_the_checkpoint_does_not_know_is_saved_with_the_next_one(tmp_path):
    make_trainer(make_lora(make_small_llama()), tmp_path, save_strategy="steps", save_steps=2).train()
    again = make_trainer(make_lora(make_small_llama()), tmp_path, save_strategy="steps", save_steps=4)
    again.add_callback(Counting())
    prepare_trainer(again, LayerselBlock(selection=SelectionArgs(method="first", ratio=1)))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["Counting"][-1]["attributes"] == {"count": 2}


def test_what_a_trial_gives_back_is_where_the_libraries_keep_it():
    from accelerate import Accelerator
    from axolotl.core.trainers.base import AxolotlTrainer
    from axolotl.core.training_args import AxolotlTrainingArguments
    from trl import DPOTrainer

    assert "self._stored_metrics = " in inspect.getsource(AxolotlTrainer.__init__)
    assert "self._metrics = " in inspect.getsource(DPOTrainer.__init__)
    assert "model._original_forward = model.forward" in inspect.getsource(Accelerator.prepare_model)
    counts = {name for name in AxolotlTrainingArguments.__dataclass_fields__ if name.startswith("jagged_")}
    assert counts == set(engines.STEP_COUNTS)


def test_a_gate_step_prepares_and_weighs_its_rows_as_the_trainer_does():
    from axolotl.core.trainers.mixins import ActivationOffloadingMixin

    assert "inputs = self._prepare_inputs(inputs)" in inspect.getsource(Trainer.training_step)
    assert "with self.activation_offload_context:" in inspect.getsource(ActivationOffloadingMixin.training_step)


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


@pytest.mark.parametrize("size", [1, 4, 5])
def test_a_tensor_is_changed_part_by_part_as_it_is_as_a_whole(size):
    torch.manual_seed(0)
    whole, factors = torch.randn(5, 3), torch.tensor([2.0, 0.5, -1.0])

    def edit(tensor: torch.Tensor) -> None:
        tensor[2] = torch.arange(3.0)
        tensor.index_fill_(0, torch.tensor([4]), 0)
        tensor.mul_(factors)

    expected = whole.clone()
    edit(expected)
    length = -(-15 // size)
    padded = torch.nn.functional.pad(whole.flatten(), (0, size * length - 15), value=7.0)
    for rank in range(size):
        engines.edit_slice(padded[rank * length : (rank + 1) * length], rank * length, whole.shape, edit)
    assert torch.equal(padded[:15].view(5, 3), expected)
    assert (padded[15:] == 7).all()


def test_a_checkpoint_says_whether_the_evaluation_of_its_step_is_still_due():
    assert "control.should_evaluate = False" in inspect.getsource(CallbackHandler.on_evaluate)
    assert TrainerControl(should_evaluate=True).state()["args"]["should_evaluate"] is True
    assert "self.callback_handler.callbacks + [self.control]" in inspect.getsource(Trainer._save_checkpoint)
    expected = {
        "_save_checkpoint": ["self", "model", "trial"],
        "_determine_best_metric": ["self", "metrics", "trial"],
        "_load_rng_state": ["self", "checkpoint"],
    }
    for method, parameters in expected.items():
        assert list(inspect.signature(getattr(Trainer, method)).parameters) == parameters
    assert list(inspect.signature(Trainer._evaluate).parameters)[:3] == ["self", "trial", "ignore_keys_for_eval"]
    # Written and loaded where evaluate_and_save expects it: before a checkpoint's first batch, not earlier.
    assert "_load_rng_state" in inspect.getsource(Trainer._run_epoch)


def test_what_holds_a_deepspeed_engine_that_was_destroyed_is_let_go_of():
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    for hook in ("self.module_forward_pre_hook = ", "self.module_forward_post_hook = "):
        assert hook in inspect.getsource(DeepSpeedEngine.__init__)
        assert hook.split()[0] not in inspect.getsource(DeepSpeedEngine.destroy), "it removes its hooks by itself now"
    assert "p._z3_optimizer = self" in inspect.getsource(DeepSpeedZeroOptimizer_Stage3)


def test_processes_that_load_data_are_initialised_in_both_ways(tmp_path):
    trainer = make_trainer(make_small_llama(layers=1), tmp_path, dataloader_num_workers=1)
    calls = tmp_path / "calls"
    engines.initialize_loaders(trainer, lambda worker: calls.write_text(f"{worker} {torch.initial_seed()}"))
    loader = trainer.get_train_dataloader()
    assert loader.base_dataloader.worker_init_fn.args[1].func.__name__ == "seed_worker", "the Trainer's own"
    next(iter(loader))
    assert calls.read_text().split()[0] == "0"


def test_a_second_engine_can_be_built_over_the_parameters_of_the_first():
    from accelerate import Accelerator
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero import partition_parameters

    assert "ds_active_sub_modules" in inspect.getsource(partition_parameters)
    assert hasattr(DeepSpeedEngine, "empty_partition_cache")
    assert "engine.destroy()" in inspect.getsource(Accelerator.free_memory)
    assert "p._local_tensor.data_ptr() if isinstance(p, DTensor)" in inspect.getsource(Accelerator._prepare_fsdp2)


@pytest.mark.parametrize(
    ("kind", "plugin", "name"),
    [
        ("NO", {}, "single"),
        ("MULTI_GPU", {}, "ddp"),
        ("MULTI_CPU", {}, "ddp"),
        ("DEEPSPEED", {"deepspeed_plugin": types.SimpleNamespace(zero_stage=0)}, "ddp"),
        ("DEEPSPEED", {"deepspeed_plugin": types.SimpleNamespace(zero_stage=3)}, "zero3"),
        ("FSDP", {"fsdp_plugin": types.SimpleNamespace(fsdp_version=2)}, "fsdp2"),
    ],
)
def test_engines_have_one_name_each(kind, plugin, name):
    assert engines.name_engine(describe_engine(kind, plugin)) == name


@pytest.mark.parametrize(
    ("kind", "plugin"), [("FSDP", {"fsdp_plugin": types.SimpleNamespace(fsdp_version=1)}), ("MEGATRON_LM", {})]
)
def test_other_engines_are_refused(kind, plugin):
    with pytest.raises(LayerselError, match=f"the engine {kind} is not supported. Use one process"):
        engines.name_engine(describe_engine(kind, plugin))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type Lamb keeps no Adam moments"),
        ({"offload_param": {"device": "nvme"}}, "offload_param.device nvme keeps weights on disk"),
        ({"offload_param": {"device": "cpu"}, "optimizer": {"type": "AdamW"}}, None),
    ],
)
def test_a_deepspeed_file_under_which_rank_cannot_move_is_refused(content, message):
    zero = {"stage": 3, **{key: value for key, value in content.items() if key == "offload_param"}}
    plugin = types.SimpleNamespace(zero_stage=3, deepspeed_config={**content, "zero_optimization": zero})
    trainer = describe_engine("DEEPSPEED", {"deepspeed_plugin": plugin})
    if message is None:
        engines.check_deepspeed_optimizer(trainer)
        return
    with pytest.raises(LayerselError, match=message):
        engines.check_deepspeed_optimizer(trainer)


def describe_engine(kind: str, plugins: dict):
    """Return what of a trainer its engine's name is read from."""
    state = types.SimpleNamespace(**plugins)
    accelerator = types.SimpleNamespace(distributed_type=types.SimpleNamespace(value=kind), state=state)
    return types.SimpleNamespace(accelerator=accelerator)


def test_tensors_that_are_where_they_belong_are_not_copied():
    tensor = torch.nn.Parameter(torch.arange(4.0))
    data = tensor.data_ptr()
    with engines.move([tensor], torch.device("cpu")):
        assert tensor.data_ptr() == data
    assert tensor.data_ptr() == data


def test_the_quantisation_state_follows_a_4_bit_weight():
    from bitsandbytes.nn import Params4bit

    weight = Params4bit(torch.randn(64, 64), requires_grad=False).to("cpu")
    assert weight.quant_state.absmax.device.type == "cpu"
    packed = weight.data.clone()
    engines.move_tensor(weight, packed)
    assert weight.data_ptr() == packed.data_ptr()
    assert isinstance(weight, Params4bit)
    assert weight.quant_state.absmax.device == packed.device


def test_one_process_decides_for_itself():
    assert engines.decide_on_rank_zero(lambda: 5) == 5
    values = {index: torch.tensor([index]) for index in (2, 0, 1)}
    assert engines.gather_on_rank_zero(values, [0]).tolist() == [[0], [1], [2]]
    engines.wait_for_everyone()
    with pytest.raises(LayerselError, match="no"):
        engines.decide_on_rank_zero(lambda: (_ for _ in ()).throw(LayerselError("no")))


def test_a_store_ends_its_waiting_with_an_error_of_its_own():
    assert callable(torch.distributed.distributed_c10d._get_default_store)
    with pytest.raises(torch.distributed.DistStoreError):
        torch.distributed.HashStore().wait(["never"], timedelta(seconds=0.1))
