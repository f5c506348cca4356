"""Write the parts of the documentation that the code and the tests know better: ``python docs/generate.py``."""

import json
from pathlib import Path

from axolotl_layersel.config.methods import METHODS

DOCS = Path(__file__).parent
README, SUPPORT, SHOWN = DOCS.parent / "README.md", DOCS / "support.md", DOCS / "support.json"
BEGIN, END = "<!-- The table of methods is made by docs/generate.py. -->", "<!-- End of the table of methods. -->"
COLUMNS = [*METHODS, "l1ra"]
CHOSEN = (
    "A method chose, all layers with LoRA had finite scores that tell them apart, and LoRA was in the chosen layers "
    "alone afterwards. For `l1ra` rank moved while the model trained, and stock PEFT computes with the saved adapter "
    "what the model computed."
)
TABLES = {
    "model": (
        "Models",
        "Small random models of each family, with a plain `transformers.Trainer` on one process. Of encoders the row "
        f"says what they are trained for. {CHOSEN} In encoders `cka` has no score for the lowest layer, whose first "
        "token is the same in all rows, and `gradient` need not tell layers apart: labels there follow from nothing.",
    ),
    "trainer": (
        "Trainers",
        "Whole runs of Axolotl on one process with each trainer and kind of data. In each run all methods that are not "
        "refused chose, with finite scores that tell layers apart, and nothing was changed by it. Then the choice by "
        "`cka`, or where that is refused a plan that a run of SFT had left, was applied, and the model trained with "
        "`l1ra`: rank moved, the adapter was in the chosen layers alone, and stock PEFT computes with it what the "
        "model computed.",
    ),
    "adapter": (
        "Kinds of adapter",
        f"A small random Llama with each kind of adapter, with a plain `transformers.Trainer` on one process. {CHOSEN}",
    ),
}
SURVEYED = (
    "All classes of transformers that its mappings have for text, each built from the defaults of its configuration, "
    "but with few layers, without memory for weights. In those found, the layers, the shape that a plan records and "
    "the lowest layer that trains are found, with LoRA in each list of layers; nothing was trained or scored."
)
REFUSED = "Refused, in these sentences (without their details), where `it` is the class and `n` a number:"
UNBUILT = (
    "Not built: the defaults leave out what transformers itself needs, a library is missing, or PEFT has no linear "
    "module in a list of modules to put LoRA on."
)
HEAD = """# What is known to work

<!-- Made by docs/generate.py from docs/support.json, which `pytest --write-support` writes. -->

These tables are made from the results of this project's tests, and a test whose result is not in them fails.

- **yes**: a test shows what is said above the table. `l1ra` has its default rule.
- **no**: it is refused, in one sentence, which the note below the table gives.
- **?**: there is no test of it, so nothing is known. Nor is it of what has no row.

All of it ran on a CPU. The engines are another matter, which [the README](../README.md#engines) is about.
"""


def make_method_table() -> str:
    """Return the methods as a table in Markdown."""
    rows = [
        f"| `{method.name}` | {method.reads} | {', '.join(method.units)} | {method.summary} |"
        for method in METHODS.values()
    ]
    return "\n".join(["| method | reads | chooses among | the score |", "|---|---|---|---|", *rows])


def fill(text: str) -> str:
    """Return the text of the README with the table of methods between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{make_method_table()}\n{END}{after}"


def make_support_table(entries: list[dict], kind: str) -> str:
    """Return what is known of every row of a table by every method, in Markdown.

    Raises:
        ValueError: where one test has shown that something works, and another that it is refused.
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
    """Return in how many classes of transformers layers are found, and which are refused and why, in Markdown."""
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
    """Return docs/support.md as docs/support.json has it."""
    entries = [entry for shown in json.loads(SHOWN.read_text()).values() for entry in shown]
    parts = [HEAD]
    for kind, (title, text) in TABLES.items():
        table = make_support_table([entry for entry in entries if entry["table"] == kind], kind)
        parts.append(f"## {title}\n\n{text}\n\n{table}\n")
    survey = make_survey([entry for entry in entries if entry["table"] == "architecture"])
    parts.append(f"## Architectures\n\n{SURVEYED}\n\n{survey}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    README.write_text(fill(README.read_text()))
    SUPPORT.write_text(make_support())
