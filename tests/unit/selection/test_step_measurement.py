"""The measurement of what the cut of the backward pass saves."""

import pytest
import torch
from helpers.models import make_lora, make_rows, make_small_llama, make_trainer
from helpers.settings import CHECKPOINTING, checkpoint_layers
from transformers import TrainerCallback

from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.config.selection import SelectionConfig
from axolotl_layersel.selection.step_measurement import MEASURED, StepMeasurement, counts, expect_peak, is_cut
from axolotl_layersel.training.prepare import prepare_trainer

BLOCK = LayerselConfig(selection=SelectionConfig(method="gradient", num_samples=16, time=0.75))


@pytest.mark.parametrize(("settling", "each"), [(0, 6), (2, 4)])
def test_as_many_steps_count_with_the_cut_as_without(settling, each):
    counted = [is_cut(step, settling) for step in MEASURED if counts(step, settling)]
    assert counted.count(True) == counted.count(False) == each


def test_steps_that_settle_follow_each_change():
    cut = [is_cut(step, 2) for step in MEASURED]
    assert cut == [True] * 6 + [False] * 6
    assert [step for step in MEASURED if not counts(step, 2)] == [9, 10, 15, 16]


def test_a_step_without_the_cut_holds_the_activations_of_all_layers():
    assert expect_peak(held=10, peak=16, share=0.25) == 10 + 4 * 6


class Watch(TrainerCallback):
    """Notes at which steps the lowest layer has a graph, and how often it runs."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self.graphs: list[bool] = []
        self.runs: list[int] = []
        layer.self_attn.q_proj.register_forward_hook(self.note)

    def note(self, module, args, output):
        if self.runs:
            self.graphs[-1] |= output.requires_grad
            self.runs[-1] += 1

    def on_step_begin(self, args, state, control, **kwargs):
        self.graphs.append(False)
        self.runs.append(0)


def train(folder, measured: bool, steps: int = 24, resume_from: str | None = None, **arguments):
    """Train with dropout and accumulation, and return the trainer and what happened in the lowest layer."""
    model = make_lora(make_small_llama(6, attention_dropout=0.1), lora_dropout=0.1)
    model.enable_input_require_grads()  # Axolotl always does
    values = {
        "max_steps": steps,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    trainer = make_trainer(model, folder, make_rows(24), **{**values, "save_strategy": "no", **arguments})
    plan = prepare_trainer(trainer, BLOCK, resume_from)
    assert plan.backward_end > 0
    if not measured:
        trainer.remove_callback(StepMeasurement)
    watch = Watch(model.get_base_model().model.layers[0])
    trainer.add_callback(watch)
    trainer.train(resume_from_checkpoint=resume_from)
    return trainer, watch


def list_losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def count_hooks(trainer) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in trainer.model.modules())


@pytest.mark.trains
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_a_measured_run_is_bit_for_bit_the_run_without_measurement(tmp_path, caplog, checkpointing):
    with caplog.at_level("INFO", "axolotl.layersel"):
        plain, never = train(tmp_path / "plain", measured=False, **checkpoint_layers(checkpointing))
        assert "without the cut" not in caplog.text
        trainer, watch = train(tmp_path / "measured", measured=True, **checkpoint_layers(checkpointing))
    assert caplog.text.count("of its time without the cut, measured in steps 9 to 20 (formula: 0.") == 1
    assert list_losses(trainer) == list_losses(plain) and len(list_losses(trainer)) == 24
    pairs = zip(trainer.model.named_parameters(), plain.model.named_parameters(), strict=True)
    assert all(torch.equal(one, two) for (_, one), (_, two) in pairs)
    opened = [10, 12, 14, 16, 18, 20]
    assert [step for step, graph in enumerate(watch.graphs, start=1) if graph] == opened
    assert not any(never.graphs)
    twice = 2 if checkpointing == "none" else 4  # with checkpointing the two micro-batches are computed again
    assert watch.runs == [twice if step in opened else 2 for step in range(1, 25)]
    assert count_hooks(trainer) == count_hooks(plain), "nothing of the measurement is left"
    assert "gradient_checkpointing_enable" not in vars(trainer.model.get_base_model())


@pytest.mark.trains
def test_a_run_of_fewer_steps_is_not_measured(tmp_path, caplog):
    with caplog.at_level("INFO", "axolotl.layersel"):
        _, watch = train(tmp_path, measured=True, steps=19)
    assert "without the cut" not in caplog.text and not any(watch.graphs)


@pytest.mark.trains
def test_a_resumed_run_is_measured_in_its_own_first_steps(tmp_path, caplog):
    saving = {"save_strategy": "steps", "save_steps": 8}
    train(tmp_path, measured=True, steps=8, **saving)
    with caplog.at_level("INFO", "axolotl.layersel"):
        _, watch = train(tmp_path, measured=True, steps=30, resume_from=str(tmp_path / "checkpoint-8"), **saving)
    assert "measured in steps 9 to 20" in caplog.text
    assert [step for step, graph in enumerate(watch.graphs, start=1) if graph] == [10, 12, 14, 16, 18, 20]


class Stopping(TrainerCallback):
    """Ends a run at a step in which the pass is open."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 12


@pytest.mark.trains
def test_a_run_that_ends_while_it_is_measured_leaves_nothing_behind(tmp_path, caplog):
    model = make_lora(make_small_llama(6))
    trainer = make_trainer(model, tmp_path, make_rows(24), max_steps=24, save_strategy="no")
    prepare_trainer(trainer, BLOCK)
    before = count_hooks(trainer)
    trainer.add_callback(Stopping())
    with caplog.at_level("INFO", "axolotl.layersel"):
        trainer.train()
    assert trainer.state.global_step == 12 and "without the cut" not in caplog.text
    assert count_hooks(trainer) == before


class Failing(TrainerCallback):
    """Fails once, in a step in which the pass is open."""

    failed = False

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 12 and not self.failed:
            self.failed = True
            raise RuntimeError("out of memory")


@pytest.mark.trains
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_training_again_after_a_failure_cuts_the_pass_again(tmp_path, checkpointing):
    model = make_lora(make_small_llama(6))
    model.enable_input_require_grads()
    arguments = {"max_steps": 24, "save_strategy": "no", **checkpoint_layers(checkpointing)}
    trainer = make_trainer(model, tmp_path, make_rows(24), **arguments)
    prepare_trainer(trainer, BLOCK)
    trainer.add_callback(Failing())
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    watch = Watch(model.get_base_model().model.layers[0])
    trainer.add_callback(watch)
    trainer.train()
    assert [step for step, graph in enumerate(watch.graphs, start=1) if graph] == [10, 12, 14, 16, 18, 20]
    twice = 1 if checkpointing == "none" else 2  # with checkpointing the layer is computed again
    assert watch.runs == [twice if graph else 1 for graph in watch.graphs]
    assert count_hooks(trainer) == 1, "only the hook of the test is left"
    assert "gradient_checkpointing_enable" not in vars(model.get_base_model())
