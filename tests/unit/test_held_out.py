"""The benchmark of held-out loss: arms by name, rates, its file of runs, and its tables."""

import argparse
import json
import math
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers.encoder_decoders import make_tokenizer
from helpers.models import make_rows, make_small_llama
from helpers.places import ROOT

from axolotl_layersel.config.root import LayerselConfig
from benchmarks import quality
from benchmarks.general_text import LENGTH, collect_python, find_prose
from benchmarks.held_out.arms import ARMS, HALF_RANK, Arm, find_stored, parse_arm, strip_draw
from benchmarks.held_out.rates import choose_rate, choose_rates, find_neighbours, find_next_rate, is_at_edge
from benchmarks.held_out.rows import draw_rows, read_text
from benchmarks.held_out.runs import COLUMNS, KEY, add_half_ranks, append_run, check_appendable, is_done, read_runs
from benchmarks.held_out.sensitivity import find_ranks, measure_sensitivity
from benchmarks.held_out.tables import (
    average_draws,
    choose_runs,
    describe_regime,
    describe_regimes,
    draw_regime,
    draw_regimes,
    print_table,
)
from benchmarks.held_out.training import Data, Settings, list_steps, make_model, run_arm

REGIME = {
    "base": "small",
    "task": "sums",
    "rows": 100,
    "epochs": 10,
    "steps": 130,
    "batch_size": 8,
    "longest": 256,
    "held_out": 64,
    "test_rows": 200,
}
PLANTED = {
    "accuracy": 0.5,
    "test_best": 1.9,
    "step_best": 39,
    "training": 1.0,
    "forgetting": 0.5,
    "parameters": 1000,
    "seconds_choosing": 1.5,
    "seconds_training": 60.0,
    "general": '{"english": [3.0, 3.5]}',
    "curve": "[[39, 20.0, 1.9], [130, 60.0, 2.0]]",
    "package": "1.0 abc",
    "chosen": '{"a, b": 1}',
}


def make_run(arm: str = "lora", rank: int = 16, seed: int = 0, rate: float = 0.004, loss: float = 2.0, **changes):
    """Return a run whose validation and test loss are ``loss``."""
    place = {"arm": arm, "rank": rank, "seed": seed, "rate": rate}
    return {**REGIME, **place, "validation": loss, "test": loss, **PLANTED, **changes}


# --- Arms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_of_the_table_is_found_by_its_name(name):
    assert parse_arm(name) == Arm(name)


def test_words_after_the_name_change_an_arm():
    assert parse_arm("gradient p0.5") == Arm("gradient", power=0.5)
    assert parse_arm("gradient l1ra p0 loraplus16") == Arm("gradient l1ra", power=0.0, ratio=16.0)
    assert parse_arm("random same rank draw2") == Arm("random same rank", draw=2)
    assert parse_arm("gradient p0.5 time0.75") == Arm("gradient", power=0.5, time=0.75)


@pytest.mark.parametrize(
    "name, why",
    [
        ("gradients", "'gradients' is not known"),
        ("gradient p0.5 p1", "p is written twice"),
        ("lora p1", "p has no effect"),
        ("eva p1", "p has no effect"),
        ("cka same rank p1", "p has no effect"),
        ("cka draw2", "a random choice"),
        ("random draw1", "a random choice"),
        ("lora loraplus0.5", "at least 1"),
        ("lora time0.5", "a step of `gradient`"),
        ("gradient time1.5", "a share of plain LoRA's"),
    ],
)
def test_an_arm_that_means_nothing_is_refused(name, why):
    with pytest.raises(ValueError, match=why):
        parse_arm(name)


def test_a_block_scores_no_more_rows_than_there_are_and_draws_by_the_seed():
    assert parse_arm("gradient").make_block(2000, seed=3)["selection"]["num_samples"] == 128
    assert parse_arm("gradient").make_block(100, seed=3)["selection"]["num_samples"] == 100
    assert "seed" not in parse_arm("random").make_block(100, seed=3)["selection"]
    assert parse_arm("random draw2").make_block(100, seed=3)["selection"]["seed"] == 1003
    assert parse_arm("eva").make_block(100, seed=3) is None
    assert "scaling_exponent" not in parse_arm("gradient").make_block(100, seed=3)
    for name in ("gradient p0.5", "l1ra p0.5", "gradient l1ra p0.5"):
        assert LayerselConfig.model_validate(parse_arm(name).make_block(100, seed=3)).scaling_exponent == 0.5
    assert ARMS["gradient"]["selection"]["num_samples"] == 128


def test_half_of_the_rank_is_stored_as_plain_lora():
    assert find_stored(HALF_RANK, 16) == ("lora", 8) and find_stored("gradient", 16) == ("gradient", 16)
    with pytest.raises(ValueError, match="rank 1 has no half"):
        find_stored(HALF_RANK, 1)
    assert strip_draw("random same rank draw2") == "random same rank"


# --- Rates --------------------------------------------------------------------------------------------------------


def search(loss, grid, widenings, refines=False):
    """Return the rates that are tried, in order, where a rate ends with ``loss`` of it."""
    losses = {}
    while (rate := find_next_rate(losses, grid, widenings, refines)) is not None:
        losses[rate] = loss(rate)
    return list(losses)


@pytest.mark.parametrize("best, tried", [(2, [4, 8, 2, 1]), (4, [4, 8, 2]), (8, [4, 8, 16]), (64, [4, 8, 16, 32, 64])])
def test_a_grid_widens_while_its_best_rate_is_at_its_edge(best, tried):
    assert search(lambda rate: abs(math.log(rate / best)), [4.0, 8.0], 3) == tried


def test_a_grid_does_not_widen_unasked_nor_after_a_run_that_diverged():
    assert search(lambda rate: -rate, [4.0, 8.0], 0) == [4, 8]
    assert search(lambda rate: math.nan if rate > 4 else 1.0, [4.0, 8.0], 1) == [4, 8, 2]
    assert search(lambda rate: math.nan, [4.0, 8.0], 2) == [4, 8, 2, 1]


@pytest.mark.parametrize(
    "best, widenings, tried",
    [
        (4, 1, [4, 8, 2, 2.83, 5.66]),
        (5.6, 1, [4, 8, 2, 2.83, 5.66]),  # 4 is the best of 2, 4 and 8, until 5.66 is tried
        (16, 2, [4, 8, 16, 32, 11.3, 22.6]),
        (16, 1, [4, 8, 16, 11.3]),
    ],
)
def test_rates_between_the_best_one_and_its_neighbours_come_last(best, widenings, tried):
    assert search(lambda rate: abs(math.log(rate / best)), [4.0, 8.0], widenings, refines=True) == tried
    assert search(lambda rate: abs(math.log(rate / 4)), [3.0, 4.0, 5.0], 0, refines=True) == [3, 4, 5]


def test_a_rate_is_chosen_over_the_seeds_that_all_rates_have():
    assert choose_rate({1: {0: 2.0, 1: 0.1}, 2: {0: 1.0}, 4: {0: 3.0}}) == 2
    # Where its neighbour was run with all of its seeds, the mean over them decides.
    assert choose_rate({1: {0: 2.0, 1: 0.1}, 2: {0: 1.0, 1: 2.0}, 4: {0: 3.0}}) == 1
    assert choose_rate({1: {0: math.nan}, 2: {0: 5.0}}) == 2
    # No seed was run with all of them: seed 0 tried the most.
    assert choose_rate({1: {0: 2.0}, 2: {0: 1.0}, 4: {1: 0.1}}) == 2


def test_the_edge_and_the_neighbours_of_a_rate():
    assert is_at_edge(1, [1, 2, 4]) and is_at_edge(4, [1, 2, 4]) and not is_at_edge(2, [1, 2, 4])
    assert is_at_edge(1, [1])
    assert find_neighbours(2, [4, 1, 2]) == [1, 2, 4] and find_neighbours(4, [4, 1, 2]) == [2, 4]


# --- Runs ---------------------------------------------------------------------------------------------------------


def test_a_run_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "runs.csv"
    runs = [make_run(), make_run(epochs=None, forgetting=None, seed=1)]
    for run in runs:
        append_run(path, run)
    assert read_runs(path) == runs and read_runs(tmp_path / "none.csv") == []
    assert is_done({name: runs[1][name] for name in KEY}, read_runs(path))
    assert not is_done({name: runs[0][name] for name in KEY} | {"rows": 300}, read_runs(path))


def test_a_line_that_a_killed_process_left_is_not_read_and_makes_room(tmp_path):
    path = tmp_path / "runs.csv"
    append_run(path, make_run())
    whole = path.read_bytes()
    append_run(path, make_run(seed=1))
    path.write_bytes(path.read_bytes()[:-7])
    assert read_runs(path) == [make_run()]
    append_run(path, make_run(seed=2))
    assert read_runs(path) == [make_run(), make_run(seed=2)] and path.read_bytes().startswith(whole)


def test_writers_at_the_same_time_lose_nothing(tmp_path):
    path = tmp_path / "runs.csv"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: append_run(path, make_run(seed=seed)), range(100)))
    assert sorted(run["seed"] for run in read_runs(path)) == list(range(100))


def test_a_file_with_other_columns_is_not_appended_to(tmp_path):
    check_appendable(tmp_path / "new.csv")
    append_run(tmp_path / "runs.csv", make_run())
    check_appendable(tmp_path / "runs.csv")
    with pytest.raises(ValueError, match="other columns"):
        check_appendable(ROOT / "benchmarks" / "results" / "smollm2-gsm8k.csv")


# Files of other benchmarks have no hyphen in their name, which is BASE-TASK here.
@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*-*.csv")), ids=lambda path: path.stem)
def test_the_committed_runs_are_read_and_have_a_best_rate(path, capsys):
    runs = read_runs(path)
    assert set(choose_rates(runs)) == {(run["arm"], run["rank"]) for run in runs}
    assert {run["arm"] for run in runs} <= set(ARMS)
    print_table(runs, "lora", None)
    assert "less lora's" in capsys.readouterr().out


# --- Which runs are made ------------------------------------------------------------------------------------------


def list_made(arguments, loss) -> list[tuple]:
    """Return the runs that the command line makes, where a rate and a seed end with ``loss`` of them."""
    quality.check_arguments(quality.make_parser(), arguments)
    made = []
    for key in quality.list_runs(arguments):
        append_run(arguments.output, make_run(**key, loss=loss(key["rate"], key["seed"])))
        made.append((key["arm"], key["rank"], key["seed"], key["rate"]))
    return made


def parse(tmp_path, *words: str):
    command = ["train", "base", "sums.jsonl", "test.jsonl", str(tmp_path / "runs.csv"), *words]
    return quality.make_parser().parse_args(command)


def test_the_first_seed_finds_the_rate_and_the_others_take_it(tmp_path):
    words = ["--arms", "lora", "--ranks", "4", "--seeds", "0", "1", "--rates", "4", "8", "--widen", "4", "--seeds-at"]
    best, neighbours = parse(tmp_path, *words, "best"), parse(tmp_path, *words, "neighbours")
    loss = lambda rate, seed: abs(math.log(rate / 16)) + seed  # noqa: E731
    tried = [("lora", 4, 0, rate) for rate in (4, 8, 16, 32)]
    assert list_made(best, loss) == [*tried, ("lora", 4, 1, 16)]
    assert list_made(best, loss) == []
    assert list_made(neighbours, loss) == [("lora", 4, 1, 8), ("lora", 4, 1, 32)]
    everything = parse(tmp_path, *words, "all")
    assert list_made(everything, loss) == [("lora", 4, 1, 4)]


def test_runs_of_other_rows_and_epochs_are_others_and_half_of_a_rank_is_run_once(tmp_path):
    words = ["--arms", "lora", HALF_RANK, "--ranks", "4", "8", "--seeds", "0", "--rates", "4", "--epochs", "1", "3"]
    made = list_made(parse(tmp_path, *words, "--rows", "100", "300"), lambda rate, seed: 1.0)
    assert made == 4 * [("lora", 4, 0, 4), ("lora", 2, 0, 4), ("lora", 8, 0, 4)]
    runs = read_runs(tmp_path / "runs.csv")
    lengths = {(100, 1): 13, (100, 3): 39, (300, 1): 38, (300, 3): 114}
    assert {(run["rows"], run["epochs"]): run["steps"] for run in runs} == lengths


def test_the_rates_of_loraplus_start_lower(tmp_path):
    words = ["--ranks", "4", "--seeds", "0", "--rates", "8", "--arms", "lora loraplus4", "lora loraplus16"]
    assert [run[-1] for run in list_made(parse(tmp_path, *words), lambda rate, seed: 1.0)] == [4, 2]


@pytest.mark.parametrize(
    "words, why",
    [
        (["--arms", HALF_RANK, "--ranks", "1"], "1 has no half"),
        (["--general", "english.txt"], "no loss on texts"),
        (["--arms", "gradients"], "'gradients' is not known"),
    ],
)
def test_a_command_line_that_contradicts_itself_is_refused(words, why, tmp_path, capsys):
    parser, command = quality.make_parser(), ["train", "base", "rows.tsv", "test.tsv", str(tmp_path / "runs.csv")]
    with pytest.raises(SystemExit):
        quality.check_arguments(parser, parser.parse_args([*command, *words]))
    assert why in capsys.readouterr().err


def test_the_campaign_asks_for_what_the_benchmark_knows(tmp_path):
    """Its script runs with a program in place of Python that notes its arguments."""
    noted, program = tmp_path / "noted", tmp_path / "note"
    program.write_text(f"#!/usr/bin/env bash\nprintf '%s\\t' \"$@\" >> {noted}\necho >> {noted}\n")
    program.chmod(0o755)
    script = ROOT / "benchmarks" / "campaign.sh"
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(program)}
    files = ("base", "rows.jsonl", "test.jsonl", str(tmp_path / "runs.csv"))
    subprocess.run([script, *files], env=environment, check=True)
    commands = [line.split("\t")[:-1] for line in noted.read_text().splitlines()]
    scripts = {Path(command[0]) for command in commands}
    assert scripts == {ROOT / "benchmarks" / name for name in ("quality.py", "general_text.py")}
    parser = quality.make_parser()
    for words in {tuple(words) for called, *words in commands if called.endswith("quality.py")}:
        arguments = parser.parse_args(words)
        quality.check_arguments(parser, arguments)
        assert (str(arguments.base), str(arguments.output)) == (files[0], files[3])


# --- Tables -------------------------------------------------------------------------------------------------------


def read_tables(lines: list[str]) -> list[list[dict[str, str]]]:
    """Return the tables of Markdown as rows by title."""
    tables, rows = [], []
    for line in [*lines, ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
        elif rows:
            tables.append([dict(zip(rows[0], row)) for row in rows[2:]])
            rows = []
    return tables


def plant() -> list[dict]:
    """Return runs of three seeds: LoRA, which differs by seed; an arm 0.1 below it; and two draws 0.1 and 0.3 above."""
    runs = []
    for seed in range(3):
        level = 2.0 + seed / 10
        runs += [make_run(seed=seed, rate=rate, loss=level + gap) for rate, gap in ((2, 0.5), (4, 0.0), (8, 0.5))]
        arms = {"cka same rank": -0.1 - seed / 1000, "random same rank": 0.1, "random same rank draw2": 0.3}
        runs += [make_run(arm, seed=seed, rate=4, loss=level + gap, forgetting=0.25) for arm, gap in arms.items()]
    return runs


def test_tables_of_a_regime_show_means_and_paired_differences(capsys):
    shown, *_ = read_tables(lines := describe_regime(plant(), ["lora", HALF_RANK, "random same rank"]))
    by_arm = {row["arm"]: row for row in shown}
    assert lines[0] == "## small, sums: 100 rows, 10 epochs of 8 rows cut at 256 tokens, r 16"
    assert list(by_arm) == ["cka same rank", "lora", "random same rank", "random same rank draw2"]
    assert by_arm["lora"]["rate"] == "4" and by_arm["lora"]["seeds"] == "3"
    assert by_arm["cka same rank"]["rate"] == "4 (edge)"
    assert by_arm["lora"]["loss at the end"] == "2.1000" and by_arm["lora"]["loss at its best"] == "1.9000"
    assert by_arm["lora"]["forgetting"] == "0.5000" and by_arm["lora"]["s training"] == "60.0"
    end = next(table for table in read_tables(lines)[1:] if "loss at the end" in table[0])
    rows = {row["loss at the end"]: row for row in end}
    # Student's t at 0.975 and two degrees of freedom is 4.3027; the differences are -0.1, -0.101 and -0.102.
    half = 4.3027 * 0.001 / math.sqrt(3)
    assert rows["cka same rank"]["less that of lora"] == f"**-0.1010 ± {half:.4f} (-4.8 %)**"
    # The rival is the mean of its draws, which is 0.2 above LoRA.
    assert rows["lora"]["less that of random same rank"] == "**-0.2000 ± 0.0000 (-8.7 %)**"
    assert rows["lora"]["less that of lora"] == "" and "less that of lora half rank" not in rows["lora"]
    forgetting = next(table for table in read_tables(lines)[1:] if "forgetting" in table[0])
    assert {row["less that of lora"] for row in forgetting} == {"", "**-0.2500 ± 0.0000 (-50.0 %)**"}


def test_half_of_the_rank_is_lora_of_that_rank_in_the_same_regime():
    half = [make_run(rank=8, seed=seed, rate=4, loss=3.0) for seed in range(3)]
    other = [make_run(rank=8, seed=seed, rate=4, loss=9.0, rows=300) for seed in range(3)]
    lines = describe_regimes([*plant(), *half, *other], ["lora", HALF_RANK])
    assert "\n".join(lines).count("## ") == 1  # what has nothing but LoRA compares nothing
    shown = {row["arm"]: row for row in read_tables(lines)[0]}
    assert shown[HALF_RANK]["loss at the end"] == "3.0000"
    assert all(run["rank"] == 16 for run in add_half_ranks(half) if run["arm"] == HALF_RANK)


def test_each_regime_has_a_picture_whose_points_are_less_those_of_lora(tmp_path):
    few = [{**run, "rows": 96} for run in plant()]
    lines = describe_regimes([*plant(), *few], ["lora"], "images")
    draw_regimes([*plant(), *few], tmp_path)
    headings = [line.removeprefix("## ") for line in lines if line.startswith("## ")]
    assert len(headings) == 2 and "96 rows" in headings[0], "few rows come first"
    names = ["small-sums-96-rows-10-epochs-of-8-rows-cut-at-256-tokens-r-16.svg"]
    names += [names[0].replace("96", "100")]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert [f"images/{name}" in "\n".join(lines) for name in names] == [True, True]
    picture = (tmp_path / names[0]).read_text()
    for words in ("cka same rank", "trainable parameters", "processor seconds", "forgetting", "96 rows"):
        assert words in picture
    draw_regime([{**run, "forgetting": None} for run in few], tmp_path / "other.svg")
    assert "forgetting" not in (tmp_path / "other.svg").read_text()


def test_a_table_has_the_first_seed_at_every_rate_that_was_tried():
    runs = [make_run(rate=rate, loss=loss, forgetting=rate * 100) for rate, loss in ((0.002, 2.1), (0.004, 2.0))]
    runs += [make_run(seed=1, rate=0.004, loss=2.3), make_run("cka", rate=0.008, loss=2.2)]
    *_, table = read_tables(describe_regime(runs, ["lora"]))
    title = "seed 0: loss at the end; forgetting, by rate"
    assert table == [
        {title: "lora", "0.002": "2.100; 0.20", "0.004": "2.000; 0.40", "0.008": ""},
        {title: "cka", "0.002": "", "0.004": "", "0.008": "2.200; 0.50"},
    ]
    *_, table = read_tables(describe_regime([{**run, "forgetting": None} for run in runs], ["lora"]))
    assert table[0] == {
        "seed 0: loss at the end, by rate": "lora",
        "0.002": "2.100",
        "0.004": "2.000",
        "0.008": "",
    }


def test_runs_that_are_measured_only_at_their_end_have_no_best_loss():
    runs = [make_run(arm, seed=seed, test_best=2.0) for arm in ("lora", "cka") for seed in range(2)]
    assert "loss at its best" not in "\n".join(describe_regime(runs, ["lora"]))
    assert "loss at its best" in "\n".join(describe_regime([*runs, make_run("eva", test_best=1.9)], ["lora"]))


def test_a_rival_is_averaged_over_the_seeds_that_all_its_draws_have():
    runs = [make_run("random", seed=seed, loss=2.0) for seed in range(2)]
    runs.append(make_run("random draw2", seed=1, loss=3.0))
    arms = {name: choose_runs([run for run in runs if run["arm"] == name]) for name in ("random", "random draw2")}
    assert {seed: figures["test"] for seed, figures in average_draws(arms, "random").items()} == {1: 2.5}


def test_one_table_does_not_mix_regimes():
    with pytest.raises(ValueError, match="several regimes"):
        print_table([make_run(), make_run(rows=300)], "lora", None)


# --- Training -----------------------------------------------------------------------------------------------------


def test_evaluations_are_evenly_spread_and_the_last_is_the_end():
    assert list_steps(130, 10) == [13, 26, 39, 52, 65, 78, 91, 104, 117, 130]
    assert list_steps(7, 2) == [4, 7] and list_steps(3, 9) == [1, 2, 3] and list_steps(60, 1) == [60]


def test_rows_are_drawn_by_the_seed_with_epochs_and_are_the_first_ones_otherwise():
    rows = [{"input_ids": [place]} for place in range(50)]
    assert draw_rows(rows, 10, 0, drawn=False) == rows[:10] == draw_rows(rows, 10, 1, drawn=False)
    drawn = draw_rows(rows, 10, 0, drawn=True)
    assert len({row["input_ids"][0] for row in drawn}) == 10
    assert drawn == draw_rows(rows, 10, 0, drawn=True) != draw_rows(rows, 10, 1, drawn=True)
    with pytest.raises(ValueError, match="more than the 50 rows"):
        draw_rows(rows, 51, 0, drawn=True)


def test_pieces_of_a_text_are_spread_over_it(tmp_path):
    # The tokenizer takes a 0, 1 or 2 out of a longer number, as its special tokens.
    words = [number for number in range(97) if not set("012") & set(str(number))][:51]
    path = tmp_path / "english.txt"
    path.write_text(" ".join(map(str, words)))
    pieces = read_text(path, make_tokenizer(), longest=5, count=3)
    assert [piece["labels"] for piece in pieces] == [words[start : start + 5] for start in (0, 17, 34)]
    with pytest.raises(ValueError, match="51 tokens, but 3 pieces of 18"):
        read_text(path, make_tokenizer(), longest=18, count=3)


def test_general_texts_are_prose_and_code():
    code = collect_python(Path(argparse.__file__).parent)
    assert "def add_argument" in code and len(code) == LENGTH
    prose = find_prose(
        "Too short. Really.\n\n" + "A sentence of words\nfollows here. " * 8 + "\n\n" + "x = {1: [2]}. " * 30
    )
    assert prose == [("A sentence of words follows here. " * 8).strip()]


def test_ranks_by_sensitivity_follow_the_weights_and_their_gradient(tmp_path):
    base, rows = make_small_llama(layers=3), make_rows(4, 0)
    targets = ["q_proj", "down_proj"]
    ranks = find_ranks(base, targets, 4, rows)
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        (base(input_ids=ids, labels=labels).loss / len(rows)).backward()
    modules = {name: base.get_submodule(name) for name in ranks}
    scores = {name: (module.weight * module.weight.grad).abs().mean().item() for name, module in modules.items()}
    measured = measure_sensitivity(base, modules, rows)
    assert measured == pytest.approx(scores, rel=1e-4)
    assert len(ranks) == 6 and sorted(ranks, key=ranks.get)[-1] == max(scores, key=scores.get)
    base.save_pretrained(tmp_path)
    model = make_model(tmp_path, False, parse_arm("sensitivity p0.5"), 4, rows)
    plain = make_model(tmp_path, False, parse_arm("lora"), 4, rows)
    count = [sum(weight.numel() for weight in one.parameters() if weight.requires_grad) for one in (model, plain)]
    assert 0.95 * count[1] < count[0] <= count[1]
    for name in ranks:
        module = model.base_model.model.get_submodule(name)
        assert module.scaling["default"] == pytest.approx(2 * (4 / module.r["default"]) ** 0.5)


@pytest.mark.trains
def test_the_time_that_a_limit_saves_is_given_back_as_steps(tmp_path):
    make_small_llama(layers=4).save_pretrained(tmp_path)
    rows = make_rows(16, 0)
    data = Data(train=rows, validation=rows, test=rows, general={})
    settings = Settings(base=tmp_path, is_encoder=False, steps=30, batch_size=4, evaluations=2)
    run = run_arm(settings, "gradient time0.85", 4, 0, 0.02, data, {})
    (_, last) = (step for step, *_ in json.loads(run["curve"]))
    layers = {int(name.split(".")[2]) for name in json.loads(run["chosen"])}
    assert 0 not in layers and 3 in layers
    assert 30 / 0.85 <= last <= 60 and run["step_best"] in (round(last / 2), last)


@pytest.mark.trains
@pytest.mark.parametrize("arm", ["gradient p0.5 loraplus4", "sensitivity p0.5", "gradient l1ra p1"])
def test_a_run_ends_with_its_figures(arm, tmp_path):
    make_small_llama(layers=3).save_pretrained(tmp_path)
    rows = [make_rows(16, seed) for seed in range(3)]
    data = Data(train=rows[0], validation=rows[1], test=rows[2], general={"english": rows[2]})
    settings = Settings(base=tmp_path, is_encoder=False, steps=8, batch_size=4, evaluations=4)
    run = run_arm(settings, arm, 4, 0, 0.02, data, {"english": 4.0})
    steps, seconds, losses = zip(*json.loads(run["curve"]))
    assert steps == (2, 4, 6, 8) and list(seconds) == sorted(seconds) and losses[-1] == run["validation"]
    assert run["step_best"] == steps[losses.index(min(losses))]
    # The text is the rows that the model is tested on.
    before, after = json.loads(run["general"])["english"]
    assert before == 4.0 and after == run["test"] and run["forgetting"] == pytest.approx(after - before, abs=1e-5)
    assert run["training"] < run["test"] and len(set(json.loads(run["chosen"]).values())) > 1
    assert {*KEY, *run, "package"} == set(COLUMNS)
