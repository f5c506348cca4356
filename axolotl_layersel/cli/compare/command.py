"""The command ``compare``: from the user's file and options to the runs, the report and the answer."""

import json
import logging
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
import yaml

from axolotl_layersel.cli.compare import schedule
from axolotl_layersel.cli.compare.arms import find_rank, make_arms
from axolotl_layersel.cli.compare.cells import (
    BEST,
    describe_held_out,
    find_comparison_folder,
    make_best,
)
from axolotl_layersel.cli.compare.figures import COMPARISON, ArmSettings, Comparison, Settings, read_record
from axolotl_layersel.cli.compare.general import read_passages
from axolotl_layersel.cli.compare.running import Board, Course, Stopped, stopping_in_order
from axolotl_layersel.cli.overrides import apply_overrides
from axolotl_layersel.common.errors import LayerselError, warning_instead
from axolotl_layersel.common.files import write_atomically
from axolotl_layersel.common.terminal import say
from axolotl_layersel.config.strict_block import as_number, as_whole, quote, read_choice
from axolotl_layersel.config.textual import check_path, find_seed, read_mapping

STEPS = 100
SEEDS = 3
UNITS = {"s": 1, "m": 60, "h": 3600}
DURATION = re.compile(r"(?:\d+(?:\.\d+)?[smh])+")
INTERRUPTED = 130


@dataclass(frozen=True)
class Options:
    """The options of the command, as the user gave them; None for the default."""

    arms: str | None = None
    rates: str | None = None
    seeds: int | None = None
    steps: int | None = None
    halving: bool = True
    widen: int = 3
    refine: bool = True
    time_limit: str | None = None
    general: Path | None = None
    arms_file: Path | None = None
    dry_run: bool = False
    as_json: bool = False
    retry: bool = False

    def describe(self, launch: list[str]) -> dict[str, Any]:
        """Return the options that decide on the cells, for the comparison of two starts."""
        return {
            "arms": self.arms,
            "rates": self.rates,
            "seeds": self.seeds,
            "steps": self.steps,
            "halving": self.halving,
            "widen": self.widen,
            "refine": self.refine,
            "time_limit": self.time_limit,
            "arms_file": str(self.arms_file) if self.arms_file else None,
            "launch": launch,
        }


def compare(config: Path, overrides: Mapping[str, Any], options: Options, launch: list[str]) -> None:
    """Run a comparison, write its report, and print its answer.

    Args:
        config: the user's YAML file.
        overrides: values by key, in place of those in the file.
        options: the options of the command.
        launch: the arguments of ``axolotl train`` after the file.

    Raises:
        LayerselError: if the file or an option is refused.
        typer.Exit: with code 130 if the user stops it.
    """
    from axolotl_layersel.training.lock import RunLock

    if options.as_json:
        move_logs_to_stderr()
    data = read_file(config, overrides)
    own, arms = find_rate(data, options), make_arms(split(options.arms), data, options.arms_file)
    settings = make_settings(config, data, options, own, arms, launch)
    limit = None if options.time_limit is None else parse_duration(options.time_limit)
    if options.dry_run:
        return list_cells(settings, own, options.as_json)
    asked, folder = {**options.describe(launch), "learning_rate": own}, Path(settings.folder)
    course = Course(data, settings, own, Board(options.as_json), asked, limit, options.retry)
    lock = RunLock.take(folder)
    try:
        take_up(course, options)
        with stopping_in_order():
            course.run()
        course.save()
        report(course.make_comparison(), data, options.as_json)
    except Stopped:
        if course.results:
            course.save()
        ended = f"{len(course.results)} of {course.count()} runs"
        course.board.say(f"compare: stopped after {ended}. The same command goes on from here.")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        lock.release()


# --- The file and the options -----------------------------------------------------------------------------------------


def read_file(path: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of the user's YAML file, with ``overrides`` in place of its values.

    Raises:
        LayerselError: if it cannot be read, or asks for a run without LoRA or without rows that can be held out.
    """
    check_path(path)
    data = apply_overrides(read_mapping(path), overrides)
    adapter = read_choice(data, "adapter")
    if adapter not in ("lora", "qlora"):
        raise LayerselError(
            f"adapter: {quote(adapter)} has no LoRA to compare. Set `adapter: lora` or `adapter: qlora`."
        )
    streamed = next((key for key in ("streaming", "pretraining_dataset") if data.get(key)), None)
    if streamed is not None:
        raise LayerselError(
            f"{streamed}: {quote(data[streamed])} reads rows as they come, so none can be held out, and the runs could "
            "not be given the same ones. Use a dataset that is loaded whole."
        )
    find_rank(data)
    return data


def move_logs_to_stderr() -> None:
    """Make loggers that write to standard output, as Axolotl's do, write to standard error."""
    loggers = [logging.getLogger(), *(logging.getLogger(name) for name in logging.root.manager.loggerDict)]
    for handler in (handler for logger in loggers for handler in logger.handlers):
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
            handler.setStream(sys.stderr)


def find_rate(data: Mapping[str, Any], options: Options) -> float:
    """Return the learning rate of the file, or the middle one of ``--rates`` if it has none."""
    rate = as_number(data.get("learning_rate"))
    if rate is not None and rate > 0:
        return schedule.round_rate(rate)
    if data.get("learning_rate") is None and options.rates is not None:
        rates = parse_rates(options.rates)
        return rates[len(rates) // 2]
    raise LayerselError(
        f"learning_rate: {quote(data.get('learning_rate'))} is no rate to start from. Set one, such as 2e-4."
    )


def parse_rates(text: str) -> list[float]:
    """Return the rates of ``--rates``, in ascending order."""
    rates = [as_number(word) for word in split(text) or []]
    if not rates or any(rate is None or rate <= 0 for rate in rates):
        raise LayerselError(
            f"--rates: {quote(text)} is not a list of learning rates. Write one such as 1e-4,2e-4,4e-4."
        )
    return sorted({schedule.round_rate(rate) for rate in rates if rate is not None})


def parse_duration(text: str) -> float:
    """Return the seconds of a duration such as ``90m``, ``2h`` or ``1h30m``."""
    if not DURATION.fullmatch(text):
        raise LayerselError(f"--time-limit: {quote(text)} is not a duration. Write one such as 90m, 2h or 1h30m.")
    return sum(float(number) * UNITS[unit] for number, unit in re.findall(r"([\d.]+)([smh])", text))


def split(text: str | None) -> list[str] | None:
    """Return the words between the commas of an option."""
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


def make_settings(
    config: Path,
    data: Mapping[str, Any],
    options: Options,
    own: float,
    arms: dict[str, ArmSettings],
    launch: list[str],
) -> Settings:
    """Return the settings of the comparison, before the first cell has said how long the run is."""
    if options.general is not None and not options.general.is_file():
        raise LayerselError(f"--general: {options.general} does not exist. Give a file of general text.")
    if options.general is not None:
        read_passages(str(options.general))  # what is wrong with it is told before anything trains
    seed, longest = find_seed(data), as_whole(data.get("max_steps"))
    return Settings(
        yaml=str(config),
        folder=str(find_comparison_folder(data)),
        arms=arms,
        rates=schedule.spread_rates(own) if options.rates is None else parse_rates(options.rates),
        seeds=[seed + place for place in range(options.seeds or SEEDS)],
        steps=options.steps or (min(longest, STEPS) if longest and longest > 0 else STEPS),
        held_out=describe_held_out(data),
        general=str(options.general) if options.general else None,
        halving=options.halving,
        widen=options.widen,
        refine=options.refine,
        lora_r=find_rank(data),
        launch=launch,
    )


def take_up(course: Course, options: Options) -> None:
    """Continue an earlier start: with its final settings if the options are the same, otherwise with its run length.

    Raises:
        LayerselError: if it ran on other processes.
    """
    path = Path(course.settings.folder) / COMPARISON
    if not path.exists():
        return
    earlier = read_record(Comparison, path)
    before, now = earlier.asked.get("launch", []), course.settings.launch
    if before != now:
        raise LayerselError(
            f"compare: the comparison in {course.settings.folder} was made with other settings (arguments of the "
            f"launcher: {quote(' '.join(before))}, now {quote(' '.join(now))}). Choose another --output-dir, or delete "
            "it."
        )
    if earlier.asked == course.asked:
        final = {key: getattr(earlier.settings, key) for key in ("rates", "seeds", "steps")}
        course.settings = course.settings.model_copy(update=final)
        course.notes = [note for note in earlier.notes if not note.startswith(schedule.EDGE)]
        course.is_settled = True
    elif options.steps is None and earlier.real_steps is not None:
        steps = min(course.settings.steps, earlier.real_steps)
        course.settings = course.settings.model_copy(update={"steps": steps})


# --- Output -----------------------------------------------------------------------------------------------------------


def list_cells(settings: Settings, own: float, as_json: bool) -> None:
    """Print the cells of a comparison, without running any."""
    cells = schedule.list_planned(settings, own, {})
    planned = schedule.count_planned(settings, own, {})
    if as_json:
        listed = [{"arm": cell.arm, "rate": cell.rate, "seed": cell.seed, "steps": cell.steps} for cell in cells]
        content = {"settings": settings.model_dump(mode="json"), "cells": listed, "planned": planned}
        return typer.echo(json.dumps(content, indent=2))
    say(f"Held-out rows: {settings.held_out}.")
    for name, arm in settings.arms.items():
        keys = ", ".join(f"{key}: {json.dumps(value)}" for key, value in arm.keys.items() if value is not None)
        say(f"{name}: {keys or 'plain LoRA'}")
    for cell in cells:
        say(f"  {cell.describe()}")
    if planned > len(cells):
        say(
            f"  and {planned - len(cells)} more at the better rates, with {settings.steps} steps and the seeds "
            f"{', '.join(map(str, settings.seeds))}"
        )
    say(f"{planned} runs, and more for an arm whose best rate is the lowest or the highest of these.")


def report(comparison: Comparison, data: Mapping[str, Any], as_json: bool) -> None:
    """Write the report and ``best.yml``, and print the answer."""
    from axolotl_layersel.cli.compare import answer as answers
    from axolotl_layersel.cli.compare import page

    folder = Path(comparison.settings.folder)
    found = answers.answer(comparison)
    with warning_instead("the page of the comparison cannot be written", f"Its figures are in {folder / COMPARISON}."):
        page.write_page(comparison, folder)
    if as_json:
        typer.echo(json.dumps(answers.describe(comparison), indent=2))
    else:
        for line in found.format():
            say(line)
    if found.choice is not None:
        write_best(data, comparison.settings.arms[found.choice.arm], found.choice.rate, folder / BEST)
        if not as_json:
            say(f"To train with it: axolotl train {folder / BEST}")
    if not as_json:
        say(f"The whole report: {folder / 'report.html'}")


def write_best(data: Mapping[str, Any], arm: ArmSettings, rate: float, path: Path) -> None:
    """Write the user's YAML file with the arm and the rate of the answer."""
    head = "# Written by `axolotl layersel compare`.\n"
    content = yaml.safe_dump(make_best(data, arm, rate), sort_keys=False, allow_unicode=True)
    write_atomically(path, (head + content).encode())
