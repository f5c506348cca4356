"""The closing block: what a finished run has come to, where it is, and what to do with it; at most 15 lines."""

import shlex
import textwrap
from pathlib import Path

from axolotl_layersel.common.paths import FOLDER, list_pictures, plan_path, ranks_path
from axolotl_layersel.common.terminal import clean
from axolotl_layersel.lora.readers import find_vllm_rank
from axolotl_layersel.reports.outcome import (
    Outcome,
    describe_choice,
    describe_parameters,
    describe_ranks,
    describe_readers,
    list_merge_options,
    read_outcome,
)
from axolotl_layersel.reports.savings import describe_savings, describe_step_time
from axolotl_layersel.selection.plan import Plan

WIDTH = 80
LABEL_WIDTH = 14
MOST_NAMED = 3  # more pictures are only counted


def describe_run(folder: str | Path, config: str | Path | None = None) -> list[str]:
    """Return the closing block of the finished run in ``folder``, line by line.

    Lines have at most 80 characters, unless a path is longer.

    Args:
        folder: the run's ``output_dir``, which holds its adapter.
        config: the path of its YAML file, for the command that merges the adapter.

    Raises:
        LayerselError: if a file of the run is missing or damaged.
    """
    folder = Path(folder)
    outcome = read_outcome(folder)
    return [
        *describe_head(outcome),
        *describe_facts(outcome),
        *make_row("files", list_files(outcome, folder)),
        *describe_serving(outcome, folder, config),
    ]


def describe_plan(plan: Plan, path: Path) -> list[str]:
    """Return the closing block of a plan in the file ``path`` that was made without training, line by line."""
    outcome = Outcome(plan, None, None)
    use = make_row("use it", f"layersel.selection.plan: {clean(str(path))}")
    show = make_command("show", "axolotl-layersel", "show", str(path))
    return [*describe_head(outcome), *describe_facts(outcome), *use, *show]


# --- Parts ----------------------------------------------------------------------------------------------------------


def describe_head(outcome: Outcome) -> list[str]:
    """Return the layers and the ranks."""
    words = describe_ranks(outcome)
    if outcome.plan is None:
        assert outcome.history is not None, "a run has a selection or l1ra"
        count = len(outcome.history.ranks[0])
        return wrap(f"layersel: rank moved between {count} LoRA modules: {words}", "  ")
    head = f"layersel: {describe_choice(outcome.plan)}"
    return wrap(f"{head}; {words}" if words else head, "  ")


def describe_facts(outcome: Outcome) -> list[str]:
    """Return the parameters, the length of the backward pass, and the time of a step."""
    lines: list[str] = []
    if outcome.parameters is not None:
        lines += make_row("parameters", describe_parameters(outcome.parameters))
    if outcome.plan is not None:
        lines += make_row("backward", describe_savings(outcome.plan))
    if outcome.plan is not None and outcome.plan.step_time is not None:
        lines += make_row("step", describe_step_time(outcome.plan.step_time))
    return lines


def list_files(outcome: Outcome, folder: Path) -> str:
    """Return where the adapter, the plan, the ranks and the pictures are."""
    named = [path(folder) for path, has in ((plan_path, outcome.plan), (ranks_path, outcome.history)) if has]
    pictures = [path for path in list_pictures(folder) if path.exists()]
    named += pictures if len(pictures) <= MOST_NAMED else []
    names = [str(path.relative_to(folder)) for path in named]
    if len(pictures) > MOST_NAMED:
        names.append(f"{len(pictures)} pictures in {FOLDER}")
    return clean(f"{folder}: the adapter, {', '.join(names)}")


def describe_serving(outcome: Outcome, folder: Path, config: str | Path | None) -> list[str]:
    """Return the programs that read the adapter, and the commands to show, export, merge and serve it."""
    file, readers, place = outcome.file, outcome.readers, str(folder)
    assert file is not None and readers is not None, "a finished run has an adapter"
    lines = make_row("readers", " ".join(describe_readers(readers)))
    lines += make_command("show", "axolotl-layersel", "show", place)
    if readers.export_for:
        lines += make_command("export", "axolotl-layersel", "export", place, f"--for {readers.export_for}")
    merge = [str(config or "CONFIG.yml"), f"--lora-model-dir {shlex.quote(place)}", *list_merge_options(file)]
    lines += make_command("merge", "axolotl", "merge-lora", *merge)
    rank = find_vllm_rank(file.highest)
    if readers.has_vllm:
        base, name = file.base_model or "BASE_MODEL", folder.resolve().name
        modules = f"--lora-modules {shlex.quote(f'{name}={place}')}"
        lines += make_command("serve", "vllm", "serve", base, "--enable-lora", f"--max-lora-rank {rank}", modules)
    return lines


# --- Lines ----------------------------------------------------------------------------------------------------------


def make_row(label: str, text: str) -> list[str]:
    """Return a label and a text, wrapped next to it."""
    return wrap(f"  {label:<{LABEL_WIDTH}}{text}", " " * (LABEL_WIDTH + 2))


def wrap(text: str, indent: str) -> list[str]:
    """Return a text as lines, without breaking words such as paths."""
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def make_command(label: str, program: str, command: str, *words: str) -> list[str]:
    """Return a label and a command for a shell, continued on further lines by a backslash.

    ``words``: its arguments; one that starts with ``--`` is an option and its value, already quoted.
    """
    parts = [program, command, *(word if word.startswith("--") else shlex.quote(word) for word in words)]
    lines, indent = [f"  {label:<{LABEL_WIDTH}}{clean(parts[0])}"], " " * (LABEL_WIDTH + 2)
    for part in map(clean, parts[1:]):
        # Two columns are left for the backslash.
        if len(lines[-1]) + 1 + len(part) <= WIDTH - 2:
            lines[-1] += f" {part}"
        else:
            lines[-1] += " \\"
            lines.append(f"{indent}{part}")
    return lines
