"""The YAML files of cells, and the figures in their folders."""

import pytest
import yaml
from helpers.compared import FILE, make_figures, make_settings

from axolotl_layersel.cli.compare import cells
from axolotl_layersel.cli.compare.cells import Cell
from axolotl_layersel.cli.compare.figures import FAILURE, FIGURES, Failure, Figures, write_record
from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.textual import MEASURING, PLUGIN, check_text

CELL = Cell("lora", 2e-4, 42, 100)
OTHER = "some.other.Plugin"


def test_a_cell_differs_from_the_file_in_its_own_keys_only():
    config = cells.make_config(FILE, CELL, make_settings())
    changed = {key for key, _, _ in cells.list_differences(FILE, config)}
    keys = {"plugins", "dataset_prepared_path", "max_steps", "seed", "eval_strategy", "save_strategy", "output_dir"}
    assert changed == {*keys, "val_set_size", "layersel_measure"}
    assert (config["max_steps"], config["seed"], config["learning_rate"]) == (100, 42, 2e-4)
    assert config["plugins"] == [MEASURING]
    assert config["output_dir"] == "out/compare/lora/0.0002/42/model"
    assert config["layersel_measure"] == {"arm": "lora", "data_seed": 42, "held_out_trains": True}


def test_a_shorter_cell_has_a_folder_of_its_own():
    folder = cells.find_folder(Cell("lora@32", 8e-4, 43, 50), make_settings())
    assert str(folder) == "out/compare/lora@32/0.0008/43-50-steps"


def test_the_plugin_is_listed_by_the_arms_that_need_it():
    data = {**FILE, "plugins": [OTHER, PLUGIN], "layersel": {"l1ra": {}}}
    settings = make_settings(["lora", "cka"], data)
    plain = cells.make_config(data, CELL, settings)
    assert plain["plugins"] == [OTHER, MEASURING]
    assert "layersel" not in plain
    chosen = cells.make_config(data, Cell("cka", 2e-4, 42, 100), settings)
    assert chosen["plugins"] == [OTHER, PLUGIN, MEASURING]
    assert chosen["layersel"]["selection"]["method"] == "cka"
    assert cells.make_config(FILE, Cell("cka", 2e-4, 42, 100), settings)["plugins"] == [PLUGIN, MEASURING]
    for config in (plain, chosen):
        check_text(config, with_folder=False)


def test_trackers_checkpoints_and_evaluations_are_off():
    sent = {"wandb_project": "x", "use_mlflow": True, "hub_model_id": "me/x", "trackio_project_name": "x"}
    kept = {"save_steps": 5, "eval_steps": 5, "early_stopping_patience": 3, "auto_resume_from_checkpoints": True}
    config = cells.make_config({**FILE, **sent, **kept}, CELL, make_settings())
    assert not {*sent, *kept} & set(config)


def test_the_warmup_and_the_length_of_the_file_go_to_the_measuring_plugin():
    data = {**FILE, "warmup_steps": 10, "max_steps": 1000, "val_set_size": 0.2, "seed": 7, "sample_packing": True}
    config = cells.make_config(data, CELL, make_settings(general="general.txt"))
    measure = {"arm": "lora", "general": "general.txt", "data_seed": 7, "max_steps": 1000, "warmup_steps": 10.0}
    assert config["layersel_measure"] == measure
    assert "warmup_steps" not in config
    assert config["val_set_size"] == 0.2
    assert config["eval_sample_packing"] is False


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, "10% of the training rows, because the file sets neither"),
        ({"val_set_size": 0.05}, "0.05 of the training rows, as"),
        ({"val_set_size": 200}, "200 training rows, as"),
        ({"test_datasets": [{"path": "x"}]}, "`test_datasets` of the file"),
    ],
)
def test_the_source_of_the_held_out_rows_is_named(keys, words):
    assert cells.describe_held_out({**FILE, **keys}).startswith(words)
    config = cells.make_config({**FILE, **keys}, CELL, make_settings())
    assert bool(config.get("val_set_size")) == ("test_datasets" not in keys)


def make_written(tmp_path):
    """Return a cell's configuration as written, and the settings of its comparison."""
    settings = make_settings(folder=str(tmp_path / "compare"))
    config = cells.make_config(FILE, CELL, settings)
    folder = cells.find_folder(CELL, settings)
    cells.write_config(config, CELL, folder / cells.CONFIG)
    return config, settings, folder


def test_figures_are_those_of_the_file_next_to_them(tmp_path):
    config, settings, folder = make_written(tmp_path)
    assert yaml.safe_load((folder / cells.CONFIG).read_text()) == config
    assert cells.read_result(CELL, config, settings) is None
    write_record(make_figures(CELL, 1.5, cells.find_digest(config)), folder / FIGURES)
    found = cells.read_result(CELL, config, settings)
    assert isinstance(found, Figures) and found.validation_loss == 1.5
    write_record(make_figures(CELL, 1.5, "of another file"), folder / FIGURES)
    with pytest.raises(LayerselError, match="are those of another file than"):
        cells.read_result(CELL, config, settings)


def test_a_failure_is_a_result(tmp_path):
    config, settings, folder = make_written(tmp_path)
    digest = cells.find_digest(config)
    failure = Failure(arm="lora", rate=2e-4, seed=42, steps=100, config_digest=digest, sentence="No.", log="log.txt")
    write_record(failure, folder / FAILURE)
    assert cells.read_result(CELL, config, settings) == failure


def test_a_comparison_with_other_settings_is_refused_with_the_key(tmp_path):
    _, settings, _ = make_written(tmp_path)
    changed = cells.make_config({**FILE, "sequence_len": 512}, CELL, settings)
    with pytest.raises(LayerselError) as caught:
        cells.read_result(CELL, changed, settings)
    assert str(caught.value) == (
        f"compare: the comparison in {tmp_path / 'compare'} was made with other settings (sequence_len: None, now "
        "512). Choose another --output-dir, or delete it."
    )


def test_damaged_figures_are_refused(tmp_path):
    config, settings, folder = make_written(tmp_path)
    (folder / FIGURES).write_text('{"schema_version": 1, "arm": "lora"}')
    with pytest.raises(LayerselError, match=r"figures.json is damaged \(rate: Field required\)"):
        cells.read_result(CELL, config, settings)
    (folder / FIGURES).write_text('{"schema_version": 2}')
    with pytest.raises(LayerselError, match="has schema_version 2, and this version of axolotl-layersel reads 1"):
        cells.read_result(CELL, config, settings)


def test_the_best_file_is_the_users_with_the_arm_and_the_rate():
    data = {**FILE, "plugins": [OTHER], "wandb_project": "x", "save_steps": 5}
    arms = make_settings(["lora", "cka", "lora@32"], data).arms
    assert cells.make_best(data, arms["lora"], 4e-4) == {**data, "learning_rate": 4e-4}
    best = cells.make_best(data, arms["cka"], 1e-4)
    assert best["plugins"] == [OTHER, PLUGIN]
    assert best["layersel"] == {"selection": {"method": "cka", "rank_allocation": "match"}}
    assert cells.make_best(data, arms["lora@32"], 4e-4)["lora_alpha"] == 64


def test_metrics_are_listed_without_the_loss_and_the_speed():
    values = {
        "eval_loss": 1.0,
        "eval_runtime": 2.0,
        "eval_samples_per_second": 3.0,
        "epoch": 1,
        "memory/max_active (GiB)": 4.0,
    }
    assert cells.list_metrics({**values, "eval_accuracy": 0.5}) == {"accuracy": 0.5}
