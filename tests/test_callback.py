"""What a run needs while it trains, with a plain Trainer."""

import hashlib
from pathlib import Path

import pytest
from conftest import make_lora, make_small_llama, make_trainer
from typer.testing import CliRunner

from axolotl_layersel.args import L1RAArgs, LayerselBlock, SelectionArgs
from axolotl_layersel.cli import app
from axolotl_layersel.errors import LayerselError
from axolotl_layersel.prepare import prepare_trainer

BLOCKS = {
    "selection": LayerselBlock(selection=SelectionArgs(method="first", num_layers=3)),
    "l1ra": LayerselBlock(l1ra=L1RAArgs(update_ratio=0.2)),
}


def train(block: LayerselBlock, folder: Path, resume_from: str | None = None, **arguments):
    """Train for 10 steps, an epoch being 6, at a learning rate that does not end at 0, and save at the end."""
    values = {"max_steps": 10, "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 5}
    trainer = make_trainer(make_lora(make_small_llama()), folder, **{**values, **arguments})
    prepare_trainer(trainer, block, resume_from)
    trainer.train(resume_from_checkpoint=resume_from)
    trainer.save_model(str(folder))
    return trainer


def read_files(folder: Path) -> dict[str, str]:
    """Return a digest of every file below ``folder``."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("block", BLOCKS)
def test_a_run_that_has_ended_leaves_its_files_as_they_are_when_it_is_started_again(tmp_path, block):
    train(BLOCKS[block], tmp_path)
    ended = read_files(tmp_path)
    again = train(BLOCKS[block], tmp_path, str(tmp_path / "checkpoint-10"))
    assert again.state.global_step == 10
    assert read_files(tmp_path) == ended
    assert len(ended) > 20


def test_a_run_that_has_ended_goes_on_where_it_is_given_more_steps(tmp_path):
    train(BLOCKS["selection"], tmp_path)
    again = train(BLOCKS["selection"], tmp_path, str(tmp_path / "checkpoint-10"), max_steps=12)
    assert again.state.global_step == 12
    assert (tmp_path / "checkpoint-12").exists()


def show(folder: Path) -> str:
    result = CliRunner().invoke(app, ["show", str(folder)])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_run_shows_nothing_of_an_earlier_one_in_its_folder(tmp_path):
    train(BLOCKS["l1ra"], tmp_path)
    assert "ranks after l1ra" in show(tmp_path)
    train(BLOCKS["selection"], tmp_path)
    assert "ranks after l1ra" not in show(tmp_path) and "method first" in show(tmp_path)
    given = SelectionArgs(method="first", plan=str(tmp_path / "layersel" / "plan.json"))
    train(LayerselBlock(selection=given), tmp_path)
    assert "method first" in show(tmp_path), "the plan that it was given lies where its own does"
    (tmp_path / "layersel" / "gates.csv").write_text("of a search")
    train(BLOCKS["l1ra"], tmp_path)
    assert sorted(path.name for path in (tmp_path / "layersel").iterdir()) == ["ranks.csv"]
    assert "method first" not in show(tmp_path)


def test_a_run_that_does_not_come_to_train_leaves_an_earlier_ones_files(tmp_path):
    train(BLOCKS["l1ra"], tmp_path)
    before = read_files(tmp_path)
    with pytest.raises(LayerselError, match="out of range"):
        train(LayerselBlock(selection=SelectionArgs(method="explicit", layers=[99])), tmp_path)
    assert read_files(tmp_path) == before
