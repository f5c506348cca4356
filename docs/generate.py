"""Write the parts of the documentation that follow from code and test results: ``python docs/generate.py``."""

import json
from pathlib import Path

from axolotl_layersel.config.methods import METHODS

DOCS = Path(__file__).parent
README, SUPPORT, SHOWN = DOCS.parent / "README.md", DOCS / "support.md", DOCS / "support.json"
BEGIN, END = "<!-- The table of methods is made by docs/generate.py. -->", "<!-- End of the table of methods. -->"
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
    "All classes for text in the mappings of transformers. Each was built from its default configuration with few "
    'layers, on the meta device. "Found" means that the layers, the shape that a plan records and the lowest layer '
    "that trains are found, with LoRA in each list of layers. Nothing was trained or scored."
)
REFUSED = "Refused with these messages, shortened; `it` is the class and `n` a number:"
UNBUILT = (
    "Not built, because the defaults lack a setting that transformers needs, a library is missing, or the class has no "
    "linear module in a list of modules for LoRA:"
)
HEAD = """# Tested models, trainers and adapters

<!-- Made by docs/generate.py from docs/support.json, which `pytest --write-support` writes. -->

These tables are made from the results of this project's tests. A test fails if its result is not in them.

- **yes**: a test shows that it works, as described above the table. `l1ra` has its default rule.
- **no**: it is refused with the message in the note below the table.
- **?**: no test covers it. Models, trainers and adapters without a row are not tested either.

All tests ran on a CPU. [The README](../README.md#engines) describes the engines.
"""


def make_method_table() -> str:
    """Return the methods as a table in Markdown."""
    rows = [
        f"| `{method.name}` | {method.reads} | {', '.join(method.units)} | {method.summary} |"
        for method in METHODS.values()
    ]
    return "\n".join(["| method | reads | chooses among | the score |", "|---|---|---|---|", *rows])


def fill(text: str) -> str:
    """Return the text of the README with the current table of methods between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{make_method_table()}\n{END}{after}"


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


if __name__ == "__main__":
    README.write_text(fill(README.read_text()))
    SUPPORT.write_text(make_support())
