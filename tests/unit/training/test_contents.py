"""What belongs together in a checkpoint, by real checkpoints of plain Trainers: mixtures are named, and passed over."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.models import make_lora, make_small_llama, make_trainer
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.training.checkpoints import find_resumed_checkpoint
from axolotl_layersel.training.contents import find_mixture, list_recorded, read_record, record_path
from axolotl_layersel.training.prepare import prepare_trainer

pytestmark = pytest.mark.trains

SELECTION = {"method": "explicit", "layers": [0, 2]}
L1RA = {"rule": "pressure", "budget_unit": "rank", "update_ratio": 0.25, "l1_lambda": 0.9}
BLOCKS = {
    "selection": LayerselConfig.model_validate({"selection": SELECTION}),
    "l1ra": LayerselConfig.model_validate({"l1ra": L1RA}),
    "both": LayerselConfig.model_validate({"selection": SELECTION, "l1ra": L1RA}),
}
STATE, ADAPTER, CONFIG = "trainer_state.json", "adapter_model.safetensors", "adapter_config.json"
OWN = {"selection": ["plan.json"], "l1ra": ["ranks.csv", "state.safetensors"]}
OWN["both"] = OWN["selection"] + OWN["l1ra"]


def prepare(block: LayerselConfig, folder: Path, resume_from: Path | None = None, lora=(), **arguments):
    """Return a trainer of 8 steps that saves after 2, 4, 6 and 8, prepared by a block."""
    model = make_lora(make_small_llama(3), **dict(lora))
    values = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 9}
    trainer = make_trainer(model, folder, **{**values, **arguments})
    prepare_trainer(trainer, block, resume_from and str(resume_from))
    return trainer


@pytest.fixture(scope="module", params=BLOCKS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def whole(kind, tmp_path_factory) -> Path:
    """A run that was not killed."""
    folder = tmp_path_factory.mktemp(kind)
    prepare(BLOCKS[kind], folder).train()
    return folder


@pytest.fixture(scope="module")
def other(kind, tmp_path_factory) -> Path:
    """The same run with another seed."""
    folder = tmp_path_factory.mktemp(f"{kind}-other")
    prepare(BLOCKS[kind], folder, seed=4).train()
    return folder


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """A copy of a run with checkpoints 4 and 6."""
    for step in (4, 6):
        shutil.copytree(whole / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    return tmp_path


def find(kind: str, folder: Path, explicit: Path | None = None) -> str | None:
    return find_resumed_checkpoint(BLOCKS[kind], folder, explicit and str(explicit), automatic=True)


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}, indent=2, sort_keys=True) + "\n")


def scale(path: Path) -> None:
    """Let an adapter of the same shapes, without a digest of its own, take the place of one."""
    save_file({name: tensor * 1.5 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


def copy_folder(source: Path, target: Path) -> None:
    shutil.rmtree(target)
    shutil.copytree(source, target)


# What is done to checkpoint-6 of a run, with the same checkpoint of another run at hand; and what is said.
MIXTURES: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "global_step 7": (
        lambda six, other: edit_json(six / STATE, global_step=7),
        "trainer_state.json says step 7, and layersel/checkpoint.json says step 6",
    ),
    "global_step 10^9": (
        lambda six, other: edit_json(six / STATE, global_step=10**9),
        "trainer_state.json says step 1000000000, and layersel/checkpoint.json says step 6",
    ),
    "layersel/ of another step": (
        lambda six, other: copy_folder(six.with_name("checkpoint-4") / "layersel", six / "layersel"),
        "trainer_state.json says step 6, and layersel/checkpoint.json says step 4",
    ),
    "layersel/ of another run": (
        lambda six, other: copy_folder(other / "layersel", six / "layersel"),
        "trainer_state.json was not written with this layersel/checkpoint.json: one of them is of another run",
    ),
    "adapter of another run": (
        lambda six, other: shutil.copy(other / ADAPTER, six / ADAPTER),
        "adapter_model.safetensors is not the one that the checkpoint was written with",
    ),
    "adapter without a digest": (
        lambda six, other: scale(six / ADAPTER),
        "adapter_model.safetensors is not the one that the checkpoint was written with",
    ),
    "adapter of another step": (
        lambda six, other: shutil.copy(six.with_name("checkpoint-4") / ADAPTER, six / ADAPTER),
        "adapter_model.safetensors is not the one that the checkpoint was written with",
    ),
    "another alpha": (
        lambda six, other: edit_json(six / CONFIG, lora_alpha=64),
        "adapter_config.json is not the one that the checkpoint was written with",
    ),
    "trainer_state.json of another run": (
        lambda six, other: shutil.copy(other / STATE, six / STATE),
        "trainer_state.json was not written with this layersel/checkpoint.json",
    ),
    "trainer_state.json of stock": (
        lambda six, other: edit_json(six / STATE, stateful_callbacks={}),
        "trainer_state.json was not written with this layersel/checkpoint.json",
    ),
    "a record that was edited": (
        lambda six, other: edit_json(record_path(six), lora={}),
        "trainer_state.json was not written with this layersel/checkpoint.json",
    ),
    "everything of another step": (
        lambda six, other: copy_folder(six.with_name("checkpoint-4"), six),
        "the name of the folder says step 6, and layersel/checkpoint.json says step 4",
    ),
}


@pytest.mark.parametrize("case", MIXTURES)
def test_a_mixture_is_named_and_passed_over_for_the_checkpoint_before(kind, run, other, caplog, case):
    mix, said = MIXTURES[case]
    assert find(kind, run) == str(run / "checkpoint-6")
    mix(run / "checkpoint-6", other / "checkpoint-6")
    with caplog.at_level(logging.WARNING, "axolotl.layersel"):
        assert find(kind, run) == str(run / "checkpoint-4")
    (message,) = [record.getMessage() for record in caplog.records]
    start = f"layersel: {run / 'checkpoint-6'} is not of one step of one run and is not resumed from: {said}"
    assert message.startswith(start)
    with pytest.raises(LayerselError, match="cannot be resumed from: ") as error:
        find(kind, run, run / "checkpoint-6")
    assert said in str(error.value) and str(error.value).isprintable()
    shutil.rmtree(run / "checkpoint-4")
    with pytest.raises(LayerselError, match="has no complete checkpoint, and checkpoint-6 would be lost: ") as error:
        find(kind, run)
    assert said in str(error.value)


def test_each_file_of_another_step_is_named(kind, run):
    for name in OWN[kind]:
        path, before = run / "checkpoint-6" / "layersel" / name, run / "checkpoint-4" / "layersel" / name
        content = path.read_bytes()
        if before.read_bytes() == content:
            assert name == "plan.json", "the plan is the same all the time"
            edit_json(path, seconds=99.0)
        else:
            shutil.copy(before, path)
        with pytest.raises(LayerselError, match=rf"layersel/{name} (is not the one|says step 4, and layersel/checkp)"):
            find(kind, run, run / "checkpoint-6")
        path.write_bytes(content)
    assert find(kind, run) == str(run / "checkpoint-6")


def test_a_record_names_all_of_a_checkpoint_that_this_package_writes(kind, whole):
    for step in (2, 4, 6, 8):
        checkpoint = whole / f"checkpoint-{step}"
        record = read_record(checkpoint)
        assert record.step == step and find_mixture(checkpoint) is None
        own = {f"layersel/{path.name}" for path in (checkpoint / "layersel").iterdir()}
        assert set(record.files) == (own | {ADAPTER, CONFIG}) - {"layersel/checkpoint.json"}
        assert set(record.files) <= set(list_recorded())
    assert not record_path(whole).exists(), "the adapter at the end belongs to no checkpoint"


def test_a_renamed_checkpoint_is_resumed_from_by_its_name(kind, run, whole):
    best = run / "my-best"
    (run / "checkpoint-6").rename(best)
    assert find(kind, run, best) == str(best)
    wrong = run / "checkpoint-12"
    shutil.copytree(best, wrong)
    with pytest.raises(LayerselError, match=r"the name of the folder says step 12, and layersel/checkp"):
        find(kind, run, wrong)
    resumed = prepare(BLOCKS[kind], run / "resumed", best)
    resumed.train(resume_from_checkpoint=str(best))
    for name in (ADAPTER, CONFIG, *(f"layersel/{name}" for name in (*OWN[kind], "checkpoint.json"))):
        again, before = (folder / "checkpoint-8" / name for folder in (run / "resumed", whole))
        assert again.read_bytes() == before.read_bytes(), f"{name} is another one after resuming"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "layersel/checkpoint.json is truncated or damaged"),
        ("[]", "layersel/checkpoint.json is truncated or damaged"),
        ('{"schema_version": 9}', "it has schema_version 9, and this axolotl-layersel reads 1"),
        (None, "layersel/checkpoint.json is missing, which says what belongs together: it was lost, or an earlier"),
    ],
)
def test_a_checkpoint_without_a_record_is_incomplete(kind, run, caplog, content, said):
    path = record_path(run / "checkpoint-6")
    path.unlink() if content is None else path.write_text(content)
    with caplog.at_level(logging.WARNING, "axolotl.layersel"):
        assert find(kind, run) == str(run / "checkpoint-4")
    (message,) = [record.getMessage() for record in caplog.records]
    assert "checkpoint-6 is incomplete and is not resumed from: " in message and said in message


def test_a_checkpoint_of_stock_training_is_what_it_was(kind, run):
    shutil.rmtree(run / "checkpoint-4")
    shutil.rmtree(run / "checkpoint-6" / "layersel")
    with pytest.raises(LayerselError, match="so it is not of a run with this `layersel` block"):
        find(kind, run)


# --- Killed while a checkpoint is written -------------------------------------------------------------------------


class Killed(Exception):
    """Ends a run between two writes, as a kill would."""


def test_a_run_killed_before_any_file_of_a_checkpoint_ends_as_if_it_had_not_been(kind, whole, tmp_path, monkeypatch):
    """The writes of checkpoint-6 end one file earlier each time, over a checkpoint-6 of another seed."""
    from transformers import Trainer, TrainerState

    from axolotl_layersel.lora.writer import AdapterWriter
    from axolotl_layersel.training import saving

    places = {
        "adapter": (AdapterWriter, "save"),
        "record": (saving, "write_record"),
        "optimizer": (Trainer, "_save_optimizer_and_scheduler"),
        "random state": (Trainer, "_save_rng_state"),
        "trainer state": (TrainerState, "save_to_json"),
    }
    prepare(BLOCKS[kind], tmp_path / "old", seed=4).train()
    for place, (owner, name) in places.items():
        folder = tmp_path / place
        shutil.copytree(whole / "checkpoint-4", folder / "checkpoint-4")
        shutil.copytree(tmp_path / "old" / "checkpoint-6", folder / "checkpoint-6")
        trainer = prepare(BLOCKS[kind], folder, folder / "checkpoint-4")
        with monkeypatch.context() as patch:

            def die(*args, **options):
                raise Killed

            patch.setattr(owner, name, die)
            with pytest.raises(Killed):
                trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
        found = find(kind, folder)
        # Before its first file is replaced the older checkpoint is whole, and of its own run.
        if place == "adapter":
            assert found == str(folder / "checkpoint-6")
            assert (Path(found) / ADAPTER).read_bytes() == (tmp_path / "old" / "checkpoint-6" / ADAPTER).read_bytes()
            continue
        assert found == str(folder / "checkpoint-4"), f"a mixture is resumed from after a kill before the {place}"
        again = prepare(BLOCKS[kind], folder, Path(found))
        again.train(resume_from_checkpoint=found)
        for path in (ADAPTER, "layersel/checkpoint.json"):
            assert (folder / "checkpoint-8" / path).read_bytes() == (whole / "checkpoint-8" / path).read_bytes()


# --- The best model -----------------------------------------------------------------------------------------------


class Spoil(TrainerCallback):
    """Changes the best checkpoint before it is loaded at the end."""

    def __init__(self, spoil: Callable[[Path], object]) -> None:
        self.spoil = spoil

    def on_save(self, args, state, control, **_):
        if state.global_step == args.max_steps:
            self.spoil(Path(state.best_model_checkpoint))


@pytest.mark.parametrize("spoilt", [False, True])
def test_the_best_model_is_of_one_piece_when_it_is_loaded(kind, tmp_path, spoilt):
    best = {"eval_steps": 2, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = prepare(BLOCKS[kind], tmp_path, **best)
    trainer.args.eval_strategy, trainer.args.load_best_model_at_end = IntervalStrategy("steps"), True
    trainer.eval_dataset = trainer.train_dataset
    if not spoilt:
        trainer.train()
        assert trainer.state.best_global_step < 8, "the best one must not be the last"
        return
    trainer.add_callback(Spoil(lambda folder: edit_json(folder / CONFIG, lora_alpha=64)))
    with pytest.raises(
        LayerselError, match=r"^load_best_model_at_end: .*checkpoint-[24] cannot be loaded: adapter_config"
    ):
        trainer.train()


# --- Another run than the checkpoint's ----------------------------------------------------------------------------


def test_a_trainer_that_resumes_elsewhere_than_it_was_prepared_for_is_refused(kind, run):
    trainer = prepare(BLOCKS[kind], run / "resumed", run / "checkpoint-6")
    with pytest.raises(LayerselError, match=r"begins at step 4, and was prepared to resume from .*-6, which"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    trainer = prepare(BLOCKS[kind], run / "anew", run / "checkpoint-6")
    with pytest.raises(LayerselError, match="the trainer begins at step 0, and was prepared to resume from"):
        trainer.train()


def test_a_checkpoint_folder_of_an_earlier_run_keeps_nothing_that_this_run_does_not_write(kind, whole, tmp_path):
    shutil.copytree(whole / "checkpoint-2", tmp_path / "checkpoint-2")
    for name in OWN["both"]:
        (tmp_path / "checkpoint-2" / "layersel" / name).touch()
    prepare(BLOCKS[kind], tmp_path).train()
    assert {path.name for path in (tmp_path / "checkpoint-2" / "layersel").iterdir()} == {*OWN[kind], "checkpoint.json"}
    assert find(kind, tmp_path, tmp_path / "checkpoint-2") == str(tmp_path / "checkpoint-2")


LORA = {
    "lora_r": ({"r": 8}, "lora_r: 8 contradicts the checkpoint .*, which was made with lora_r: 4"),
    "lora_alpha": (
        {"lora_alpha": 32},
        "lora_alpha: 32 contradicts the checkpoint .*, which was made with lora_alpha: 8",
    ),
    "both": (
        {"r": 8, "lora_alpha": 16},
        "lora_r: 8 and lora_alpha: 16 contradict the checkpoint .*, which was made with lora_r: 4 and lora_alpha: 8",
    ),
    "rsLoRA": ({"use_rslora": True}, "peft_use_rslora: True contradicts the checkpoint"),
    "fewer targets": ({"targets": ("q_proj", "v_proj")}, r"lora_target_modules: \['q_proj', 'v_proj'\] contradicts"),
    "another target": (
        {"targets": ("q_proj", "v_proj", "down_proj", "o_proj")},
        "which was made with lora_target_modules: .*'down_proj', 'q_proj', 'v_proj'",
    ),
    "added modules_to_save": (
        {"modules_to_save": ["lm_head"]},
        r"lora_modules_to_save: \['lm_head'\] contradicts .*made with lora_modules_to_save: None",
    ),
    "ranks by module": ({"rank_pattern": {"q_proj": 2}}, r"lora_rank_pattern: \{'q_proj': 2\} contradicts"),
    "another initialisation": ({"init_lora_weights": "gaussian"}, "peft_init_lora_weights: 'gaussian' contradicts"),
}


@pytest.mark.parametrize("case", LORA)
def test_another_lora_than_the_checkpoints_is_refused_before_anything_is_drawn(kind, run, case):
    lora, said = LORA[case]
    with pytest.raises(LayerselError, match=said):
        prepare(BLOCKS[kind], run / "resumed", run / "checkpoint-6", lora=lora)
    assert not (run / "resumed" / "layersel").exists()


def test_dropped_modules_to_save_are_refused(tmp_path):
    lora = {"modules_to_save": ["lm_head"]}
    prepare(BLOCKS["selection"], tmp_path, lora=lora, max_steps=2).train()
    checkpoint = tmp_path / "checkpoint-2"
    with pytest.raises(LayerselError, match=r"^lora_modules_to_save: None contradicts .*: \['lm_head'\]\. Restore"):
        prepare(BLOCKS["selection"], tmp_path / "resumed", checkpoint)
    prepare(BLOCKS["selection"], tmp_path / "same", checkpoint, lora=lora)


def test_other_dropout_and_another_order_of_names_are_no_other_lora(kind, run):
    lora = {"targets": ("down_proj", "v_proj", "q_proj"), "lora_dropout": 0.25}
    prepare(BLOCKS[kind], run / "resumed", run / "checkpoint-6", lora=lora)


@pytest.mark.parametrize("path", ["elsewhere/Base-1B", "org/Other-1B"])
def test_the_base_model_may_have_moved_but_is_no_other_one(tmp_path, path):
    def make(base: str, folder: Path, resume_from=None):
        model = make_small_llama(3)
        model.name_or_path = base
        trainer = make_trainer(make_lora(model), folder, max_steps=4, save_strategy="steps", save_steps=2)
        prepare_trainer(trainer, BLOCKS["l1ra"], resume_from)
        return trainer

    make("org/Base-1B", tmp_path).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    if path.endswith("Base-1B"):
        make(path, tmp_path / "resumed", checkpoint)
        return
    with pytest.raises(LayerselError, match=r"^base_model: 'org/Other-1B' contradicts the checkpoint"):
        make(path, tmp_path / "resumed", checkpoint)
