"""What engines.py relies on beyond documented interfaces: each fails loudly when a library changes it.

The distributed halves of these facts are asserted by the runs in test_runs.py on the engines themselves.
"""

import ast
import inspect
import textwrap
import types
from importlib.metadata import version

import pytest
import torch
from conftest import make_lora, make_small_llama
from transformers import Trainer

from axolotl_layersel import engines
from axolotl_layersel.errors import LayerselError

SEEN = {"axolotl": "0.19.0", "transformers": "5.16.1", "accelerate": "1.13.0", "peft": "0.20.0"}


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
