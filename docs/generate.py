"""Write the parts of the documentation that follow from code and test results: ``python docs/generate.py``."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import torch
import typer
from annotated_types import Ge, Gt, Le, Lt
from peft import LoraConfig
from typer.utils import get_params_from_function

from axolotl_layersel.cli.main import app
from axolotl_layersel.config.flexora import FlexoraConfig
from axolotl_layersel.config.l1ra import L1RAConfig
from axolotl_layersel.config.layer_names import LayerName
from axolotl_layersel.config.methods import METHODS
from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.config.selection import SelectionConfig
from axolotl_layersel.config.strict_block import Block
from axolotl_layersel.lora.factors import Factors
from axolotl_layersel.lora.layouts import LAYOUTS, lay_out
from axolotl_layersel.lora.readers import READERS, round_for_kernels

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.held_out.runs import read_runs
from benchmarks.held_out.tables import RIVALS, describe_regimes

DOCS = Path(__file__).parent
TESTS = DOCS.parent / "tests"
SUPPORT, SHOWN = DOCS / "support.md", DOCS / "support.json"
SELECTION, MESSAGES, SERVING = DOCS / "selection.md", DOCS / "messages.md", DOCS / "serving.md"
REGIMES, RUNS = DOCS / "results-by-regime.md", DOCS.parent / "benchmarks" / "results" / "regimes"
KEYS, COMMANDS = DOCS / "reference-keys.md", DOCS / "reference-commands.md"
BEGIN, END = "<!-- {} made by docs/generate.py. -->", "<!-- End of what docs/generate.py makes. -->"
METHOD_TABLE, MESSAGE_LISTS = BEGIN.format("The table of methods is"), BEGIN.format("The messages are")
READER_TABLE, SIZE_TABLE = BEGIN.format("The table of programs is"), BEGIN.format("The table of sizes is")
# The linear modules of a layer of Llama 3.1 70B: inputs and outputs.
LARGE_LAYERS = 80
LARGE = {
    **{"self_attn.q_proj": (8192, 8192), "self_attn.k_proj": (8192, 1024), "self_attn.v_proj": (8192, 1024)},
    **{"self_attn.o_proj": (8192, 8192), "mlp.gate_proj": (8192, 28672), "mlp.up_proj": (8192, 28672)},
    "mlp.down_proj": (28672, 8192),
}
# The ranks of consecutive modules in three adapters; with 0 a module has no LoRA.
LARGE_RANKS = {
    "rank 16 in every second layer": [16] * len(LARGE) + [0] * len(LARGE),
    "ranks 0, 2, 4, 8, 16, 32 and 64 in turn": [0, 2, 4, 8, 16, 32, 64, 2, 4, 8, 16, 32, 64],
    "ranks 4, 8, 16 and 32 in turn": [4, 8, 16, 32],
}
BLOCKS = {
    "The block": (LayerselConfig, "At least one of `selection` and `l1ra` must be there."),
    "Selection": (SelectionConfig, "What the keys do together is on [Selection](selection.md) and [Ranks](ranks.md)."),
    "The search": (FlexoraConfig, "Only `method: flexora` reads these. [The search](flexora.md) explains them."),
    "Moving rank": (L1RAConfig, "[Moving rank](l1ra.md) explains these."),
}
TYPES = {bool: "true or false", int: "whole number", float: "number", str: "text", LayerName: "layer"}
BOUNDS = {Gt: ("above", "gt"), Ge: ("from", "ge"), Lt: ("below", "lt"), Le: ("up to", "le")}
COLUMNS = [*METHODS, "l1ra"]
CHOSEN = (
    "A method works if it chose layers, all layers with LoRA had finite scores that differ, and only the chosen layers "
    "had LoRA afterwards. `l1ra` works if rank moved in training, and stock PEFT computes the same with the saved "
    "adapter as the model."
)
TABLES = {
    "model": (
        "Models",
        "Small random models of each family, with a plain `transformers.Trainer` on one process. For encoders the row "
        f"names the task. {CHOSEN} In encoders `cka` has no score for the lowest layer, whose first token is the same "
        "in all rows. The scores of `gradient` may be equal in them, because their labels are random.",
    ),
    "trainer": (
        "Trainers",
        "Whole runs of Axolotl on one process with each trainer and kind of data. In each run all methods that are not "
        "refused chose layers, with finite scores that differ, and without changes to the model. Then the choice of "
        "`cka`, or the plan of a run of SFT if `cka` is refused, was applied, and the model trained with `l1ra`. Rank "
        "moved, only the chosen layers had an adapter, and stock PEFT computes the same with it as the model.",
    ),
    "adapter": (
        "Kinds of adapter",
        f"A small random Llama with each kind of adapter, with a plain `transformers.Trainer` on one process. {CHOSEN}",
    ),
}
SURVEYED = (
    "All classes for text in the mappings of transformers, and the models without a head of all other types, such as "
    "those of images and audio. Each was built from its default configuration with few layers, on the meta device. "
    '"Found" means that the layers, the shape that a plan records and the lowest layer that trains are found, with '
    "LoRA in each list of layers. Nothing was trained or scored. The row without a model counts all configurations of "
    "transformers, of which the shape and the numbers of layers were read."
)
REFUSED = "Refused with these messages, shortened; `it` is the class and `n` a number:"
UNBUILT = (
    "Not built, because the defaults lack a setting that transformers needs, a library is missing, or the class has no "
    "linear module in a list of modules for LoRA:"
)
KEYS_HEAD = """# YAML keys

<!-- Made by docs/generate.py from the settings in axolotl_layersel/config. -->

With this page you can look up what each key of the `layersel` block takes, and what it is by default. A key that is not
here is an error that suggests the nearest one. Where the column of defaults has a dash, the meaning says what holds.
"""
COMMANDS_HEAD = """# Commands

<!-- Made by docs/generate.py from axolotl_layersel/cli/main.py. -->

With this page you can look up every command and option. `axolotl-layersel`, `axolotl layersel` and
`python -m axolotl_layersel` are the same command. It exits with 0, with 1 after a message that says what is wrong, and
with 2 where it does not know an option. `plan` exits with the code of the processes that it started, if they fail, and
`compare` with 130 if it is stopped.
"""
HEAD = """# Tested models, trainers and adapters

<!-- Made by docs/generate.py from docs/support.json, which `pytest --write-support` writes. -->

With this page you can look up whether a method works with your model, trainer and kind of adapter. The tables are made
from the results of this project's tests. A test fails if its result is not in them.

- **yes**: a test shows that it works, as described above the table. `l1ra` has its default rule.
- **no**: it is refused with the message in the note below the table.
- **?**: no test covers it. Models, trainers and adapters without a row are not tested either.

All tests ran on a CPU. [Engines](engines.md) says what was tested with several processes.
"""


REGIMES_HEAD = """\
# Results by regime

<!-- Made by docs/generate.py from the runs in benchmarks/results/regimes. -->

After this page you know how each choice of layers and ranks compares with plain LoRA, by rank, rows and epochs.

Each section is one model, one size of the training set, one length of training and one rank. The learning rate of an
arm is the best on validation rows of those that were tried, and rates are added while the best one is at their edge. A
difference is the mean over pairs of runs with the same seed, with Student's 95 % interval. It is bold if the interval
does not hold 0. [Results](results.md) says what follows.

- *lora half rank* is plain LoRA at half of the rank, the plainest way to train half of the parameters.
- *same rank* keeps `lora_r` in half of the layers, so half of the parameters train.
- *p0.5* is `scaling_exponent: 0.5`, *loraplus4* is LoRA+ with `loraplus_lr_ratio: 4`, *draw2* is another random choice.
- *sensitivity* gives ranks in proportion to the mean of |W ∘ G|, as GoRA does. Only the benchmark computes it.
- *forgetting* is the rise of the loss on Python code and English prose, which no model was fine-tuned on.

```bash
python benchmarks/quality.py regimes benchmarks/results/regimes/base-12l.csv benchmarks/results/regimes/smollm2.csv
python docs/generate.py
python docs/pictures.py
```
"""


def make_method_table() -> str:
    """Return the methods as a table in Markdown."""
    lines = ["| method | reads | chooses among | the score |", "|---|---|---|---|"]
    for method in METHODS.values():
        lines.append(f"| `{method.name}` | {method.reads} | {', '.join(method.units)} | {method.summary} |")
    return "\n".join(lines)


def fill(text: str, begin: str, part: str) -> str:
    """Return the text of a page with ``part`` between its marks, the first of which is ``begin``."""
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(END)
    return f"{before}{begin}\n{part}\n{END}{after}"


def describe_type(annotation: Any) -> str:
    """Return what values of a field are, in words.

    Raises:
        KeyError: for a type that has no words yet.
    """
    if annotation == LayerName:
        return TYPES[LayerName]
    origin, parts = get_origin(annotation), [part for part in get_args(annotation) if part is not type(None)]
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in parts)
    if origin in (Union, UnionType):
        return " or ".join(describe_type(part) for part in parts)
    if origin is list:
        return f"list of {describe_type(parts[0])}s"
    if isinstance(annotation, type) and issubclass(annotation, Block):
        return "mapping"
    return TYPES[annotation]


def make_keys() -> str:
    """Return docs/reference-keys.md as the settings say it."""
    parts = [KEYS_HEAD]
    for title, (block, text) in BLOCKS.items():
        lines = [
            f"## {title}",
            "",
            f"`{block.path}`. {text}",
            "",
            "| key | takes | default | meaning |",
            "|---|---|---|---|",
        ]
        for name, field in block.model_fields.items():
            bounds = [
                f"{words} {getattr(bound, attribute)}"
                for bound in field.metadata
                for kind, (words, attribute) in BOUNDS.items()
                if type(bound) is kind
            ]
            takes = ", ".join([describe_type(field.annotation), *bounds])
            default = "required" if field.is_required() else "–" if field.default is None else f"`{field.default}`"
            lines.append(f"| `{name}` | {takes} | {default} | {escape_cell(field.description or '')} |")
        parts.append("\n".join(lines) + "\n")
    lines = [
        "## Keys that some methods read",
        "",
        "A key that the method does not read is named in a warning and has no effect.",
        "",
    ]
    lines += ["| method | reads |", "|---|---|"]
    for method in METHODS.values():
        lines.append(f"| `{method.name}` | {', '.join(f'`{key}`' for key in method.keys) or 'none of them'} |")
    return "\n".join([*parts, "\n".join(lines) + "\n"])


def escape_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def make_commands() -> str:
    """Return docs/reference-commands.md as the commands' own helps say it."""
    group = typer.main.get_group(app)
    parts = [COMMANDS_HEAD, make_command("axolotl-layersel", group, {})]
    for registered, (name, command) in zip(app.registered_commands, group.commands.items()):
        assert registered.callback is not None and registered.callback.__name__ == name
        # Click does not keep the helps of arguments, which are not options.
        parameters = get_params_from_function(registered.callback)
        helps = {key: parameter.default.help for key, parameter in parameters.items() if key != "context"}
        parts.append(make_command(f"axolotl-layersel {name}", command, helps))
    return "\n".join(parts)


def make_command(name: str, command: Any, helps: dict[str, str]) -> str:
    """Return the section of one command, in Markdown. ``helps``: of its parameters, by their names."""
    with command.make_context(name, [], resilient_parsing=True) as context:
        usage = " ".join(command.collect_usage_pieces(context))
    text = " ".join((command.help or "").split())
    lines = [
        f"## {name}",
        "",
        text,
        "",
        "```text",
        f"{name} {usage}",
        "```",
        "",
        "| | meaning | default |",
        "|---|---|---|",
    ]
    for param in command.params:
        shown = param.make_metavar(context) if param.param_type_name == "argument" else ", ".join(param.opts)
        choices = getattr(param.type, "choices", ())
        names = ", ".join(describe_default(choice) for choice in choices)
        values = f" One of {names}." if names and not param.metavar else ""  # a help with a name of its own lists them
        default = "required" if param.required else describe_default(param.default)
        lines.append(f"| `{shown}` | {escape_cell((helps.get(param.name) or param.help) + values)} | {default} |")
    return "\n".join(lines) + "\n"


def describe_default(value: Any) -> str:
    return "" if value is None or value is False else f"`{getattr(value, 'value', value)}`"


def load_cases() -> dict[str, Callable[[], str]]:
    """Return the files of the tests that are refused, as functions that return each one's message, by name."""
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))
    from helpers import refused_files

    from axolotl_layersel.training.ending import describe_error

    def refuse(values: dict) -> str:
        try:
            refused_files.check(values)
        except ValueError as error:
            return describe_error(error)
        raise AssertionError(f"{values} is not refused")

    return {name: lambda values=values: refuse(values) for name, (values, _) in refused_files.CASES.items()}


def make_messages() -> str:
    """Return the messages for files that are refused, by the block that they are about, in Markdown."""
    headings = {block.path: f"### `{block.path}`" for block, _ in reversed(BLOCKS.values())}
    groups: dict[str, list[str]] = {"": []} | {path: [] for path in headings}
    for message in sorted({refuse() for refuse in load_cases().values()}, key=str.lower):
        place = next((path for path in headings if re.match(rf"{re.escape(path)}[.:]", message)), "")
        escaped = re.sub(r"([\\[<*])", r"\\\1", message)
        groups[place].append(f"- {escaped}")
    lines = []
    for path in ["", *list(headings)[::-1]]:
        if groups[path]:
            lines += [headings.get(path, "### The rest of the file"), "", *groups[path], ""]
    return "\n".join(lines).rstrip()


def make_reader_table() -> str:
    """Return the programs that adapters are exported for as a table in Markdown."""
    lines = ["| `--for` | program | its rules were seen in |", "|---|---|---|"]
    lines += [f"| `{reader.name}` | {reader.title} | {reader.seen} |" for reader in READERS.values()]
    return "\n".join(lines)


def make_size_table() -> str:
    """Return the sizes of three adapters of a 70B model in each layout as a table in Markdown."""
    lines = [f"| adapter | {' | '.join(f'`{layout}`' for layout in LAYOUTS)} |", "|---" * (1 + len(LAYOUTS)) + "|"]
    modules = [(f"model.layers.{layer}.{name}", size) for layer in range(LARGE_LAYERS) for name, size in LARGE.items()]
    for title, ranks in LARGE_RANKS.items():
        turns = [ranks[number % len(ranks)] for number in range(len(modules))]
        factors = {
            name: Factors(make_shape(rank, inputs), make_shape(outputs, rank))
            for (name, (inputs, outputs)), rank in zip(modules, turns)
            if rank
        }
        sizes = []
        for layout in LAYOUTS:
            rank = round_for_kernels(max(turns)) if layout == "full" else None
            tensors, _ = lay_out(factors, {}, LoraConfig(), layout, None, LARGE_LAYERS, rank)
            sizes.append(f"{sum(tensor.nbytes for tensor in tensors.values()) / 1e6:,.0f} MB")
        lines.append(f"| {title} | {' | '.join(sizes)} |")
    return "\n".join(lines)


def make_shape(rows: int, columns: int) -> torch.Tensor:
    """Return a matrix in bf16 without values."""
    return torch.empty(rows, columns, dtype=torch.bfloat16, device="meta")


def make_support_table(entries: list[dict], kind: str) -> str:
    """Return the results of every row and method as a table in Markdown.

    Raises:
        ValueError: if one test shows that something works, and another that it is refused.
    """
    tested: dict[str, set[str]] = {}
    refused: dict[str, dict[str, str]] = {}
    for entry in entries:
        tested.setdefault(entry["row"], set()).update(entry["tested"])
        refused.setdefault(entry["row"], {}).update(entry["refused"])
    notes: list[str] = []
    lines = [f"| {kind} | {' | '.join(f'`{column}`' for column in COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row in sorted(tested, key=str.lower):
        both = tested[row] & set(refused[row])
        if both:
            raise ValueError(f"{kind} {row}: tests disagree on {', '.join(sorted(both))}")
        cells = []
        for column in COLUMNS:
            if column in refused[row]:
                message = refused[row][column]
                notes += [] if message in notes else [message]
                cells.append(f"no ({notes.index(message) + 1})")
            else:
                cells.append("yes" if column in tested[row] else "?")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    sentences = [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    return "\n".join([*lines, "", *sentences]).rstrip()


def make_survey(entries: list[dict]) -> str:
    """Return in Markdown in how many classes of transformers layers are found, and which are refused and why."""
    lines = ["| classes | tried | layers found | refused | not built |", "|---|---|---|---|---|"]
    reasons: dict[str, list[str]] = {}
    unbuilt: set[str] = set()
    for entry in entries:
        refused, lacking = entry["refused"], entry["unbuilt"]
        tried = entry["found"] + len(refused) + len(lacking)
        lines.append(f"| {entry['row']} | {tried} | {entry['found']} | {len(refused)} | {len(lacking)} |")
        for name, reason in refused.items():
            reasons.setdefault(reason, []).append(name)
        unbuilt |= set(lacking)
    told = [
        f"- {reason}: {', '.join(f'`{name}`' for name in dict.fromkeys(names))}" for reason, names in reasons.items()
    ]
    names = ", ".join(f"`{name}`" for name in sorted(unbuilt))
    return "\n".join([*lines, "", REFUSED, "", *told, "", f"{UNBUILT} {names}."])


def make_support() -> str:
    """Return the text of docs/support.md, made from docs/support.json."""
    entries = [entry for shown in json.loads(SHOWN.read_text()).values() for entry in shown]
    parts = [HEAD]
    for kind, (title, text) in TABLES.items():
        table = make_support_table([entry for entry in entries if entry["table"] == kind], kind)
        parts.append(f"## {title}\n\n{text}\n\n{table}\n")
    survey = make_survey([entry for entry in entries if entry["table"] == "architecture"])
    parts.append(f"## Architectures\n\n{SURVEYED}\n\n{survey}\n")
    return "\n".join(parts)


def make_regimes() -> str:
    """Return the text of docs/results-by-regime.md, made from the runs in benchmarks/results/regimes."""
    runs = [run for path in sorted(RUNS.glob("*.csv")) for run in read_runs(path)]
    return "\n".join([REGIMES_HEAD, *describe_regimes(runs, RIVALS, "images/regimes")])


def make_pages() -> dict[Path, str]:
    """Return what each page that is made here, or has a part that is, must hold."""
    return {
        SELECTION: fill(SELECTION.read_text(), METHOD_TABLE, make_method_table()),
        MESSAGES: fill(MESSAGES.read_text(), MESSAGE_LISTS, make_messages()),
        SERVING: fill(fill(SERVING.read_text(), READER_TABLE, make_reader_table()), SIZE_TABLE, make_size_table()),
        KEYS: make_keys(),
        COMMANDS: make_commands(),
        REGIMES: make_regimes(),
        SUPPORT: make_support(),
    }


if __name__ == "__main__":
    for path, text in make_pages().items():
        path.write_text(text)
