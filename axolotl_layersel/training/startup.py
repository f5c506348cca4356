"""A check at the start of Axolotl's commands, whether or not the YAML file lists the plugin.

torch calls ``watch`` when it is imported, by the entry point group ``torch.backends``. Axolotl loads a plugin only if
the YAML file lists it, and the entry points of ``axolotl.cli_commands`` only for their own commands. So without this
check, a ``layersel`` block without the plugin would silently train plain LoRA. Programs other than Axolotl's commands,
and files that do not mention ``layersel``, are not affected. ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` disables the check.

Relied on, as seen in these versions (``tests/unit/training/test_ending.py`` fails when one of them changes):

* torch 2.13.0 calls the entry points of ``torch.backends`` when it is imported, and does not catch ``SystemExit``.
* axolotl 0.19.0: ``axolotl NAME CONFIG`` imports torch first. It starts ``-m axolotl.cli.NAME CONFIG`` by a launcher,
  which replaces it (``exec``) or which it waits for.
"""

import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

MODULES = "axolotl.cli."
COMMAND = "axolotl"
CHECKED = ("train", "preprocess")  # the other commands read what was trained
OTHER_FILES = ("--sweep", "--cloud", "--launcher")  # options whose values are other YAML files, or no files
# With these options, the run differs from the file that is read here.
OVERRIDES = ("--layersel", "--plugins")
OTHER_FOLDER = ("--output-dir", "--output_dir")
# Options that change no key, or only the folder. Every other one may replace a key of the file.
UNCHANGING = ("--launcher", *OTHER_FOLDER)
YAML = (".yml", ".yaml")
WORDS = (b"layersel", b"layer_sel", b"layer-sel")


def watch() -> None:
    """Check the YAML file of a command of Axolotl's, and make the command end in sentences.

    Raises:
        SystemExit: if the file is refused.
    """
    command = find_command(getattr(sys, "argv", []), sys.orig_argv)  # embedded Python may have no argv
    path = None if command is None else find_file(command[1])
    if command is None or path is None or not mentions_layersel(path):
        return
    from axolotl_layersel.training.ending import collect, describe_error, point_to, tell

    collect()
    if not takes_block(*command):
        return
    with_folder = not any(word.startswith(OTHER_FOLDER) for word in command[1])
    point_to(path, with_folder)
    try:
        check_command(path, command[1], with_folder)
    except ValueError as error:
        tell(describe_error(error).splitlines())
        raise SystemExit(1) from None


def takes_block(name: str, arguments: Sequence[str]) -> bool:
    """Return whether a command is to be checked, and takes the plugins and the block of its file as they are."""
    swept = any(word.partition("=")[0] == "--sweep" for word in arguments)
    return name in CHECKED and not swept and not any(word.startswith(OVERRIDES) for word in arguments)


def check_command(path: Path, arguments: Sequence[str], with_folder: bool) -> None:
    """Check the YAML file of a command: the block, and the rest if no option of the command may change it.

    Raises:
        LayerselError: for the first fault.
        pydantic.ValidationError: if the block is invalid.
    """
    from axolotl_layersel.common.errors import raise_first
    from axolotl_layersel.config.faults import list_faults
    from axolotl_layersel.config.strict_block import list_plugins
    from axolotl_layersel.config.textual import NAMES, check_file, read_yaml

    check_file(path, with_folder)
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    data = read_yaml(path) or {}
    overridden = any(word.startswith("-") and not word.startswith(UNCHANGING) for word in own)
    if not overridden and any(name in NAMES for name in list_plugins(data)):
        raise_first(list_faults(data, with_folder)[1])


def find_command(argv: Sequence[str], original: Sequence[str]) -> tuple[str, list[str]] | None:
    """Return the name and the arguments of the command of Axolotl's that this process is or starts, or None.

    Args:
        argv: ``sys.argv``.
        original: ``sys.orig_argv``.
    """
    for place, (flag, module) in enumerate(pairwise(original)):
        if flag in ("-m", "--module") and module.startswith(MODULES):
            name, rest = module.removeprefix(MODULES), list(original[place + 2 :])
            return name_first(rest) if name == "main" else (name, rest)
    return name_first(list(argv[1:])) if argv and Path(argv[0]).name == COMMAND else None


def name_first(arguments: list[str]) -> tuple[str, list[str]] | None:
    """Return the first argument and the others; None if it is an option or missing."""
    return (arguments[0], arguments[1:]) if arguments and not arguments[0].startswith("-") else None


def find_file(arguments: Sequence[str]) -> Path | None:
    """Return the YAML file among the arguments of a command, or the only one in a folder, or None.

    Files take precedence over folders, which may be values of options.
    """
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    words = [word for last, word in pairwise(["", *own]) if last not in OTHER_FILES and not word.startswith("-")]
    # os.path takes any text, even one that is too long for a path.
    for word in words:
        if Path(word).suffix in YAML and os.path.isfile(word):
            return Path(word)
    for word in words:
        found = [file for file in Path(word).glob("*") if file.suffix in YAML] if os.path.isdir(word) else []
        if len(found) == 1:
            return found[0]
    return None


def mentions_layersel(path: Path) -> bool:
    """Return whether a file contains the word, in any spelling; False if it cannot be read."""
    try:
        text = path.read_bytes().lower()
    except OSError:
        return False
    return any(word in text for word in WORDS)
