"""The benchmark of gains: what ranks promise before training, and how promises are compared with losses."""

import argparse
import json

import pytest
from helpers.encoder_decoders import make_tokenizer
from helpers.models import make_small_llama

from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.training.prepare import prepare_trainer
from benchmarks import gain
from benchmarks.held_out.arms import ARMS, Arm
from benchmarks.held_out.rows import read_rows
from benchmarks.held_out.runs import append_lines
from benchmarks.held_out.training import Settings, make_model, make_trainer

SPECTRA = {"a": [4.0, 3.0, 1.0], "b": [2.0, 5.0, 1.0]}
LONGEST, HELD_OUT, TRAIN_ROWS = 32, 4, 130


def write_runs(path, *runs: tuple[str, int, int, float, float]) -> None:
    """Write a file of runs: arm, rank, seed, rate and loss, on rows for validation and test alike."""
    columns = ["arm", "rank", "seed", "rate", "validation", "test"]
    append_lines(path, columns, [dict(zip(columns, (*run, run[-1]))) for run in runs])


def test_the_gain_of_ranks_adds_up_falling_gains():
    assert gain.find_gain(SPECTRA, {"a": 2, "b": 1}) == 9.0
    assert gain.find_gain(SPECTRA, {"a": 1.5}) == 5.5
    # A gain above the one before it counts as that one, and no module has more than its gains.
    assert gain.find_gain(SPECTRA, {"b": 9}) == 5.0
    assert gain.find_gain(SPECTRA, {"a": 2, "b": 0}, power=2) == 25.0
    ratios = gain.find_ratios(SPECTRA, {"a": 2, "b": 0}, uniform=1, lora_r=1)
    assert ratios["chosen_over_uniform"] == 7 / 6 and ratios["double_over_single"] == 11 / 6
    assert ratios["chosen_over_uniform_squared"] == 25 / 20 and ratios["double_over_single_squared"] == 33 / 20


def test_only_arms_whose_budget_is_spent_before_training_are_measured():
    measured = {arm for arm in ARMS if gain.has_known_ranks(arm)}
    assert {"gradient", "fisher", "cka", "random", "last"} <= measured
    assert not measured & {"lora", "l1ra", "gradient l1ra", "eva", "cka same rank", "sensitivity"}


def test_the_gains_are_those_of_the_ranks_that_a_run_would_have(tmp_path):
    base, train, runs = tmp_path / "base", tmp_path / "rows.jsonl", tmp_path / "runs.csv"
    make_small_llama(layers=3).save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    rows = [{"question": f"{10 + i % 50} {11 + i % 7}", "answer": f"{20 + i % 50} 5 {30 + i % 9}"} for i in range(150)]
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arms = ["gradient", "last", "gradient group", "lora"]
    write_runs(runs, *((arm, rank, 5, 0.004, 2.0) for rank in (2, 4) for arm in arms))
    output = tmp_path / "gains.csv"
    arguments = argparse.Namespace(
        base=base,
        train=train,
        runs=runs,
        output=output,
        longest=LONGEST,
        held_out=HELD_OUT,
        train_rows=TRAIN_ROWS,
    )
    gain.measure(arguments)
    lines = gain.read_gains(output)
    assert [(line["rank"], line["arm"]) for line in lines] == [(rank, arm) for rank in (2, 4) for arm in arms[:3]]
    for rank in (2, 4):
        by_arm = {line["arm"]: line for line in lines if line["rank"] == rank}
        ratios = {arm: line["chosen_over_uniform"] for arm, line in by_arm.items()}
        # The ranks by the gains of modules gain the most, and groups of modules are between them and uniform rank.
        assert ratios["gradient"] > ratios["gradient group"] > 1 and ratios["gradient"] > ratios["last"]
        assert all(1 < line["double_over_single"] < 2 for line in by_arm.values())
    # A run with the same rows and seed has ranks of as many parameters.
    data = read_rows(train, make_tokenizer(), LONGEST)[HELD_OUT:][:TRAIN_ROWS]
    settings = Settings(base=base, is_encoder=False, steps=1, batch_size=4, evaluations=1)
    model = make_model(base, False, Arm("lora"), 4, data)
    trainer = make_trainer(settings, model, 5, 0.004, data, str(tmp_path / "run"))
    plan = prepare_trainer(trainer, LayerselConfig.model_validate(ARMS["gradient"]))
    assert plan.budget.spent == next(
        line["parameters"] for line in lines if (line["arm"], line["rank"]) == ("gradient", 4)
    )
    # A seed that was measured is not measured again.
    gain.measure(arguments)
    assert gain.read_gains(output) == lines


def make_line(arm: str, seed: int, chosen: float, double: float) -> dict:
    """Return a line of gains of rank 2."""
    ratios = dict(zip(gain.RATIOS, (chosen, chosen**2, double, double**2)))
    return {"runs": "small", "arm": arm, "rank": 2, "seed": seed, "parameters": 100, **ratios}


def test_a_promise_is_compared_with_the_losses_at_the_best_rates(tmp_path, capsys):
    lora = [("lora", 2, seed, rate, loss) for seed in range(3) for rate, loss in ((0.002, 2.5), (0.004, 2.0))]
    double = [("lora", 4, seed, 0.004, 1.6) for seed in range(3)]
    arms = [("gradient", 2, seed, 0.004, loss) for seed, loss in enumerate((1.9, 1.8, 2.1))]
    write_runs(tmp_path / "small.csv", *lora, *double, *arms, ("last", 2, 0, 0.004, 2.2))
    lines = [make_line("gradient", seed, 1.1 + seed / 10, 1.5) for seed in range(3)] + [make_line("last", 0, 0.8, 1.5)]
    changes, doubles = gain.join(lines, tmp_path)
    assert [line["change"] for line in changes] == pytest.approx([-0.05, -0.1, 0.05, 0.1])
    assert [line["change"] for line in doubles] == pytest.approx([-0.2] * 3)
    (averaged, *_) = gain.average(changes)
    assert averaged["seeds"] == 3 and averaged["chosen_over_uniform"] == pytest.approx(1.2)
    assert gain.describe("all", changes, gain.RATIOS[0])[2] == "3 of 4"
    append_lines(tmp_path / "gains.csv", gain.COLUMNS, lines)
    gain.report(argparse.Namespace(gains=[tmp_path / "gains.csv"], results=tmp_path))
    printed = capsys.readouterr().out
    (row,) = (line for line in printed.splitlines() if "all arms, by seed" in line and "squared" not in line)
    assert "3 of 4" in row
    (row,) = (line for line in printed.splitlines() if "lora at 2r, means" in line and "squared" not in line)
    assert "1 of 1" in row
