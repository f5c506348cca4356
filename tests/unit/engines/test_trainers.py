"""What trainers.py relies on beyond documented interfaces: each fails loudly when a library changes it.

The runs in test_runs.py assert the distributed halves of these facts on the engines themselves.
"""

import ast
import inspect
import json
import re
import textwrap
from importlib.metadata import version

import pytest
import torch
from helpers.models import make_lora, make_small_llama, make_trainer
from transformers import (
    DefaultFlowCallback,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer_callback import CallbackHandler, ExportableState

from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.config.selection import SelectionConfig
from axolotl_layersel.engines import trainers
from axolotl_layersel.training.prepare import prepare_trainer

COUNTER = "early_stopping_patience_counter"
# What Axolotl pins, and what else was looked at, see docs/compatibility.md.
SEEN = {
    "axolotl": ["0.19.0"],
    "transformers": ["5.16.1", "5.24.0"],
    "accelerate": ["1.13.0", "1.15.0"],
    "peft": ["0.20.0", "0.21.2"],
}


class Counting(TrainerCallback, ExportableState):
    """Counts the steps that it sees."""

    count = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.count += 1

    def state(self):
        return {"args": {}, "attributes": {"count": self.count}}


@pytest.mark.parametrize("library", SEEN)
def test_the_versions_are_those_that_were_looked_at(library):
    assert version(library) in SEEN[library], "read the lists at the head of trainers.py and in engines/ again"


def test_checkpoints_are_written_by_save_model_before_they_are_pushed():
    source = inspect.getsource(Trainer._save_checkpoint)
    assert source.index("self.save_model(output_dir, _internal_call=True)") < source.index("_push_from_checkpoint")
    assert list(inspect.signature(Trainer.save_model).parameters) == ["self", "output_dir", "_internal_call"]


@pytest.mark.parametrize("method", ["_load_from_checkpoint", "_load_best_model"])
def test_lora_weights_are_restored_by_the_models_own_load_adapter_alone(method):
    """Ragged adapters do not fit the modules in training: what restores them takes the place of this one call."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(getattr(Trainer, method))))
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    loads = [call for call in calls if call.endswith("load_adapter")]
    # One adapter, or those in subfolders; 5.24.0 loads an adapter beside them too.
    expected = [1] if method == "_load_best_model" else [2, 3]
    assert set(loads) == {"model.load_adapter"} and len(loads) in expected


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


def test_the_embeddings_hooks_are_found_by_their_name_however_many_there_are():
    model = make_lora(make_small_llama())
    embeddings = model.get_base_model().model.embed_tokens
    for _ in range(3):
        model.enable_input_require_grads()
    assert len(embeddings._forward_hooks) >= 3
    assert embeddings(torch.tensor([[3]])).requires_grad
    kept = embeddings.register_forward_hook(lambda *args: None)
    trainers.remove_embedding_hooks(model)
    assert list(embeddings._forward_hooks) == [kept.id], "a hook of somebody else's is gone, or one of theirs is left"
    assert not embeddings(torch.tensor([[3]])).requires_grad


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
    trainers.restore_callbacks(callbacks, TrainerState(stateful_callbacks={"EarlyStoppingCallback": entries}))
    assert [callback.early_stopping_patience_counter for callback in callbacks[1:]] == [3, 2]
    assert callbacks[1:] == [stopping, other] and stopping.early_stopping_patience == 5
    trainers.restore_callbacks(callbacks[:2], TrainerState(stateful_callbacks={"EarlyStoppingCallback": entries[2]}))
    assert stopping.early_stopping_patience_counter == 1


@pytest.mark.trains
def test_a_callback_that_the_checkpoint_does_not_know_is_saved_with_the_next_one(tmp_path):
    make_trainer(make_lora(make_small_llama()), tmp_path, save_strategy="steps", save_steps=2).train()
    again = make_trainer(make_lora(make_small_llama()), tmp_path, save_strategy="steps", save_steps=4)
    again.add_callback(Counting())
    prepare_trainer(again, LayerselConfig(selection=SelectionConfig(method="first", ratio=1)))
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
    assert "_is_accelerate_prepared = True" in inspect.getsource(Accelerator.prepare)
    counts = {name for name in AxolotlTrainingArguments.__dataclass_fields__ if name.startswith("jagged_")}
    assert counts == set(trainers.STEP_COUNTS)


def test_the_trainers_state_is_written_last_with_what_no_callback_has_put_there(tmp_path):
    source = inspect.getsource(Trainer._save_checkpoint)
    assert (
        source.index("self.save_model(") < source.index("self.state.save_to_json(") < source.index("rotate_checkpoints")
    )
    trainer = make_trainer(make_lora(make_small_llama(2)), tmp_path)
    trainer.state = TrainerState(global_step=1, max_steps=2, train_batch_size=4)
    trainers.note_in_state(trainer, "first")
    trainers.note_in_state(trainer, "second")
    trainer.state.save_to_json(str(tmp_path / "state.json"))
    state = json.loads((tmp_path / "state.json").read_text())
    assert trainers.find_note(state) == "second" and trainers.find_state_fault(state) is None
    trainer.state = TrainerState.load_from_json(str(tmp_path / "state.json"))
    trainer.args.restore_callback_states_from_checkpoint = True
    trainer._load_callback_state()
    assert trainers.find_note(vars(trainer.state)) == "second"


def test_the_fields_of_the_trainers_state_are_those_whose_types_are_known():
    assert set(trainers.STATE_TYPES) == set(TrainerState.__dataclass_fields__)


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"global_step": True}, "its global_step is True"),
        ({"global_step": 2.0}, "its global_step is 2.0"),
        ({"max_steps": "x"}, "its max_steps is 'x'"),
        ({"max_steps": 0}, "its max_steps is 0"),
        ({"train_batch_size": None}, "its train_batch_size is None"),
        ({"train_batch_size": -4}, "its train_batch_size is -4"),
        ({"epoch": "1"}, "its epoch is '1'"),
        ({"total_flos": [1]}, "its total_flos is [1]"),
        ({"log_history": 5}, "its log_history is 5"),
        ({"log_history": [[1]]}, "its log_history contains something other than mappings"),
        ({"best_metric": "low"}, "its best_metric is 'low'"),
        ({"best_global_step": 1.5}, "its best_global_step is 1.5"),
        ({"best_model_checkpoint": 6}, "its best_model_checkpoint is 6"),
        ({"is_world_process_zero": 1}, "its is_world_process_zero is 1"),
        ({"stateful_callbacks": []}, "its stateful_callbacks is []"),
        ({"stateful_callbacks": {"Mine": 5}}, "its Mine in stateful_callbacks is not a callback's state"),
        (
            {"stateful_callbacks": {"TrainerControl": {"args": {"should_save": "x"}, "attributes": {}}}},
            "its TrainerControl in stateful_callbacks contains something other than true and false",
        ),
        (
            {"stateful_callbacks": {"EarlyStoppingCallback": {"args": {}, "attributes": {COUNTER: "3"}}}},
            "its early_stopping_patience_counter is '3'",
        ),
        ({"epoch": 1, "eval_steps": None, "save_steps": 0.5, "stateful_callbacks": None, "log_history": None}, None),
    ],
)
def test_a_trainers_state_of_other_types_is_named_by_the_field(values, fault):
    state = {**vars(TrainerState(global_step=1, max_steps=2, train_batch_size=4)), **values}
    assert trainers.find_state_fault(state) == fault


def test_a_gate_step_prepares_and_weighs_its_rows_as_the_trainer_does():
    from axolotl.core.trainers.mixins import ActivationOffloadingMixin

    assert "inputs = self._prepare_inputs(inputs)" in inspect.getsource(Trainer.training_step)
    assert "with self.activation_offload_context:" in inspect.getsource(ActivationOffloadingMixin.training_step)


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


def test_processes_that_load_data_are_initialised_in_both_ways(tmp_path):
    trainer = make_trainer(make_small_llama(layers=1), tmp_path, dataloader_num_workers=1)
    calls = tmp_path / "calls"
    trainers.initialize_loaders(trainer, lambda worker: calls.write_text(f"{worker} {torch.initial_seed()}"))
    loader = trainer.get_train_dataloader()
    assert loader.base_dataloader.worker_init_fn.args[1].func.__name__ == "seed_worker", "the Trainer's own"
    next(iter(loader))
    assert calls.read_text().split()[0] == "0"


def test_trainers_that_generate_are_known_by_what_they_do_so_with():
    from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer
    from axolotl.core.trainers.grpo.trainer import AxolotlGRPOTrainer
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    for kind in (GRPOTrainer, RLOOTrainer, AxolotlGRPOTrainer):
        assert "_generate_and_score_completions" in dir(kind)
    assert "_generate_and_score_completions" not in dir(AxolotlDPOTrainer)
    for arguments in (GRPOConfig, RLOOConfig):
        assert "use_vllm" in arguments.__dataclass_fields__


def test_trl_sets_up_checkpointing_again_by_the_models_own_function():
    from trl.models.utils import disable_gradient_checkpointing

    assert "model.gradient_checkpointing_enable(" in inspect.getsource(disable_gradient_checkpointing)
