"""What a run has come to, from its plan, its ranks and its adapter: the facts that several reports show."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from axolotl_layersel.common.paths import plan_path, ranks_path
from axolotl_layersel.common.terminal import enumerate_words
from axolotl_layersel.config.layer_names import LayerName, split_name, split_place
from axolotl_layersel.l1ra.records import RankHistory
from axolotl_layersel.lora.readers import AdapterFile, Readers, find_readers, read_adapter_file
from axolotl_layersel.selection.plan import Parameters, Plan
from axolotl_layersel.selection.plan_file import read_plan

MILLION = 1_000_000
LONGEST_LIST = 40  # characters; longer lists of layers are cut, and the plan has them
STATES = {"remove": "without an adapter", "freeze": "frozen"}  # the state of unselected layers and modules


@dataclass(frozen=True)
class Outcome:
    """A run, or one of its checkpoints.

    Attributes:
        plan: None without a selection.
        history: the ranks by step; None without ``l1ra``.
        file: the adapter's files; None if there are none.
    """

    plan: Plan | None
    history: RankHistory | None
    file: AdapterFile | None

    @property
    def trained(self) -> set[str]:
        """The LoRA modules in the adapter's file that the run trained."""
        present = set(self.file.sizes) if self.file else set()
        if self.plan is None or self.plan.unselected == "remove":
            return present
        return present & {*self.plan.modules, *self.plan.modules_outside}

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each linear module that was trained, in the model's order: in the file, or by the plan."""
        if self.file is None:
            return dict(self.plan.ranks) if self.plan else {}
        trained = self.trained
        known = [*(self.history.ranks[0] if self.history else ()), *(self.plan.modules if self.plan else ())]
        names = dict.fromkeys([*known, *self.file.ranks])
        return {name: self.file.ranks[name] for name in names if name in trained and name in self.file.ranks}

    @property
    def parameters(self) -> Parameters | None:
        """The LoRA parameters that train, after rank moved, and those of plain LoRA; None if they are unknown."""
        planned = self.plan.parameters if self.plan else None
        if self.history is None or self.file is None:
            return planned
        sizes, before = self.file.sizes, self.history.ranks[0]
        trained = sum(sizes[name] for name in self.trained)
        if planned is not None:
            return Parameters(plain=planned.plain, trained=trained)
        # The rank of modules that the history does not name, such as experts, does not move.
        moved = {name: rank for name, rank in before.items() if self.file.ranks.get(name)}
        plain = sum(size for name, size in sizes.items() if name in self.trained and name not in moved)
        plain += sum(sizes[name] // self.file.ranks[name] * rank for name, rank in moved.items())
        return Parameters(plain=plain, trained=trained)

    @property
    def readers(self) -> Readers | None:
        """The programs that read the adapter's files; None without files."""
        if self.file is None:
            return None
        paths = split_place(self.plan.stack) if self.plan else {}
        names = [split_name(choice.layer) for choice in self.plan.layers] if self.plan else []
        return find_readers(self.file, [f"{paths[side]}.{number}" for side, number in names])


def read_outcome(folder: Path) -> Outcome:
    """Return what the run in ``folder`` has come to.

    Raises:
        LayerselError: if a file of it is missing or damaged.
    """
    plan = read_plan(plan_path(folder), key="output_dir") if plan_path(folder).exists() else None
    history = RankHistory.read(folder) if ranks_path(folder).exists() else None
    return Outcome(plan, history, read_adapter_file(folder))


def list_merge_options(file: AdapterFile) -> list[str]:
    """Return the options of ``axolotl merge-lora`` that an adapter needs: one method of it knows LoRA on experts."""
    return ["--merge-method legacy"] if file.has_experts else []


# --- Words ----------------------------------------------------------------------------------------------------------


def describe_choice(plan: Plan) -> str:
    """Return which layers or modules are kept, and what becomes of the others, as a sentence without a full stop."""
    selected, total = len(plan.selected), len(plan.layers)
    kept, others = count_of(selected, total, "layers"), ""
    if selected < total:
        kept, others = f"{kept} ({cut_list(join_layers(plan.selected))})", "the others"
    if plan.granularity != "layer":
        modules, all_modules = len(plan.modules), len(plan.module_scores)
        # A method without scores does not record the modules that it leaves out.
        count = count_of(modules, all_modules, "LoRA modules") if all_modules else f"{modules} LoRA modules"
        others = "the others" if modules < all_modules else "the other layers" if selected < total else ""
        kept = f"{count}, in {kept}"
    return f"method {plan.method} keeps {kept}" + (f"; {others} are {STATES[plan.unselected]}" if others else "")


def count_of(part: int, total: int, what: str) -> str:
    """Return ``part`` of ``total`` in words."""
    return f"all {total} {what}" if part == total else f"{part} of {total} {what}"


def describe_ranks(outcome: Outcome) -> str:
    """Return the ranks of the trained modules in words, or nothing without any."""
    found, what = sorted(set(outcome.ranks.values())), name_ranked(outcome)
    if not found:
        return ""
    words = f"rank {found[0]} in every {what}" if len(found) == 1 else f"ranks from {found[0]} to {found[-1]}"
    return words if outcome.history is None else f"{words} after l1ra"


def describe_scaling(plan: Plan) -> str:
    """Return how the scaling of modules follows their rank, as a sentence without a full stop; nothing if it does not.

    The scaling is that of training; an adapter of ``l1ra`` has it folded in.
    """
    if not plan.scaling_exponent:
        return ""
    lora_r = (plan.budget and plan.budget.lora_r) or "lora_r"
    power = "" if plan.scaling_exponent == 1 else f"^{plan.scaling_exponent:g}"
    return f"in training a module of rank r has the scaling of plain LoRA times ({lora_r} / r){power}"


def name_ranked(outcome: Outcome) -> str:
    """Return the word for what ``outcome.ranks`` names, which leaves out experts."""
    return "linear module" if outcome.file and outcome.file.has_experts else "module"


def describe_parameters(parameters: Parameters) -> str:
    """Return the trained parameters next to plain LoRA's, as a sentence without a full stop."""
    plain, trained = parameters.plain, parameters.trained
    if plain >= MILLION:
        numbers, unit = [f"{count / MILLION:.2f}" for count in (trained, plain)], " million"
    else:
        numbers, unit = [f"{count:,}" for count in (trained, plain)], ""
    if trained > plain:
        return f"{numbers[0]}{unit} LoRA parameters train, and plain LoRA has {numbers[1]}{unit}"
    if numbers[0] == numbers[1]:
        return f"{numbers[0]}{unit} LoRA parameters train, as many as plain LoRA has"
    return f"{numbers[0]} of plain LoRA's {numbers[1]}{unit} parameters train"


def describe_readers(readers: Readers) -> list[str]:
    """Return sentences about the programs that read an adapter as it is, and those that would compute otherwise."""
    verb = "reads" if len(readers.right) == 1 else "read"
    said = [f"{enumerate_words(readers.right)} {verb} the adapter as it is."]
    if readers.misscaling:
        said.append(f"{enumerate_words(readers.misscaling)} would scale it wrongly without an error.")
    if readers.dropping:
        what = "all of it" if readers.drops_all else enumerate_words(readers.dropped)
        said.append(f"{enumerate_words(readers.dropping)} leave out {what}, because some layers lack it.")
    return said


def join_layers(names: Sequence[LayerName]) -> str:
    """Return names of layers, with ranges such as ``4-7`` for three or more in a row."""
    runs: list[list[LayerName]] = []
    for name in names:
        side, number = split_name(name)
        if runs and (side, number - 1) == split_name(runs[-1][-1]):
            runs[-1].append(name)
        else:
            runs.append([name])
    parts: list[str] = []
    for run in runs:
        parts += [f"{run[0]}-{split_name(run[-1])[1]}"] if len(run) > 2 else [str(name) for name in run]
    return ", ".join(parts)


def cut_list(text: str) -> str:
    """Return a list of layers, cut after one of them if it is long."""
    return text if len(text) <= LONGEST_LIST else f"{text[:LONGEST_LIST].rpartition(', ')[0]}, ..."
