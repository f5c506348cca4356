"""What is wrong with a plan: in itself, beside a YAML block, and beside a model; each a list, the most important first.

Nothing here imports torch, so that ``show`` answers at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.layer_names import (
    ENCODER_DECODER,
    STACKS,
    VISION,
    LayerName,
    Place,
    are_all,
    find_layer,
    format_names,
    split_place,
)
from axolotl_layersel.config.methods import METHODS
from axolotl_layersel.config.selection import (
    HIGHEST_RANK,
    MAX_RANK_FACTOR,
    ResolvedSelection,
    SelectionConfig,
    count_share,
    find_budget,
)
from axolotl_layersel.config.strict_block import Block, quote

if TYPE_CHECKING:
    from axolotl_layersel.selection.plan import Budget, Plan

# The keys of the block, by what they change: where LoRA is, how much of it, what it was chosen on.
KEYS = (
    "method",
    "stacks",
    "layers",
    "candidates",
    "granularity",
    "num_layers",
    "num_units",
    "ratio",
    "keep",
    "unselected",
    "outside_layers",
    "rank_allocation",
    "budget",
    "budget_parameters",
    "min_rank",
    "max_rank",
    "flexora",
    "token",
    "seed",
    "num_samples",
)
# Fields of a plan that repeat what is in its settings.
REPEATED = ("method", "granularity", "unselected", "outside_layers")
# More problems of a file's form than this are counted only.
SHOWN_PROBLEMS = 8


# --- The plan by itself -------------------------------------------------------------------------------------------


def list_problems(error: ValidationError) -> list[str]:
    """Return what in a file is not of a plan's form, with the place of each; of many the first ones and their count."""
    found = [
        (".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, ").rstrip("."))
        for problem in error.errors()
    ]
    told = list(dict.fromkeys(f"{place}: {message}" if place else message for place, message in found))
    rest = len(told) - SHOWN_PROBLEMS
    return [*told[:SHOWN_PROBLEMS], f"{rest} more"] if rest > 1 else told


def list_contradictions(plan: Plan) -> list[str]:
    """Return in what parts of ``plan`` contradict each other."""
    settings, faults = read_settings(plan)
    faults = [*list_layer_faults(plan), *faults]
    if settings is not None:
        faults += list_setting_faults(plan, settings)
    faults += list_module_faults(plan)
    if settings is not None:
        faults += list_rank_faults(plan, settings) + list_row_faults(plan, settings)
    return faults


def read_settings(plan: Plan) -> tuple[ResolvedSelection | None, list[str]]:
    """Return the settings of a plan as they take effect, or None and what no ``selection`` block can hold in them."""
    try:
        return plan.resolve_settings(), []
    except ValidationError as error:
        return None, [fault.replace(f"{SelectionConfig.path}.", "settings.") for fault in list_problems(error)]


def choose_true(*checks: tuple[object, str]) -> list[str]:
    """Return the faults of those pairs whose condition holds."""
    return [fault for holds, fault in checks if holds]


def list_layer_faults(plan: Plan) -> list[str]:
    """Return what is wrong with the list of layers."""
    names = [choice.layer for choice in plan.layers]
    known = set(names)
    seeds = plan.stability.selected.values() if plan.stability else ()
    return choose_true(
        (
            not are_all(names, plan.stack),
            f"`layers` does not list every layer at {describe_place(plan.stack)} once, in order",
        ),
        (not plan.selected, "`layers` selects none"),
        (not known.issuperset(plan.unscored), "`unscored` names layers that `layers` does not list"),
        (
            not all(known.issuperset(layers) for layers in seeds),
            "`stability` names layers that `layers` does not list",
        ),
    )


def list_setting_faults(plan: Plan, settings: ResolvedSelection) -> list[str]:
    """Return where a plan is not what its settings ask for. How many layers they ask for is not compared."""
    faults = []
    for key in REPEATED:
        value, asked = getattr(plan, key), getattr(settings, key)
        if value != asked:
            faults.append(f"`{key}` is {quote(value)}, and settings.{key} {quote(asked)}")
    if plan.settings.get("seed") not in (None, plan.seed):
        faults.append(f"`seed` is {plan.seed}, and settings.seed {quote(plan.settings['seed'])}")
    sides = tuple(split_place(plan.stack))
    allowed = [("",), ENCODER_DECODER] if settings.stacks == "language" else [STACKS[settings.stacks]]
    if sides not in allowed:
        faults.append(f"`stack` is {quote(plan.stack)}, and settings.stacks {quote(settings.stacks)}")
    if settings.layers is not None and plan.selected != settings.layers:
        faults.append(f"`layers` selects {format_names(plan.selected)}, and settings.layers is {settings.layers}")
    outside = [name for name in plan.selected if settings.candidates is not None and name not in settings.candidates]
    if outside:
        faults.append(f"`layers` selects {format_names(outside)}, which are not among settings.candidates")
    tokens = {"": plan.token} if isinstance(plan.token, str) else plan.token or {}
    if settings.token not in ("auto", None):
        others = {token for side, token in tokens.items() if side != VISION and token != settings.token}
        faults += [
            f"`token` is {token!r}, and settings.token {settings.token!r}" for token in sorted(filter(None, others))
        ]
    return faults


def list_module_faults(plan: Plan) -> list[str]:
    """Return what is wrong with the modules that are kept, scored, or lie outside of the layers."""
    place, names = describe_place(plan.stack), {choice.layer for choice in plan.layers}
    outside = [name for tower in plan.outside for name in tower.modules]
    layers = {name: find_layer(plan.stack, name) for name in (*plan.modules, *plan.module_scores, *outside)}
    scored, scores = bool(plan.module_scores), plan.method not in METHODS or METHODS[plan.method].needs_data
    return choose_true(
        (
            {layers[name] for name in plan.modules} != set(plan.selected),
            f"`modules` is not of just the layers that are selected at {place}",
        ),
        (find_repeated(plan.modules), f"`modules` names {find_repeated(plan.modules)} twice"),
        (
            scored and not plan.module_scores.keys() >= set(plan.modules),
            "`modules` names modules that `module_scores` does not",
        ),
        (
            not names.issuperset(layers[name] for name in plan.module_scores),
            f"`module_scores` names modules that are in none of the layers at {place}",
        ),
        (scored and not scores, f"`module_scores` is given, and method {quote(plan.method)} gives none"),
        (
            scores and not scored and plan.granularity != "layer",
            f"`module_scores` is empty, and `granularity` {quote(plan.granularity)}",
        ),
        (find_repeated(outside), f"`outside` names {find_repeated(outside)} twice"),
        (any(layers[name] is not None for name in outside), "`outside` names modules of the layers"),
        (
            any(tower.trained > len(tower.modules) for tower in plan.outside),
            "`outside` counts more modules that train than it names",
        ),
    )


def list_rank_faults(plan: Plan, settings: ResolvedSelection) -> list[str]:
    """Return what is wrong with ranks and their budget."""
    given = {"ranks": bool(plan.ranks), "budget": plan.budget is not None}
    if settings.rank_allocation == "same":
        return [f"`{key}` is given, and settings.rank_allocation is 'same'" for key, has in given.items() if has]
    faults = [
        f"`{key}` is empty, and settings.rank_allocation {settings.rank_allocation!r}"
        for key, has in given.items()
        if not has
    ]
    if plan.ranks and plan.ranks.keys() != set(plan.modules):
        faults.append("`ranks` does not name just the modules that are in `modules`")
    lowest, highest = max(1, settings.min_rank or 0), find_highest_rank(plan, settings)
    for fault, ranks in (
        (f"less than {lowest}, the lowest", {name: rank for name, rank in plan.ranks.items() if rank < lowest}),
        (f"more than {highest}, the highest", {name: rank for name, rank in plan.ranks.items() if rank > highest}),
    ):
        if ranks:
            name, rank = next(iter(ranks.items()))
            faults.append(f"`ranks` gives {name} rank {rank}, {fault} of its settings{count_others(ranks)}")
    return faults + (list_budget_faults(plan.budget, settings) if plan.budget else [])


def find_highest_rank(plan: Plan, settings: ResolvedSelection) -> int:
    """Return the highest rank that a plan can give. Without ``max_rank`` it may be that of ``l1ra``, of any size."""
    lora_r = (plan.budget and plan.budget.lora_r) or 0
    return settings.max_rank or max(HIGHEST_RANK, MAX_RANK_FACTOR * lora_r)


def list_budget_faults(budget: Budget, settings: ResolvedSelection) -> list[str]:
    """Return what is wrong with the numbers of a budget."""
    allowed = find_budget(settings, budget.lora)
    return choose_true(
        (
            allowed != budget.allowed,
            f"`budget` allows {budget.allowed}, and its settings {allowed} of {budget.lora}",
        ),
        (
            budget.spent > budget.allowed,
            f"`budget` has {budget.spent} parameters spent of {budget.allowed} that are allowed",
        ),
        (budget.even > budget.spent, f"`budget` has {budget.even} parameters spent evenly of {budget.spent} in all"),
    )


def list_row_faults(plan: Plan, settings: ResolvedSelection) -> list[str]:
    """Return what is wrong with the rows that were looked at."""
    rows, most = [*plan.calibration_rows, *plan.rows_left_out], settings.num_samples
    return choose_true(
        (any(row < 0 for row in rows), "`calibration_rows` or `rows_left_out` has a negative row"),
        (
            find_repeated(rows) is not None,
            f"`calibration_rows` and `rows_left_out` have row {find_repeated(rows)} twice",
        ),
        (most is not None and len(rows) > most, f"{len(rows)} rows were drawn, and settings.num_samples is {most}"),
        (
            rows and not METHODS[settings.method].needs_data,
            f"rows were drawn, and method {quote(settings.method)} reads none",
        ),
    )


def find_repeated(values: Iterable[Hashable]) -> Any:
    """Return the first of ``values`` that is there more than once, None where none is."""
    return next((value for value, count in Counter(values).items() if count > 1), None)


def count_others(found: Collection[Any]) -> str:
    """Return how many more there are than the one that a message names."""
    return f" ({len(found)} such modules)" if len(found) > 1 else ""


def describe_place(place: Place) -> str:
    """Return where layers are, for messages."""
    return " and ".join(map(repr, split_place(place).values()))


# --- The plan beside the YAML block -------------------------------------------------------------------------------


def list_setting_differences(
    plan: Plan,
    settings: SelectionConfig,
    lora_r: int | None = None,
    room: int | None = None,
    rank_pattern: Mapping[str, int] | None = None,
) -> list[str]:
    """Return where a plan that is reused is not the one that a run asks for; keys left out contradict nothing.

    Args:
        plan: without contradictions.
        settings: the ``selection`` block.
        lora_r: the run's; None where it is not known.
        room: with ``l1ra``, the highest rank that it has room for.
        rank_pattern: ranks that the YAML file gives modules.
    """
    asked, made_with = settings.resolve(run_seed=plan.seed), plan.resolve_settings()
    differences = []
    for key in KEYS:
        if key == "rank_allocation":
            differences += list_lora_differences(plan, lora_r, room, rank_pattern)
        given = getattr(settings, key)
        if given is None:
            continue
        pairs = {key: (getattr(asked, key), getattr(made_with, key))}
        if isinstance(given, Block):
            parts = given.model_dump(exclude_none=True)
            pairs = {f"{key}.{part}": (value, getattr(made_with.flexora, part, None)) for part, value in parts.items()}
        differences += [
            f"{SelectionConfig.path}.{name}: {value!r} is not {describe_other(other)}"
            for name, (value, other) in pairs.items()
            if value != other
        ]
    return differences


def describe_other(value: Any) -> str:
    """Return what a plan was made with, for the end of a sentence."""
    return "in the settings that it was made with" if value is None else f"the {value!r} that it was made with"


def list_lora_differences(
    plan: Plan, lora_r: int | None, room: int | None, rank_pattern: Mapping[str, int] | None
) -> list[str]:
    """Return where ranks of a plan do not go with those of the run; see ``list_setting_differences``."""
    differences = []
    made_with = plan.budget.lora_r if plan.budget else None
    if made_with is not None and lora_r is not None and made_with != lora_r:
        differences.append(
            f"lora_r: {lora_r} is not the {made_with} for which it gave modules their ranks, which would stay while "
            "only their scaling changes"
        )
    if rank_pattern and plan.ranks:
        differences.append(f"lora_rank_pattern: {quote(rank_pattern)} gives modules ranks, and so does the plan")
    highest = max(plan.ranks, key=lambda name: plan.ranks[name], default=None)
    if highest is not None and room is not None and plan.ranks[highest] > room:
        differences.append(
            f"layersel.l1ra.max_rank: {room} is less than the rank {plan.ranks[highest]} that the plan gives {highest}"
        )
    return differences


# --- The plan beside the model ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelFacts:
    """What of a model with LoRA a plan speaks of.

    Attributes:
        place: where its layers are.
        names: of its layers.
        modules: the LoRA modules of each layer that carries any, by its name.
        outside: the LoRA modules outside of the layers.
        units: the modules of each unit that could be chosen; None where the model need not have all of them.
        costs: parameters of one rank of LoRA modules, of those at least that a plan gives a rank.
    """

    place: Place
    names: Sequence[LayerName]
    modules: Mapping[LayerName, list[str]]
    outside: Collection[str] = ()
    units: Sequence[Sequence[str]] | None = None
    costs: Mapping[str, int] = field(default_factory=dict)


def list_model_differences(plan: Plan, model: ModelFacts, settings: SelectionConfig | None = None) -> list[str]:
    """Return where a plan does not fit a model.

    Args:
        plan: without contradictions.
        model: that it is to be applied to.
        settings: the ``selection`` block, which may say how many units are kept.
    """
    return [
        *list_stack_differences(plan, model),
        *list_lora_places(plan, model),
        *list_unit_differences(plan, model, settings),
        *list_cost_differences(plan, model),
    ]


def list_stack_differences(plan: Plan, model: ModelFacts) -> list[str]:
    """Return where the layers of a model are not those of a plan."""
    planned, names = [choice.layer for choice in plan.layers], list(model.names)
    differences = []
    if len(planned) != len(names):
        differences.append(f"the plan has {len(planned)} layers, the model {len(names)}")
    if plan.stack != model.place:
        differences.append(
            f"the plan's layers are at {describe_place(plan.stack)}, the model's at {describe_place(model.place)}"
        )
    unknown = [name for name in planned if name not in set(names)]
    if unknown and len(planned) == len(names):
        differences.append(f"the plan has a layer {unknown[0]}, which the model has not")
    return differences


def list_lora_places(plan: Plan, model: ModelFacts) -> list[str]:
    """Return where a model has LoRA on other modules than a plan knows."""
    # Where modules were chosen one by one, the model must have all that could have been.
    known = set(plan.module_scores) or set(plan.modules)
    layers = {find_layer(plan.stack, name) for name in known}
    present = {name for layer in layers if layer is not None for name in model.modules.get(layer, [])}
    if plan.outside_layers == "keep":
        known |= set(plan.modules_outside)
        present |= set(model.outside)
    if plan.granularity != "layer" and not plan.module_scores:
        known |= present  # chosen without a score, of which the plan lists those that are kept alone
    missing, extra = sorted(known - present), sorted(present - known)
    differences = []
    if missing:
        differences.append(f"the model has no LoRA on {missing[0]} ({len(missing)} such modules)")
    if extra:
        differences.append(f"the model has LoRA on {extra[0]}, unknown to the plan ({len(extra)} such modules)")
    return differences


def list_unit_differences(plan: Plan, model: ModelFacts, settings: SelectionConfig | None) -> list[str]:
    """Return where a plan keeps part of a unit, or another number of them than the YAML block says."""
    if model.units is None:
        return []
    modules = set(plan.modules)
    kept = [unit for unit in model.units if not modules.isdisjoint(unit)]
    torn = next((unit for unit in kept if not modules.issuperset(unit)), None)
    differences = []
    if torn is not None and plan.granularity != "layer":
        lacking = next(name for name in torn if name not in modules)
        differences.append(
            f"the plan keeps modules of a {plan.granularity} without {lacking}, and granularity: {plan.granularity} "
            "keeps all of them or none"
        )
    for key in ("num_layers", "num_units", "ratio"):
        value = getattr(settings, key, None)
        if value != getattr(plan.resolve_settings(), key):
            continue  # which is a difference of the settings
        expected = count_share(value, len(model.units)) if key == "ratio" and value is not None else value
        # By score, what gets no rank is left out.
        if expected is not None and (len(kept) > expected or (len(kept) < expected and not plan.ranks)):
            differences.append(
                f"{SelectionConfig.path}.{key}: {value} keeps {expected} {plan.granularity}s, and the plan "
                f"{len(kept)}; leave the key out to apply a plan that was edited"
            )
    return differences


def list_cost_differences(plan: Plan, model: ModelFacts) -> list[str]:
    """Return whether the ranks of a plan take more parameters in a model than its budget allows."""
    cost = find_plan_cost(plan, model.costs)
    if plan.budget is None or cost is None or cost <= plan.budget.allowed:
        return []
    return [f"the plan's ranks take {cost:,} parameters, and its budget allows {plan.budget.allowed:,}"]


def find_plan_cost(plan: Plan, costs: Mapping[str, int]) -> int | None:
    """Return the parameters that the ranks of a plan take; None where the model lacks a module of them."""
    if not plan.ranks.keys() <= costs.keys():
        return None
    return sum(rank * costs[name] for name, rank in plan.ranks.items())


# --- The sentence -------------------------------------------------------------------------------------------------


def enumerate_faults(faults: Sequence[str]) -> str:
    """Return several faults as the part of a sentence, with numbers where there is more than one."""
    if len(faults) == 1:
        return faults[0]
    return "; ".join(f"({number}) {fault}" for number, fault in enumerate(faults, start=1))


def check_reuse(source: str, resumes: bool, of_base: Sequence[str], others: Sequence[str]) -> None:
    """Raise LayerselError, with all differences in one sentence, where a plan is not for this run.

    Args:
        source: where the plan is from.
        resumes: whether it is the plan of a checkpoint that the run resumes from.
        of_base: differences of the base model, which ``plan_check: ignore`` passes over.
        others: all others.
    """
    if not of_base and not others:
        return
    key = "resume_from_checkpoint" if resumes else "layersel.selection.plan"
    way_out = "Restore what it was made with, or " + ("start without resuming." if resumes else "make a new plan.")
    if of_base:
        way_out += " If the two base models are the same, set `layersel.selection.plan_check: ignore`."
    raise LayerselError(
        f"{key}: the plan from {source} does not fit this run: {enumerate_faults([*of_base, *others])}. {way_out}"
    )
