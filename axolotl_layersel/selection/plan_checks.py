"""Faults of a plan: in itself, against a YAML block, and against a model; each a list, the most important first.

Nothing here imports torch, so that ``show`` answers at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

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

# The keys of the block, by what they change: where LoRA is, how much of it, and the data that it is chosen on.
WHERE = ("method", "stacks", "layers", "candidates", "granularity", "num_layers", "num_units", "ratio", "time", "keep")
HOW_MUCH = ("unselected", "outside_layers", "rank_allocation", "budget", "budget_parameters", "min_rank", "max_rank")
KEYS = (*WHERE, *HOW_MUCH, "flexora", "token", "seed", "num_samples")
# Fields of a plan that repeat its settings.
REPEATED = ("method", "granularity", "unselected", "outside_layers")
# Further problems in a file's form are only counted.
SHOWN_PROBLEMS = 8


# --- The plan itself ----------------------------------------------------------------------------------------------


def list_problems(error: ValidationError) -> list[str]:
    """Return the places in a file that do not have a plan's form: the first ones, and the number of others."""
    found = [
        (".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, ").rstrip("."))
        for problem in error.errors()
    ]
    told = list(dict.fromkeys(f"{place}: {message}" if place else message for place, message in found))
    rest = len(told) - SHOWN_PROBLEMS
    return [*told[:SHOWN_PROBLEMS], f"{rest} more"] if rest > 1 else told


def list_contradictions(plan: Plan) -> list[str]:
    """Return the contradictions between parts of ``plan``."""
    try:
        settings = plan.resolve_settings()
    except ValidationError as error:
        faults = [fault.replace(f"{SelectionConfig.path}.", "settings.") for fault in list_problems(error)]
        return [*find_layer_faults(plan), *faults, *find_module_faults(plan)]
    return [
        *find_layer_faults(plan),
        *find_setting_faults(plan, settings),
        *find_module_faults(plan),
        *find_rank_faults(plan, settings),
        *find_row_faults(plan, settings),
    ]


def find_layer_faults(plan: Plan) -> Iterator[str]:
    """Yield the faults of the list of layers."""
    names = [choice.layer for choice in plan.layers]
    seeds = plan.stability.selected.values() if plan.stability else ()
    if not are_all(names, plan.stack):
        yield f"`layers` does not list every layer at {describe_place(plan.stack)} once, in order"
    if not plan.selected:
        yield "`layers` selects none"
    if not set(names).issuperset(plan.unscored):
        yield "`unscored` names layers that `layers` does not list"
    if plan.backward_end is not None and plan.backward_end not in names:
        yield f"`backward_end` is {quote(plan.backward_end)}, which `layers` does not list"
    if not all(set(names).issuperset(layers) for layers in seeds):
        yield "`stability` names layers that `layers` does not list"


def find_setting_faults(plan: Plan, settings: ResolvedSelection) -> Iterator[str]:
    """Yield the differences between a plan and its settings, except for the number of layers."""
    for key in REPEATED:
        value, asked = getattr(plan, key), getattr(settings, key)
        if value != asked:
            yield f"`{key}` is {quote(value)}, and settings.{key} {quote(asked)}"
    if plan.settings.get("seed") not in (None, plan.seed):
        yield f"`seed` is {plan.seed}, and settings.seed {quote(plan.settings['seed'])}"
    sides = tuple(split_place(plan.stack))
    if sides not in ([("",), ENCODER_DECODER] if settings.stacks == "language" else [STACKS[settings.stacks]]):
        yield f"`stack` is {quote(plan.stack)}, and settings.stacks {quote(settings.stacks)}"
    if settings.layers is not None and plan.selected != settings.layers:
        yield f"`layers` selects {format_names(plan.selected)}, and settings.layers is {settings.layers}"
    yield from find_time_faults(plan, settings)
    outside = [name for name in plan.selected if settings.candidates is not None and name not in settings.candidates]
    if outside:
        yield f"`layers` selects {format_names(outside)}, which are not among settings.candidates"
    if settings.token not in ("auto", None):
        tokens = {"": plan.token} if isinstance(plan.token, str) else plan.token or {}
        others = {token for side, token in tokens.items() if side != VISION and token != settings.token}
        for token in sorted(filter(None, others)):
            yield f"`token` is {token!r}, and settings.token {settings.token!r}"


def find_time_faults(plan: Plan, settings: ResolvedSelection) -> Iterator[str]:
    """Yield the contradictions between the time of a step and its limit."""
    if plan.step_time is None and settings.time is not None:
        yield f"`step_time` is empty, and settings.time {settings.time}"
    elif plan.step_time is not None and settings.time is None:
        yield "`step_time` is given, and settings.time is not"
    elif plan.step_time is not None and settings.time is not None and plan.step_time.share > settings.time:
        yield f"`step_time` has a share of {plan.step_time.share}, and settings.time is {settings.time}"


def find_module_faults(plan: Plan) -> Iterator[str]:
    """Yield the faults of the modules that are kept, scored, or outside the layers."""
    place, names = describe_place(plan.stack), {choice.layer for choice in plan.layers}
    outside = [name for tower in plan.outside for name in tower.modules]
    layers = {name: find_layer(plan.stack, name) for name in (*plan.modules, *plan.module_scores, *outside)}
    scored, scores = bool(plan.module_scores), plan.method not in METHODS or METHODS[plan.method].needs_data
    if {layers[name] for name in plan.modules} != set(plan.selected):
        yield f"`modules` is not of just the layers that are selected at {place}"
    if find_repeated(plan.modules):
        yield f"`modules` names {find_repeated(plan.modules)} twice"
    if scored and not plan.module_scores.keys() >= set(plan.modules):
        yield "`modules` names modules that `module_scores` does not"
    if not names.issuperset(layers[name] for name in plan.module_scores):
        yield f"`module_scores` names modules that are in none of the layers at {place}"
    if scored and not scores:
        yield f"`module_scores` is given, and method {quote(plan.method)} gives none"
    if scores and not scored and plan.granularity != "layer":
        yield f"`module_scores` is empty, and `granularity` {quote(plan.granularity)}"
    if find_repeated(outside):
        yield f"`outside` names {find_repeated(outside)} twice"
    if any(layers[name] is not None for name in outside):
        yield "`outside` names modules of the layers"
    if any(tower.trained > len(tower.modules) for tower in plan.outside):
        yield "`outside` counts more modules that train than it names"


def find_rank_faults(plan: Plan, settings: ResolvedSelection) -> Iterator[str]:
    """Yield the faults of ranks and their budget."""
    policy, given = settings.rank_allocation, {"ranks": bool(plan.ranks), "budget": plan.budget is not None}
    if policy == "same":
        yield from (f"`{key}` is given, and settings.rank_allocation is 'same'" for key, has in given.items() if has)
        return
    yield from (f"`{key}` is empty, and settings.rank_allocation {policy!r}" for key, has in given.items() if not has)
    if plan.ranks and plan.ranks.keys() != set(plan.modules):
        yield "`ranks` does not name just the modules that are in `modules`"
    # Without ``max_rank`` the highest rank can be that of ``l1ra``, of any size.
    lora_r = (plan.budget and plan.budget.lora_r) or 0
    lowest, highest = max(1, settings.min_rank or 0), settings.max_rank or max(HIGHEST_RANK, MAX_RANK_FACTOR * lora_r)
    for fault, ranks in (
        (f"less than {lowest}, the lowest", {name: rank for name, rank in plan.ranks.items() if rank < lowest}),
        (f"more than {highest}, the highest", {name: rank for name, rank in plan.ranks.items() if rank > highest}),
    ):
        if ranks:
            name, rank = next(iter(ranks.items()))
            others = f" ({len(ranks)} such modules)" if len(ranks) > 1 else ""
            yield f"`ranks` gives {name} rank {rank}, {fault} of its settings{others}"
    if plan.budget:
        yield from find_budget_faults(plan.budget, settings)


def find_budget_faults(budget: Budget, settings: ResolvedSelection) -> Iterator[str]:
    """Yield the faults of the numbers of a budget."""
    allowed = find_budget(settings, budget.lora)
    if allowed != budget.allowed:
        yield f"`budget` allows {budget.allowed}, and its settings {allowed} of {budget.lora}"
    if budget.spent > budget.allowed:
        yield f"`budget` has {budget.spent} parameters spent of {budget.allowed} that are allowed"
    if budget.even > budget.spent:
        yield f"`budget` has {budget.even} parameters spent evenly of {budget.spent} in all"


def find_row_faults(plan: Plan, settings: ResolvedSelection) -> Iterator[str]:
    """Yield the faults of the rows that were drawn."""
    rows, most = [*plan.calibration_rows, *plan.rows_left_out], settings.num_samples
    if any(row < 0 for row in rows):
        yield "`calibration_rows` or `rows_left_out` has a negative row"
    if find_repeated(rows) is not None:
        yield f"`calibration_rows` and `rows_left_out` have row {find_repeated(rows)} twice"
    if most is not None and len(rows) > most:
        yield f"{len(rows)} rows were drawn, and settings.num_samples is {most}"
    if rows and not METHODS[settings.method].needs_data:
        yield f"rows were drawn, and method {quote(settings.method)} reads none"


def find_repeated(values: Iterable[Hashable]) -> Any:
    """Return the first of ``values`` that occurs more than once, or None."""
    return next((value for value, count in Counter(values).items() if count > 1), None)


def describe_place(place: Place) -> str:
    """Return the place of layers, for messages."""
    return " and ".join(map(repr, split_place(place).values()))


def enumerate_faults(faults: Sequence[str]) -> str:
    """Return faults as a part of a sentence, numbered if there are several."""
    if len(faults) == 1:
        return faults[0]
    return "; ".join(f"({number}) {fault}" for number, fault in enumerate(faults, start=1))


# --- The plan against the YAML block ------------------------------------------------------------------------------


def list_setting_differences(
    plan: Plan,
    settings: SelectionConfig,
    lora_r: int | None = None,
    room: int | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    exponent: float | None = None,
) -> list[str]:
    """Return where a reused plan differs from the one that a run asks for; keys left out contradict nothing.

    Args:
        plan: a plan without contradictions.
        settings: the ``selection`` block.
        lora_r: the run's, None if unknown.
        room: with ``l1ra``, the highest rank that modules have room for.
        rank_pattern: the ranks that the YAML file sets for modules.
        exponent: ``scaling_exponent`` of the YAML file.
    """
    asked, made_with = settings.resolve(run_seed=plan.seed), plan.resolve_settings()
    differences: list[str] = []
    for key in KEYS:
        if key == "rank_allocation":
            differences += find_lora_differences(plan, lora_r, room, rank_pattern, exponent)
        given = getattr(settings, key)
        if given is None:
            continue
        pairs = {key: (getattr(asked, key), getattr(made_with, key))}
        if isinstance(given, Block):
            parts = given.model_dump(exclude_none=True)
            pairs = {f"{key}.{part}": (value, getattr(made_with.flexora, part, None)) for part, value in parts.items()}
        for name, (value, other) in pairs.items():
            if value != other:
                end = "in the settings that" if other is None else f"the {other!r} that"
                differences.append(f"{SelectionConfig.path}.{name}: {value!r} is not {end} it was made with")
    return differences


def find_lora_differences(
    plan: Plan,
    lora_r: int | None,
    room: int | None,
    rank_pattern: Mapping[str, int] | None,
    exponent: float | None = None,
) -> Iterator[str]:
    """Yield where ranks of a plan conflict with those of the run; see ``list_setting_differences``."""
    made_with = plan.budget.lora_r if plan.budget else None
    if made_with is not None and lora_r is not None and made_with != lora_r:
        yield (
            f"lora_r: {lora_r} is not the {made_with} for which it gave modules their ranks, which would stay while "
            "only their scaling changes"
        )
    if rank_pattern and plan.ranks:
        yield f"lora_rank_pattern: {quote(rank_pattern)} gives modules ranks, and so does the plan"
    if exponent is not None and plan.ranks and exponent != plan.scaling_exponent:
        yield f"layersel.scaling_exponent: {exponent} is not the {plan.scaling_exponent} that it was made with"
    highest = max(plan.ranks, key=lambda name: plan.ranks[name], default=None)
    if highest is not None and room is not None and plan.ranks[highest] > room:
        rank = plan.ranks[highest]
        yield f"layersel.l1ra.max_rank: {room} is less than the rank {rank} that the plan gives {highest}"


# --- The plan against the model -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelFacts:
    """The facts of a model with LoRA that a plan speaks of.

    Attributes:
        place: the place of its layers.
        names: the names of its layers.
        modules: the LoRA modules of each layer that carries any, by layer name.
        outside: the LoRA modules outside the layers.
        units: the modules of each unit that could be chosen; None if the model need not have all of them.
        costs: the parameters of one rank of LoRA modules, at least of those that a plan gives a rank.
    """

    place: Place
    names: Sequence[LayerName]
    modules: Mapping[LayerName, list[str]]
    outside: Collection[str] = ()
    units: Sequence[Sequence[str]] | None = None
    costs: Mapping[str, int] = field(default_factory=dict)


def list_model_differences(plan: Plan, model: ModelFacts, settings: SelectionConfig | None = None) -> list[str]:
    """Return where a plan without contradictions does not fit a model.

    ``settings``: the ``selection`` block, which can set how many units are kept.
    """
    differences = [
        *find_stack_differences(plan, model),
        *find_place_differences(plan, model),
        *find_unit_differences(plan, model, settings),
    ]
    cost = find_plan_cost(plan, model.costs)
    if plan.budget is not None and cost is not None and cost > plan.budget.allowed:
        differences.append(f"the plan's ranks take {cost:,} parameters, and its budget allows {plan.budget.allowed:,}")
    return differences


def find_stack_differences(plan: Plan, model: ModelFacts) -> Iterator[str]:
    """Yield the differences between the layers of a model and those of a plan."""
    planned, names = [choice.layer for choice in plan.layers], set(model.names)
    if len(planned) != len(model.names):
        yield f"the plan has {len(planned)} layers, the model {len(model.names)}"
    if plan.stack != model.place:
        yield f"the plan's layers are at {describe_place(plan.stack)}, the model's at {describe_place(model.place)}"
    unknown = [name for name in planned if name not in names]
    if unknown and len(planned) == len(model.names):
        yield f"the plan has a layer {unknown[0]}, which the model has not"


def find_place_differences(plan: Plan, model: ModelFacts) -> Iterator[str]:
    """Yield the differences between the LoRA modules of a model and those of a plan."""
    # If modules were chosen one by one, the model must have all that could have been chosen.
    known = set(plan.module_scores) or set(plan.modules)
    layers = {find_layer(plan.stack, name) for name in known}
    present = {name for layer in layers if layer is not None for name in model.modules.get(layer, [])}
    if plan.outside_layers == "keep":
        known |= set(plan.modules_outside)
        present |= set(model.outside)
    if plan.granularity != "layer" and not plan.module_scores:
        known |= present  # a plan without module scores lists only the modules that are kept
    missing, extra = sorted(known - present), sorted(present - known)
    if missing:
        yield f"the model has no LoRA on {missing[0]} ({len(missing)} such modules)"
    if extra:
        yield f"the model has LoRA on {extra[0]}, unknown to the plan ({len(extra)} such modules)"


def find_unit_differences(plan: Plan, model: ModelFacts, settings: SelectionConfig | None) -> Iterator[str]:
    """Yield units that a plan keeps in part, and keys of the YAML block that ask for another number of units."""
    if model.units is None:
        return
    modules = set(plan.modules)
    kept = [unit for unit in model.units if not modules.isdisjoint(unit)]
    torn = next((unit for unit in kept if not modules.issuperset(unit)), None)
    if torn is not None and plan.granularity != "layer":
        lacking = next(name for name in torn if name not in modules)
        yield (
            f"the plan keeps modules of a {plan.granularity} without {lacking}, and granularity: {plan.granularity} "
            "keeps all of them or none"
        )
    for key in ("num_layers", "num_units", "ratio"):
        value = getattr(settings, key, None)
        if value != getattr(plan.resolve_settings(), key):
            continue  # this is a difference of the settings
        expected = count_share(value, len(model.units)) if key == "ratio" and value is not None else value
        # Units that got no rank by their score are not kept.
        if expected is not None and (len(kept) > expected or (len(kept) < expected and not plan.ranks)):
            yield (
                f"{SelectionConfig.path}.{key}: {value} keeps {expected} {plan.granularity}s, and the plan "
                f"{len(kept)}; leave the key out to apply a plan that was edited"
            )


def find_plan_cost(plan: Plan, costs: Mapping[str, int]) -> int | None:
    """Return the parameters that the ranks of a plan take; None if the model lacks one of their modules."""
    if not plan.ranks.keys() <= costs.keys():
        return None
    return sum(rank * costs[name] for name, rank in plan.ranks.items())
