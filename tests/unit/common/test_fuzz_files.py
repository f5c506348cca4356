"""Hundreds of damaged files through the real readers: one message each, or the result of the undamaged file."""

import functools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.corruptions import JUNK, edit_csv, fuzz, is_one_line, kept, list_places
from helpers.models import make_lora, make_small_llama, make_trainer
from hypothesis import strategies as st
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import EarlyStoppingCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import compare_trainer_and_checkpoint_args
from typer.testing import CliRunner

from axolotl_layersel.cli.main import app
from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.paths import gates_path
from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.engines.trainers import is_evaluation_due, note_in_state, restore_callbacks
from axolotl_layersel.l1ra.callback import RankCallback
from axolotl_layersel.lora.export import export_adapter
from axolotl_layersel.selection.gate_history import GateHistory
from axolotl_layersel.selection.reuse import find_plan
from axolotl_layersel.training.checkpoints import find_resumed_checkpoint
from axolotl_layersel.training.contents import read_record, record_path, write_record
from axolotl_layersel.training.prepare import check_resumed, prepare_trainer

pytestmark = pytest.mark.trains

SELECTION = {"method": "explicit", "layers": [0, 2], "unselected": "remove"}
BLOCKS = {
    "ranks": {"selection": SELECTION, "l1ra": {"rule": "pressure", "update_ratio": 0.2, "l1_lambda": 0.9}},
    "layers": {"selection": SELECTION},
}
TOKENS = torch.arange(24).reshape(2, 12)


def prepare(kind: str, folder: Path, resume_from: Path | None = None):
    """Return a trainer that saves every three steps, prepared by the block of this ``kind``."""
    trainer = make_trainer(make_lora(make_small_llama(3)), folder, max_steps=6, save_strategy="steps", save_steps=3)
    prepare_trainer(trainer, LayerselConfig.model_validate(BLOCKS[kind]), resume_from and str(resume_from))
    return trainer


@pytest.fixture(scope="module", params=BLOCKS)
def run(request, tmp_path_factory) -> tuple[str, Path]:
    """A run that has ended, with two checkpoints."""
    folder = tmp_path_factory.mktemp(request.param)
    prepare(request.param, folder).train()
    return request.param, folder


def resume(kind: str, checkpoint: Path, scratch: Path) -> dict[str, object]:
    """Return all that a run would resume with, by the checks and readers that it goes through."""
    block = LayerselConfig.model_validate(BLOCKS[kind])
    # What Axolotl has checked before the model loads.
    find_resumed_checkpoint(block, checkpoint.parent, str(checkpoint), automatic=False)
    check_resumed(block, str(checkpoint))
    find_plan(block.selection, str(checkpoint))
    trainer = prepare(kind, scratch, checkpoint)
    trainer.model.load_adapter(str(checkpoint), "default", is_trainable=True)
    state = {name: (p.requires_grad, p.detach().clone()) for name, p in trainer.model.named_parameters()}
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, RankCallback):
            callback.ranks.restore(checkpoint)
            state |= {name: (None, tensor.clone()) for name, tensor in callback.ranks.components.list_tensors().items()}
            state |= {"pool": callback.ranks.components.pool, "history": callback.ranks.history}
    return state


def is_same(one: object, other: object) -> bool:
    if isinstance(one, tuple):
        return one[0] == other[0] and torch.equal(one[1], other[1])
    return one == other


# --- Damage -------------------------------------------------------------------------------------------------------


def damage(data: st.DataObject, path: Path, edit: Callable[[st.DataObject, Path], bytes]) -> None:
    """Damage the file ``path`` in one way or another; ``edit`` returns content with a fault of its kind of file."""
    content = path.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    kind = data.draw(st.sampled_from(["flip", "byte", "cut", "empty", "gone", "folder", "insert", *["edit"] * 7]))
    if kind in ("gone", "folder"):
        path.unlink()
        if kind == "folder":
            path.mkdir()
        return
    changed = {
        "flip": lambda: content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :],
        "byte": lambda: content[:place] + data.draw(st.binary(min_size=1, max_size=1)) + content[place + 1 :],
        "cut": lambda: content[:place],
        "empty": lambda: b"",
        "insert": lambda: content[:place] + data.draw(st.binary(min_size=1, max_size=9)) + content[place:],
        "edit": lambda: edit(data, path),
    }[kind]()
    path.write_bytes(changed)


def edit_json(data: st.DataObject, path: Path) -> bytes:
    """Return the file with a value replaced, left out or there twice, or nested beyond all measure."""
    content = json.loads(path.read_text())
    places = list(list_places(content))
    holder, key = places[data.draw(st.integers(0, len(places) - 1))]
    way = data.draw(st.sampled_from(["replace", "replace", "remove", "nest", "twice", "rename", "nan"]))
    mark = "@mark@"
    if way == "remove":
        del holder[key]
    elif way == "rename" and isinstance(holder, dict):
        holder[f"{key}_"] = holder.pop(key)
    elif way == "twice" and isinstance(holder, dict):
        text = json.dumps({**content, mark: 0}) if holder is content else json.dumps(content)
        return text.replace(f'"{mark}": 0', f"{json.dumps(key)}: {json.dumps(holder[key])}").encode()
    else:
        holder[key] = data.draw(st.sampled_from(JUNK)) if way == "replace" else mark
    deep = "[" * 20_000 + "]" * 20_000
    return json.dumps(content).replace(f'"{mark}"', deep if way == "nest" else "NaN").encode()


def edit_tensors(data: st.DataObject, path: Path) -> bytes:
    """Return the file with a tensor of another shape, type or value, missing, or one too many."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name]
    way = data.draw(st.sampled_from(["one", "row", "type", "value", "nan", "gone", "extra", "metadata"]))
    if way == "one":
        tensors[name] = tensor.flatten()[:1].clone()
    elif way == "row":
        tensors[name] = tensor[:1].clone()
    elif way == "type":
        tensors[name] = tensor.to(data.draw(st.sampled_from([torch.float64, torch.float16, torch.int32, torch.uint8])))
    elif way == "value":
        tensors[name] = (tensor.double() * data.draw(st.sampled_from([-1, 3, 1e30])) + 0.25).to(tensor.dtype)
    elif way == "nan" and tensor.is_floating_point():
        tensors[name] = torch.full_like(tensor, float("nan"))
    elif way == "extra":
        tensors[f"{name}_"] = tensor.clone()
    elif way == "metadata":
        key = data.draw(st.sampled_from(sorted(metadata)))
        metadata[key] = data.draw(st.sampled_from(["", "-1", "9" * 40, "[]", "{}", "x"]))
    else:
        del tensors[name]
    other = path.with_name("edited.safetensors")
    save_file(tensors, other, metadata=metadata)
    content = other.read_bytes()
    other.unlink()
    return content


# --- Resuming -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(run) -> Callable[[], dict[str, object]]:
    kind, folder = run
    return functools.cache(lambda: resume(kind, folder / "checkpoint-3", folder / "scratch"))


FILES = {
    "layersel/plan.json": edit_json,
    "layersel/ranks.csv": edit_csv,
    "layersel/state.safetensors": edit_tensors,
    "adapter_model.safetensors": edit_tensors,
}


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_refused_or_resumes_the_same(run, reference, name):
    kind, folder = run
    checkpoint = folder / "checkpoint-3"
    if not (checkpoint / name).exists():
        assert kind == "layers", "a run without l1ra has no ranks"
        return
    expected = reference()

    @fuzz(60)
    def check(data):
        with kept(checkpoint / name), kept(record_path(checkpoint)), kept(checkpoint / TRAINER_STATE_NAME):
            damage(data, checkpoint / name, FILES[name])
            # In most examples what is damaged goes with its digest, so that what reads it must find the fault.
            if data.draw(st.integers(0, 3)):
                renew_record(checkpoint)
            try:
                state = resume(kind, checkpoint, folder / "scratch")
            except LayerselError as error:
                assert is_one_line(str(error))
                return
        assert state.keys() == expected.keys()
        assert all(is_same(value, expected[key]) for key, value in state.items())

    check()


def renew_record(checkpoint: Path) -> None:
    """Let the record of a checkpoint, and the Trainer's own state, say that its files belong together."""
    record = read_record(checkpoint)
    note = write_record(checkpoint, record.step, record.lora, record.given)
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    note_in_state(SimpleNamespace(state=state), note)
    state.save_to_json(str(checkpoint / TRAINER_STATE_NAME))


def test_a_damaged_state_of_the_trainer_is_refused_or_loads(run):
    kind, folder = run
    block = LayerselConfig.model_validate(BLOCKS[kind])
    checkpoint = folder / "checkpoint-3"
    trainer = make_trainer(make_small_llama(2), folder / "scratch")

    @fuzz(60)
    def check(data):
        with kept(checkpoint / TRAINER_STATE_NAME):
            damage(data, checkpoint / TRAINER_STATE_NAME, edit_json)
            try:
                find_resumed_checkpoint(block, folder, str(checkpoint), automatic=False)
            except LayerselError as error:
                assert is_one_line(str(error))
                return
            # What the Trainer and this package do with it at once.
            trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            compare_trainer_and_checkpoint_args(trainer.args, trainer.state)
            restore_callbacks([EarlyStoppingCallback()], trainer.state)
            assert is_evaluation_due(trainer) in (False, True)
            assert trainer.state.global_step == 3 <= trainer.state.max_steps + trainer.state.epoch

    check()


# --- Commands -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "edit"), [("plan.json", edit_json), ("ranks.csv", edit_csv)])
def test_show_prints_a_damaged_file_or_one_line(run, name, edit):
    _, folder = run
    path = folder / "layersel" / name
    if not path.exists():
        assert name == "ranks.csv"
        return

    @fuzz(50)
    def check(data):
        with kept(path):
            damage(data, path, edit)
            result = CliRunner().invoke(app, ["show", str(folder)])
        assert result.exit_code in (0, 1), result.output
        assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
        assert not {"\x1b", "\x07", "\r"} & set(result.output)
        if result.exit_code:
            assert is_one_line(result.output.splitlines()[-1])
            assert result.output.splitlines()[-1].startswith("axolotl-layersel: ")

    check()


def test_a_damaged_course_of_a_search_is_refused_or_read_as_numbers(tmp_path):
    history = GateHistory(["0", "2"])
    history.add(1.5, None, [0.0, 0.0])
    history.add(1.25, 2.5, [0.01, -0.02])
    history.write(tmp_path)

    @fuzz(50)
    def check(data):
        with kept(gates_path(tmp_path)):
            damage(data, gates_path(tmp_path), edit_csv)
            try:
                read = GateHistory.read(tmp_path)
            except LayerselError as error:
                assert is_one_line(str(error))
                return
        assert len(read.train_losses) == len(read.validation_losses) == len(read.gates)
        assert all(len(gates) == len(read.names) and all(map(math.isfinite, gates)) for gates in read.gates)

    check()


def compute(adapter: Path) -> torch.Tensor:
    """Return the logits that stock PEFT computes with an adapter."""
    model = PeftModel.from_pretrained(make_small_llama(3), str(adapter)).eval()
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize(
    ("name", "edit"), [("adapter_config.json", edit_json), ("adapter_model.safetensors", edit_tensors)]
)
def test_an_export_of_a_damaged_adapter_computes_what_that_does_or_is_refused(run, tmp_path, name, edit):
    _, folder = run
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(folder / "checkpoint-6" / file, adapter / file)
    expected = compute(adapter)

    @fuzz(60)
    def check(data):
        with kept(adapter / name):
            damage(data, adapter / name, edit)
            try:
                export_adapter(adapter, "uniform", tmp_path / "exported")
            except LayerselError as error:
                assert is_one_line(str(error))
                return
            try:
                read = compute(adapter)
            except Exception:  # what PEFT itself cannot read, an export need not make readable
                read = None
        if read is not None:
            torch.testing.assert_close(compute(tmp_path / "exported"), read, rtol=0, atol=1e-5)
        if name != "adapter_config.json":
            torch.testing.assert_close(compute(tmp_path / "exported"), expected, rtol=0, atol=1e-5)

    check()
