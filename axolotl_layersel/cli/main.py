"""The command ``axolotl-layersel``, which is also ``python -m axolotl_layersel`` and ``axolotl layersel``."""

import json
import subprocess
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from axolotl_layersel import __version__
from axolotl_layersel.cli.arguments import DescribedCommand
from axolotl_layersel.cli.overrides import OVERRIDES, OverridableCommand, apply_overrides
from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.terminal import clean, report_errors, say

EXIT_CODES = (
    "Exit codes: 0, the command did what it says; 1, it was refused or failed, and standard error says why; 2, the "
    "command line has a mistake."
)
Config = Annotated[Path, typer.Argument(help="The Axolotl YAML file.")]

app = typer.Typer(pretty_exceptions_enable=False, no_args_is_help=True)


def print_version(asked: bool) -> None:
    """Print the version and exit for ``--version``."""
    if asked:
        say(f"axolotl-layersel {__version__}")
        raise typer.Exit()


@app.callback(epilog=f"Example: axolotl-layersel check run.yml\n\n{EXIT_CODES}")
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


@app.command(
    cls=OverridableCommand,
    context_settings={"allow_extra_args": True},
    epilog="Example: axolotl-layersel plan run.yml --base-model my/model --launcher torchrun -- --nproc_per_node=2",
)
def plan(
    context: typer.Context,
    config: Config,
    launcher: Annotated[
        Launcher | None,
        typer.Option(help="The launcher of the processes. Default: accelerate, if there are several."),
    ] = None,
    repeat: Annotated[
        int, typer.Option(min=1, help="The number of seeds to choose with. Above 1, report how far the choices agree.")
    ] = 1,
) -> None:
    """Select layers and write the plan, without training. Arguments after -- go to the launcher.

    Axolotl's options replace keys of the file, as in axolotl train: --base-model NAME, --lora-r 16.
    """
    from axolotl_layersel.cli.starting import find_launcher
    from axolotl_layersel.config.textual import check_text, read_yaml

    overrides = context.meta[OVERRIDES]

    def check_text_of(path: Path) -> None:
        data = read_yaml(path)
        if data is not None:  # Axolotl itself refuses a file that cannot be read
            check_text(apply_overrides(data, overrides))

    check_early(config, check_text_of)

    commands = {
        Launcher.accelerate: ["accelerate", "launch", *context.args, "-m"],
        Launcher.torchrun: ["torchrun", *context.args, "-m"],
        Launcher.python: [sys.executable, *context.args, "-m"],
    }
    launcher = launcher or Launcher(find_launcher(apply_overrides(read_yaml(config) or {}, overrides), context.args))
    if launcher is Launcher.python and not context.args:
        from axolotl_layersel.cli.worker import main

        return main(str(config), repeat, overrides)
    worker = ["axolotl_layersel.cli.worker", str(config), str(repeat), json.dumps(overrides)]
    raise typer.Exit(subprocess.run([*commands[launcher], *worker]).returncode)


@app.command(
    cls=OverridableCommand,
    context_settings={"allow_extra_args": True},
    epilog="Example: axolotl-layersel compare run.yml --arms lora,gradient,lora@32 --seeds 3 --time-limit 2h",
)
def compare(
    context: typer.Context,
    config: Config,
    arms: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="What to compare: lora, lora@RANK, random, a method such as gradient, l1ra, or a method with moving "
            "rank, such as gradient+l1ra. lora is always in, and random next to a choice by the data. Default: lora, "
            "gradient, cka, random, lora at twice the rank, and the layersel block of the file.",
        ),
    ] = None,
    arms_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A YAML file of further arms: a name, and below it the keys that it sets."),
    ] = None,
    rates: Annotated[
        str | None,
        typer.Option(metavar="A,B,...", help="Learning rates. Default: five around the file's, a factor of 2 apart."),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="The number of seeds at the best rate. Default 3.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Optimizer steps of each run. Default: those of the file's run, at most 100."
        ),
    ] = None,
    no_halving: Annotated[
        bool,
        typer.Option(
            "--no-halving",
            help="Train all rates with all steps and seeds. Default: all rates with half of the steps, and only the "
            "better half of them with all steps and one seed.",
        ),
    ] = False,
    widen: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="How many further rates an arm tries while its best is the lowest or the highest."
        ),
    ] = 3,
    no_refine: Annotated[
        bool,
        typer.Option(
            "--no-refine",
            help="Do not try the rates between an arm's best one and its neighbours. Default: they are tried, because "
            "a factor of 2 can decide between arms.",
        ),
    ] = False,
    time_limit: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Leave out seeds, rates and steps until the rest fits, such as 90m or 2h."),
    ] = None,
    general: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="General text, by line or as JSON lines with `text`, to measure forgetting."),
    ] = None,
    output_dir: Annotated[
        str | None, typer.Option(metavar="DIR", help="The folder to write to, in place of the file's output_dir.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs, and start none.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Run those again that have failed.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: the answer and all figures. Lines on the course go to stderr.")
    ] = False,
    launcher: Annotated[
        Launcher | None,
        typer.Option(metavar="NAME", help="accelerate, torchrun or python, as in axolotl train."),
    ] = None,
) -> None:
    """Find out on your own data which adapter, rank and learning rate pays. Arguments after -- go to the launcher.

    Each combination is a short run of axolotl train. The same command continues a comparison that was stopped.
    Axolotl's options replace keys of the file, as in axolotl train: --base-model NAME, --lora-r 16.
    """
    from axolotl_layersel.cli.compare import command as comparing

    options = comparing.Options(
        arms=arms,
        rates=rates,
        seeds=seeds,
        steps=steps,
        halving=not no_halving,
        widen=widen,
        refine=not no_refine,
        time_limit=time_limit,
        general=general,
        arms_file=arms_file,
        dry_run=dry_run,
        as_json=as_json,
        retry=retry,
    )
    launch = [] if launcher is None else ["--launcher", launcher.value]
    launch += ["--", *context.args] if context.args else []
    overrides = {**context.meta[OVERRIDES], **({} if output_dir is None else {"output_dir": output_dir})}
    try:
        comparing.compare(config, overrides, options, launch)
    except LayerselError as error:
        fail(str(error))


@app.command(cls=OverridableCommand, epilog="Example: axolotl-layersel check run.yml --lora-r 16")
def check(context: typer.Context, config: Config) -> None:
    """Report the faults of a YAML file that can be found without the model and the data.

    Axolotl's options replace keys of the file, as in axolotl train: --base-model NAME, --lora-r 16.
    """
    from axolotl_layersel.cli.checking import check_config
    from axolotl_layersel.config.textual import check_plugin

    check_early(config, check_plugin)
    say(check_config(config, context.meta[OVERRIDES]))


@app.command(
    cls=OverridableCommand,
    epilog="Example: axolotl-layersel doctor run.yml --model-config config.json --processes 8",
)
def doctor(
    context: typer.Context,
    config: Config,
    model_config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The config.json of the base model. Default: that of base_model, if it is on this machine.",
        ),
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="The number of processes of the run.")] = 1,
    lowest_layer: Annotated[
        int | None, typer.Option(min=0, help="The lowest kept layer to give the time of a step for.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Report all faults of a YAML file at once, and what the run will need. No weights and no data are read.

    It exits with 1 if the run would be refused. Axolotl's options replace keys of the file: --lora-r 16.
    """
    from axolotl_layersel.cli.doctor.command import examine
    from axolotl_layersel.config.textual import check_plugin, read_yaml

    check_early(config, lambda path: None if read_yaml(path) else check_plugin(path))
    data = apply_overrides(read_yaml(config) or {}, context.meta[OVERRIDES])
    report = examine(data, model_config, processes, lowest_layer)
    if as_json:
        typer.echo(report.format_json())
    else:
        for line in report.lines:
            say(line)
    raise typer.Exit(1 if report.faults else 0)


def check_early(config: Path, check: Callable[[Path], None]) -> None:
    """Check a YAML file by its text, and make this command end in sentences.

    Args:
        config: the YAML file.
        check: raises ValueError for a fault.

    Raises:
        typer.Exit: if the file has a fault, after printing it.
    """
    from axolotl_layersel.config.textual import check_path
    from axolotl_layersel.training.ending import collect, describe_error

    try:
        check_path(config)
        check(config)
    except ValueError as error:
        fail(describe_error(error))
    collect()


@app.command(cls=DescribedCommand, epilog="Example: axolotl-layersel show outputs/run --picture pictures/run.png")
def show(
    path: Annotated[Path, typer.Argument(help="A plan.json, or the folder of a run or checkpoint.")],
    picture: Annotated[
        Path | None,
        typer.Option(
            help="Also draw the ranks, the gates of a search and the scores, as a run does in its folder: the first "
            "that there is to this file, such as run.png. A missing folder is made."
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print JSON instead of tables: the plan, and the ranks by optimizer step."),
    ] = False,
) -> None:
    """Print the chosen layers, and the rank of every module.

    Further pictures have -gates, -scores or -ranks in their names.
    """
    from axolotl_layersel.cli.showing import read_record
    from axolotl_layersel.reports.pictures import check_picture

    try:
        record = read_record(path, with_gates=picture is not None)
        if picture:
            check_picture(picture)
        if as_json:
            typer.echo(record.format_json())
        else:
            record.print()
        for drawn in record.draw(picture) if picture else []:
            if as_json:  # standard output is JSON only
                print(clean(f"picture: {drawn}"), file=sys.stderr)
            else:
                say(f"picture: {drawn}")
    except LayerselError as error:
        fail(str(error))


class Layout(str, Enum):
    """The layout of modules with different ranks in an adapter's file."""

    ragged = "ragged"
    const = "const"
    uniform = "uniform"
    full = "full"


class For(str, Enum):
    """The program that will read an exported adapter."""

    peft = "peft"
    vllm = "vllm"
    old_vllm = "vllm<0.32"
    sglang = "sglang"
    llama_cpp = "llama.cpp"
    ollama = "ollama"
    tensorrt_llm = "tensorrt-llm"
    tgi = "tgi"
    lorax = "lorax"
    mlx = "mlx"


@app.command(cls=DescribedCommand, epilog="Example: axolotl-layersel export outputs/run --for llama.cpp")
def export(
    adapter: Annotated[Path, typer.Argument(help="The folder of a LoRA adapter, of a run or a checkpoint.")],
    reader: Annotated[
        For | None,
        typer.Option(
            "--for",
            metavar="PROGRAM",
            help=f"The program that will read the adapter: {', '.join(each.value for each in For)}. "
            "It gets the smallest layout that is right there.",
        ),
    ] = None,
    layout: Annotated[
        Layout | None,
        typer.Option(
            metavar="LAYOUT",
            help="In place of --for. ragged: each module its own rank; const: the same with one alpha; uniform: all "
            "padded to the highest rank; full: the same with zeros where a layer lacks a type of module.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="The folder to write to. Default: next to ADAPTER, such as vllm-NAME or uniform-NAME."),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(help="The path or hub name of the base model. Default: the one that the adapter names."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite any adapter in the folder to write to.")] = False,
) -> None:
    """Write a LoRA adapter as another program reads it, with the same result, and print how to start that program.

    The folder to write to may hold no other adapter than an earlier export of ADAPTER.
    """
    from axolotl_layersel.cli.exporting import export_layout, export_to_reader

    if (reader is None) == (layout is None):
        fail("--for and --layout exclude each other, and one of them is needed. --for chooses the layout.")
    try:
        if reader is not None:
            lines = export_to_reader(adapter, reader.value, output, base_model, force)
        else:
            assert layout is not None, "one of the two is given"
            lines = export_layout(adapter, layout.value, output, base_model, force)
    except LayerselError as error:
        fail(str(error))
    for line in lines:
        say(line)


@app.command(cls=DescribedCommand, epilog="Example: axolotl-layersel examples my-examples")
def examples(
    folder: Annotated[
        Path, typer.Argument(metavar="[DIR]", help="The folder to write to. It is made if needed.")
    ] = Path("layersel-examples"),
) -> None:
    """Write the example configurations to a folder, with its name in their paths and commands.

    If a file there differs from an example, nothing is written.
    """
    from axolotl_layersel.cli.examples import write_examples

    try:
        written = write_examples(folder)
    except LayerselError as error:
        fail(str(error))
    say(f"{folder}: {len(written)} files of examples. Each says in its first lines how to run it.")


@app.command(cls=DescribedCommand, epilog="Example: axolotl-layersel schema > layersel.schema.json")
def schema() -> None:
    """Print the JSON schema of the layersel block, with which editors complete and check an Axolotl YAML file.

    For editors with the YAML language server, the first line of the YAML file is:
    # yaml-language-server: $schema=layersel.schema.json
    """
    from axolotl_layersel.config.root import LayerselArgs

    content = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **LayerselArgs.model_json_schema(),
        "title": "Axolotl YAML file with axolotl-layersel",
        "description": "The layersel block. Other keys are Axolotl's, which this schema accepts as they are.",
    }
    typer.echo(json.dumps(content, indent=2))


def fail(message: str) -> None:
    """Print the lines of a message to standard error and exit with code 1."""
    report_errors(message.splitlines())
    raise typer.Exit(1)


# The command without the options for shell completion, which works only for the script ``axolotl-layersel``. Axolotl
# finds it by the entry point ``layersel`` of the group ``axolotl.cli_commands``.
command = typer.main.get_group(app)
