"""The section "Layer selection" of a model card.

It is appended to the card of PEFT, Axolotl or TRL, whose fields and text stay as they are, and replaced when the card
is written again. It names no path of this machine, because the card is pushed to the hub.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from axolotl_layersel.common.files import write_atomically
from axolotl_layersel.common.paths import plan_path
from axolotl_layersel.common.tables import arrange
from axolotl_layersel.common.terminal import clean
from axolotl_layersel.config.methods import METHODS
from axolotl_layersel.config.textual import PLUGIN
from axolotl_layersel.lora.readers import AdapterFile, find_vllm_rank
from axolotl_layersel.reports.outcome import (
    Outcome,
    describe_choice,
    describe_parameters,
    describe_ranks,
    describe_readers,
    describe_scaling,
    list_merge_options,
    name_ranked,
)
from axolotl_layersel.reports.savings import describe_savings, describe_step_time
from axolotl_layersel.selection.plan import Plan

CARD = "README.md"
BEGIN, END = "<!-- axolotl-layersel: begin -->", "<!-- axolotl-layersel: end -->"
SECTION = re.compile(rf"\n*{re.escape(BEGIN)}.*?{re.escape(END)}\n*", re.DOTALL)
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
PROJECT = "https://github.com/axolotl-layersel/axolotl-layersel"
PLAN_FILE = plan_path("").as_posix()


@dataclass(frozen=True)
class Recipe:
    """What a reader of the card needs to make the choice again.

    Attributes:
        block: the ``layersel`` block.
        seed: the run's.
        versions: of the packages that the choice depends on.
    """

    block: Mapping[str, Any]
    seed: int
    versions: Mapping[str, str]


def complete_card(folder: Path, section: str) -> None:
    """Put ``section`` at the end of the model card in ``folder``, if there is one, in place of an earlier section.

    Raises:
        LayerselError: if the card cannot be written.
        OSError: if it cannot be read.
    """
    path = folder / CARD
    if not path.is_file():
        return
    card = path.read_bytes().decode("utf-8")
    rest = SECTION.sub("\n\n", card).rstrip("\n")
    completed = f"{rest}\n\n{section}\n"
    if completed != card:
        write_atomically(path, completed.encode("utf-8"))


def describe_layers(outcome: Outcome, recipe: Recipe) -> str:
    """Return the section, in Markdown between its two markers."""
    parts = [
        "## Layer selection",
        describe_origin(outcome.plan),
        "\n".join(f"- {fact}" for fact in list_facts(outcome)),
        *make_rank_table(outcome.ranks, name_ranked(outcome)),
        *describe_recipe(outcome, recipe),
        *describe_use(outcome),
    ]
    return "\n\n".join([BEGIN, *parts, END])


# --- Parts ----------------------------------------------------------------------------------------------------------


def describe_origin(plan: Plan | None) -> str:
    """Return what decided where LoRA is, and from which rows."""
    made = f"[axolotl-layersel]({PROJECT})"
    if plan is None:
        return f"{made} moved rank between LoRA modules while this adapter trained (`l1ra`)."
    rows = len(plan.calibration_rows)
    # In the words of the plan's settings, so that the reader finds them there.
    looked = METHODS[plan.method].needs_data if plan.method in METHODS else bool(rows)
    source = f" from {rows} rows" if looked and rows else ""
    if source and plan.dataset_fingerprint:  # None if rows are not tokenised
        source += f", whose tokens have the hash `{plan.dataset_fingerprint}`"
    text = f"{made} chose where this adapter has LoRA, by method `{plan.method}`{source}."
    return f"{text} `{PLAN_FILE}` has the scores and the numbers of the rows." if source else text


def list_facts(outcome: Outcome) -> list[str]:
    """Return the layers, the ranks, the parameters, the length of the backward pass, and the time of a step."""
    facts = [f"{capitalise(clean(describe_choice(outcome.plan)))}."] if outcome.plan else []
    ranks = describe_ranks(outcome)
    if ranks:
        facts.append(f"{capitalise(ranks)}.")
    scaling = describe_scaling(outcome.plan) if outcome.plan else ""
    if scaling:
        facts.append(f"{capitalise(scaling)}.")
    if outcome.parameters is not None:
        facts.append(f"{capitalise(describe_parameters(outcome.parameters))}.")
    if outcome.plan is not None:
        facts.append(f"{capitalise(describe_savings(outcome.plan))}.")
    if outcome.plan is not None and outcome.plan.step_time is not None:
        facts.append(f"{capitalise(describe_step_time(outcome.plan.step_time))}.")
    return facts


def make_rank_table(ranks: Mapping[str, int], what: str) -> list[str]:
    """Return the ranks by layer (rows) and type of module (columns) as a folded table; nothing if all are the same.

    ``what``: what has a rank, such as ``module``.
    """
    if len(set(ranks.values())) < 2:
        return []
    rows, kinds = arrange(ranks)
    cells: dict[str, list[str]] = {}
    for layer, row in rows.items():
        cells[layer] = [str(ranks[row[kind]]) if kind in row else "" for kind in kinds]
    lines = [make_line(["layer", *kinds]), make_line(["---:"] * (1 + len(kinds)))]
    lines += [make_line([layer, *cells[layer]]) for layer in cells]
    return [f"<details><summary>The rank of every {what}</summary>", "\n".join(lines), "</details>"]


def make_line(cells: list[str]) -> str:
    return f"| {' | '.join(clean(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def describe_recipe(outcome: Outcome, recipe: Recipe) -> list[str]:
    """Return how to make the choice again."""
    selection = recipe.block.get("selection")
    block = dict(recipe.block)
    if selection and selection.get("plan"):
        # The path of another machine; the plan is next to this card.
        block["selection"] = {**selection, "plan": PLAN_FILE}
    content = {"plugins": [PLUGIN], "seed": recipe.seed, "layersel": block}
    made = ", ".join(f"{name} {version}" for name, version in recipe.versions.items())
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    lead = "This part of the Axolotl YAML file asked for it:"
    said = ["### Reproduce it", lead, f"```yaml\n{text}```", f"It was made with {made}."]
    if outcome.plan is not None:
        said.append(f"`layersel.selection.plan: {PLAN_FILE}` applies the same choice without making it again.")
    return said


def describe_use(outcome: Outcome) -> list[str]:
    """Return who reads the adapter, and the commands to serve and export it."""
    file, readers = outcome.file, outcome.readers
    if file is None or readers is None:
        return []
    said = ["### Serve and export it", " ".join(describe_readers(readers))]
    commands = []
    if readers.has_vllm:
        rank = find_vllm_rank(file.highest)
        commands.append(
            f"vllm serve {find_hub_name(file)} --enable-lora --max-lora-rank {rank} --lora-modules NAME=ADAPTER"
        )
    if readers.export_for:
        commands.append(f"axolotl-layersel export ADAPTER --for {readers.export_for}   # or another program")
    commands.append(" ".join(["axolotl merge-lora CONFIG.yml --lora-model-dir ADAPTER", *list_merge_options(file)]))
    said.append("```bash\n" + "\n".join(map(clean, commands)) + "\n```")
    return said


def find_hub_name(file: AdapterFile) -> str:
    """Return the hub name of the base model, or a placeholder where it is a folder, whose path nobody else has."""
    name = file.base_model or ""
    return name if HUB_NAME.fullmatch(name) and not Path(name).exists() else "BASE_MODEL"


def capitalise(text: str) -> str:
    """Return text with a capital first letter; the others stay."""
    return text[:1].upper() + text[1:]
