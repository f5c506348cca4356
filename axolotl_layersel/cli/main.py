"""The command ``axolotl-layersel``, which is also ``python -m axolotl_layersel`` and ``axolotl layersel``."""

import os
import subprocess
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from axolotl_layersel import __version__
from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.terminal import report_errors, say

app = typer.Typer(pretty_exceptions_enable=False, no_args_is_help=True)


def print_version(asked: bool) -> None:
    """Print the version and exit for ``--version``."""
    if asked:
        say(f"axolotl-layersel {__version__}")
        raise typer.Exit()


@app.callback()
def start(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Choose the layers that get a LoRA adapter, and show the choice."""


class Launcher(str, Enum):
    """A launcher of processes, as in ``axolotl train``."""

    accelerate = "accelerate"
    torchrun = "torchrun"
    python = "python"


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def plan(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="The Axolotl YAML file.")],
    launcher: Annotated[
        Launcher | None,
        typer.Option(help="The launcher of the processes. Default: accelerate, if there are several."),
    ] = None,
    repeat: Annotated[
        int, typer.Option(min=1, help="The number of seeds to choose with. Above 1, report how far the choices agree.")
    ] = 1,
) -> None:
    """Select layers and write the plan, without training. Arguments after -- go to the launcher."""
    from axolotl_layersel.cli.starting import find_launcher
    from axolotl_layersel.config.textual import check_file

    check_early(config, check_file)

    commands = {
        Launcher.accelerate: ["accelerate", "launch", *context.args, "-m"],
        Launcher.torchrun: ["torchrun", *context.args, "-m"],
        Launcher.python: [sys.executable, *context.args, "-m"],
    }
    launcher = launcher or Launcher(find_launcher(config, context.args))
    if launcher is Launcher.python and not context.args:
        from axolotl_layersel.cli.worker import main

        return main(str(config), repeat)
    command = [*commands[launcher], "axolotl_layersel.cli.worker", str(config), str(repeat)]
    raise typer.Exit(subprocess.run(command).returncode)


@app.command()
def check(config: Annotated[Path, typer.Argument(help="The Axolotl YAML file.")]) -> None:
    """Report the faults of a YAML file that can be found without the model and the data."""
    from axolotl_layersel.cli.checking import check_config
    from axolotl_layersel.config.textual import check_plugin

    check_early(config, check_plugin)
    say(check_config(config))


def check_early(config: Path, check: Callable[[Path], None]) -> None:
    """Check a YAML file by its text, and make this command end in sentences.

    Args:
        config: the YAML file.
        check: raises ValueError for a fault.

    Raises:
        typer.Exit: if the file has a fault, after printing it.
    """
    from axolotl_layersel.training.ending import collect, describe_error

    if not os.path.isfile(config):
        fail(f"{config} does not exist. Give the path of an Axolotl YAML file.")
    try:
        check(config)
    except ValueError as error:
        fail(describe_error(error))
    collect()


@app.command()
def show(
    path: Annotated[Path, typer.Argument(help="A plan.json, or the folder of a run or checkpoint.")],
    picture: Annotated[
        Path | None, typer.Option(help="Also draw ranks, or a search's gates, to this file, such as run.png.")
    ] = None,
) -> None:
    """Print the chosen layers, and the rank of every module.

    If a run has both ranks and a search, the picture of the gates has -gates in its name.
    """
    from axolotl_layersel.cli.pictures import check_picture, draw_gates, draw_ranks
    from axolotl_layersel.common.paths import gates_path, plan_path, ranks_path
    from axolotl_layersel.l1ra.records import RankHistory
    from axolotl_layersel.l1ra.report import print_ranks
    from axolotl_layersel.selection.gate_history import GateHistory
    from axolotl_layersel.selection.plan_file import read_plan
    from axolotl_layersel.selection.report import print_plan

    is_folder = os.path.isdir(path)  # unlike Path.is_dir, it accepts names of any length
    has_ranks = is_folder and ranks_path(path).exists()
    has_gates = is_folder and gates_path(path).exists()
    kept: list[str] = []
    modules: tuple[str, ...] = ()
    try:
        if picture:
            check_picture(picture)
        if not has_ranks or plan_path(path).exists():
            plan = read_plan(plan_path(path) if is_folder else path, key="PATH")
            modules = tuple(f"{name}." for name in plan.modules) if plan.module_scores else ()
            kept = [str(layer) for layer in plan.selected]
            print_plan(plan)
        if has_ranks:
            history = RankHistory.read(path)
            print_ranks(history.ranks[0], history.ranks[max(history.ranks)])
        if picture and not has_ranks and not has_gates:
            raise LayerselError(
                f"--picture: {path} has no layersel/ranks.csv or gates.csv to draw. Give the folder of a run."
            )
        if picture and has_ranks:
            draw_ranks(history.ranks, picture)
        if picture and has_gates:
            target = picture.with_stem(f"{picture.stem}-gates") if has_ranks else picture
            gates = GateHistory.read(path)
            # The name of a unit is its layer's number, or the common beginning of its modules' names.
            kept += [unit for unit in gates.names if any(name.startswith(f"{unit}.") for name in modules)]
            draw_gates(gates, kept, target)
    except LayerselError as error:
        fail(str(error))


class Layout(str, Enum):
    """The layout of modules with different ranks in an adapter's file."""

    ragged = "ragged"
    uniform = "uniform"


@app.command()
def export(
    adapter: Annotated[Path, typer.Argument(help="The folder of a LoRA adapter, of a run or a checkpoint.")],
    layout: Annotated[
        Layout, typer.Option(help="ragged: each module its own rank; uniform: all padded to the highest rank.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="The folder to write to. Default: next to ADAPTER, such as uniform-NAME."),
    ] = None,
) -> None:
    """Write a LoRA adapter in a layout that other programs read, with the same result."""
    from axolotl_layersel.lora.export import export_adapter, find_vllm_rank

    # Next to the folder, not in it, where it would look like a checkpoint or an adapter of the run.
    place = Path(os.path.realpath(adapter))  # unlike Path.resolve, it accepts a loop of links
    output = output or place.parent / f"{layout.value}-{place.name}"
    try:
        rank = export_adapter(adapter, layout.value, output)
    except LayerselError as error:
        fail(str(error))
    needed = find_vllm_rank(rank)
    say(f"{output}: highest rank {rank}")
    say(f"vLLM needs --max-lora-rank {needed}" if needed else "vLLM loads no adapter of that rank: its highest is 512")


def fail(message: str) -> None:
    """Print the lines of a message to standard error and exit with code 1."""
    report_errors(message.splitlines())
    raise typer.Exit(1)


# The command without the options for shell completion, which works only for the script ``axolotl-layersel``. Axolotl
# finds it by the entry point ``layersel`` of the group ``axolotl.cli_commands``.
command = typer.main.get_group(app)
