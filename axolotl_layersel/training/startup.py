"""What a command of Axolotl's does first, whether or not its YAML file lists the plugin.

torch calls ``watch`` as soon as it is imported, by the entry point group ``torch.backends``. Axolotl itself looks for a
plugin only where the YAML file lists one, and loads the entry points of ``axolotl.cli_commands`` for their own commands
only, so a ``layersel`` block without the plugin would train plain LoRA without a word. Programs other than Axolotl's
commands, and files that do not speak of ``layersel``, are left alone. ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` switches it
off.

Relied on, as seen in these versions (``tests/unit/training/test_ending.py`` fails when one of them changes):

* torch 2.13.0 calls the entry points of ``torch.backends`` when it is imported, and lets ``SystemExit`` pass.
* axolotl 0.19.0: ``axolotl NAME CONFIG`` imports torch before it does anything. It starts
  ``-m axolotl.cli.NAME CONFIG`` by a launcher, which takes its place (``exec``) or for which it waits.
"""

import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

MODULES = "axolotl.cli."
COMMAND = "axolotl"
# Commands for which a block without its plugin would be passed over; the others read what was trained.
CHECKED = ("train", "preprocess")
# Options of Axolotl's whose values are YAML files too, or no files.
OTHER_FILES = ("--sweep", "--cloud", "--launcher")
# Whoever overrides these on the command line means another file than the one that is read here.
OVERRIDES = ("--layersel", "--plugins")
OTHER_FOLDER = ("--output-dir", "--output_dir")
YAML = (".yml", ".yaml")
WORDS = (b"layersel", b"layer_sel", b"layer-sel")


def watch() -> None:
    """Check the YAML file of a command of Axolotl's, and see to how the command ends.

    Raises:
        SystemExit: where the file cannot be honoured.
    """
    command = find_command(getattr(sys, "argv", []), sys.orig_argv)  # programs with Python inside may have none
    path = None if command is None else find_file(command[1])
    if command is None or path is None or not speaks_of_layersel(path):
        return
    from axolotl_layersel.config.textual import check_file
    from axolotl_layersel.training.ending import collect, describe_error, tell

    collect()
    if command[0] not in CHECKED or any(word.startswith(OVERRIDES) for word in command[1]) or "--sweep" in command[1]:
        return
    try:
        check_file(path, with_folder=not any(word.startswith(OTHER_FOLDER) for word in command[1]))
    except ValueError as error:
        tell(describe_error(error).splitlines())
        raise SystemExit(1) from None


def find_command(argv: Sequence[str], original: Sequence[str]) -> tuple[str, list[str]] | None:
    """Return the name of the command of Axolotl's that this process is, or starts, and its arguments, or None.

    Args:
        argv: as Python has it, without its own options.
        original: as the process was started.
    """
    for place, (flag, module) in enumerate(pairwise(original)):
        if flag in ("-m", "--module") and module.startswith(MODULES):
            name, rest = module.removeprefix(MODULES), list(original[place + 2 :])
            return name_first(rest) if name == "main" else (name, rest)
    return name_first(list(argv[1:])) if argv and Path(argv[0]).name == COMMAND else None


def name_first(arguments: list[str]) -> tuple[str, list[str]] | None:
    """Return the first of the arguments, and the others; None for an option or where there is none."""
    return (arguments[0], arguments[1:]) if arguments and not arguments[0].startswith("-") else None


def find_file(arguments: Sequence[str]) -> Path | None:
    """Return the YAML file among the arguments of a command, or the only one of a folder; None where none is seen.

    A file comes before a folder, which may be the value of an option.
    """
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    words = [word for last, word in pairwise(["", *own]) if last not in OTHER_FILES and not word.startswith("-")]
    # These take every text, such as one that is too long for a path.
    for word in words:
        if Path(word).suffix in YAML and os.path.isfile(word):
            return Path(word)
    for word in words:
        found = [file for file in Path(word).glob("*") if file.suffix in YAML] if os.path.isdir(word) else []
        if len(found) == 1:
            return found[0]
    return None


def speaks_of_layersel(path: Path) -> bool:
    """Return whether a file has the word in it, in whatever spelling; False where it cannot be read."""
    try:
        text = path.read_bytes().lower()
    except OSError:
        return False
    return any(word in text for word in WORDS)
