"""Where the host waits for the device: nowhere in a step that moves no rank, but where plain LoRA does."""

import contextlib
from collections import Counter

import pytest
import torch
from helpers.models import make_lora, make_small_llama, make_trainer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from axolotl_layersel import L1RAConfig, LayerselConfig, LayerselError, SelectionConfig, prepare_trainer
from axolotl_layersel.l1ra.callback import RankCallback

pytestmark = pytest.mark.trains

# Operations whose results the host reads, and methods of tensors that read without one.
OPERATIONS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "_unique2")
METHODS = ("tolist", "cpu", "numpy", "__array__")
QUIET_STEPS = (1, 2)


class Waits(TorchDispatchMode):
    """Counts what a GPU's host would wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").partition(".")[0]
        if name in OPERATIONS:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


class CountByStep(TrainerCallback):
    """Keeps what was counted in each step, from its begin to that of the next one."""

    def __init__(self, waits: Waits) -> None:
        self.waits = waits
        self.by_step: dict[int, Counter[str]] = {}

    def on_step_begin(self, args, state, control, **_):
        self.waits.counts = self.by_step.setdefault(state.global_step + 1, Counter())


@contextlib.contextmanager
def counting(monkeypatch):
    waits = Waits()

    def count(name: str, original):
        def method(*args, **kwargs):
            waits.counts[name] += 1
            return original(*args, **kwargs)

        return method

    with monkeypatch.context() as patch, waits:
        for name in METHODS:
            patch.setattr(torch.Tensor, name, count(name, getattr(torch.Tensor, name)))
        yield waits


def count_waits(folder, monkeypatch, config: LayerselConfig | None, layers: list[int] | None = None):
    """Return what is counted in each of some steps of two micro-batches, of which the third moves rank."""
    model = make_lora(make_small_llama(4), layers_to_transform=layers)
    arguments = {"max_steps": 10, "gradient_accumulation_steps": 2, "logging_strategy": "no", "save_strategy": "no"}
    trainer = make_trainer(model, folder, disable_tqdm=True, **arguments)
    if config is not None:
        prepare_trainer(trainer, config)
    with counting(monkeypatch) as waits:
        callback = CountByStep(waits)
        trainer.add_callback(callback)
        trainer.train()
    return callback.by_step


@pytest.mark.parametrize("rule", ["saliency", "pressure"])
def test_gates_make_the_host_wait_no_more_than_plain_lora_does(tmp_path, monkeypatch, rule):
    plain = count_waits(tmp_path / "plain", monkeypatch, None)
    moved = count_waits(
        tmp_path / "moved",
        monkeypatch,
        LayerselConfig(l1ra=L1RAConfig(rule=rule, update_ratio=0.3, last_update_ratio=1.0)),
    )
    assert sum(plain[1].values()) > 0, "the trainer looks at its loss"
    for step in QUIET_STEPS:
        assert moved[step] == plain[step]
    assert sum(moved[3].values()) > sum(plain[3].values()), "an update is seen"


def test_a_shorter_backward_pass_makes_the_host_wait_no_more_than_plain_lora_does(tmp_path, monkeypatch):
    plain = count_waits(tmp_path / "plain", monkeypatch, None, [2, 3])
    selection = SelectionConfig(method="last", ratio=0.5)
    cut = count_waits(tmp_path / "cut", monkeypatch, LayerselConfig(selection=selection))
    assert [cut[step] for step in QUIET_STEPS] == [plain[step] for step in QUIET_STEPS]


def test_no_checkpoint_is_written_from_a_gate_that_is_no_number(tmp_path):
    """SIGTERM asks for a checkpoint when the callbacks that look at gates have been called."""
    trainer = make_trainer(make_lora(make_small_llama(2)), tmp_path, max_steps=10)
    prepare_trainer(trainer, LayerselConfig(l1ra=L1RAConfig()))
    (ranks,) = (each.ranks for each in trainer.callback_handler.callbacks if isinstance(each, RankCallback))
    ranks.components.exp_avg_sq[3] = torch.nan
    with pytest.raises(LayerselError, match=r"model\.layers\.0\.self_attn\.q_proj is NaN or infinite"):
        trainer.save_adapter(tmp_path / "checkpoint-1")
    assert not (tmp_path / "checkpoint-1").exists()
