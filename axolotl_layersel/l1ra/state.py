"""The state in a checkpoint, in addition to its plain adapter, from which ranks, gates and weights resume exactly."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.files import parse_count, parse_json, reading, refuse, replace_atomically
from axolotl_layersel.common.paths import ranks_path, state_path
from axolotl_layersel.common.tensors import load_tensors, save_tensors
from axolotl_layersel.config.l1ra import BUDGETS, L1RAConfig
from axolotl_layersel.l1ra.records import RankHistory

SCHEMA_VERSION = "1"
# Metadata keys of the checkpoint's step, and of how the scaling of modules follows their rank.
STEP, EXPONENT = "step", "scaling_exponent"
# Prefixes of tensor names: weights in training, neither folded nor scaled, and flat tensors of the gates.
ADAPTER_PREFIX = "adapter/"
GATE_PREFIX = "gates/"
GATE_TYPES = {
    "values": torch.float32,
    "exp_avg": torch.float32,
    "exp_avg_sq": torch.float32,
    "steps": torch.int64,
    "active": torch.bool,
}
WAY_OUT = "Resume another checkpoint."


@dataclass(frozen=True)
class State:
    """The ranks and gates in a checkpoint, without its weights.

    Attributes:
        modules: names of the modules with gates, in the model's order.
        max_rank: the rank that each has room for.
        gates: the flat tensors of the gates, by the names in ``GATE_TYPES``.
        pool: the unused part of the budget.
        history: ranks by step.
        exponent: how the scaling of modules follows their rank.
    """

    modules: list[str]
    max_rank: int
    gates: dict[str, torch.Tensor]
    pool: int
    history: RankHistory
    exponent: float


def write_state(
    checkpoint: str | Path,
    adapter: dict[str, torch.Tensor],
    gates: dict[str, torch.Tensor],
    history: RankHistory,
    metadata: dict[str, str],
) -> None:
    """Write weights, gates, ranks and ``metadata`` to a checkpoint, each file atomically."""
    history.write(checkpoint)
    tensors = {f"{ADAPTER_PREFIX}{name}": tensor for name, tensor in adapter.items()}
    tensors |= {f"{GATE_PREFIX}{name}": tensor.cpu() for name, tensor in gates.items()}
    metadata = {"schema_version": SCHEMA_VERSION, "ranks": find_ranks_digest(history), **metadata}
    with replace_atomically(state_path(checkpoint), sum(tensor.nbytes for tensor in tensors.values())) as temporary:
        save_tensors(tensors, temporary, metadata)


def find_ranks_digest(history: RankHistory) -> str:
    return hashlib.sha256(history.to_csv().encode()).hexdigest()


def read_state(checkpoint: str | Path, settings: L1RAConfig, key: str) -> State:
    """Return the state of a checkpoint; no model is needed.

    Raises:
        LayerselError: naming ``key``, if a file is missing, damaged, inconsistent, of another schema, or of a run with
            other settings.
    """
    path = state_path(checkpoint)
    if not path.exists():
        raise LayerselError(
            f"{key}: {path} is missing: it is not a checkpoint of a run with layersel.l1ra. Resume another "
            "checkpoint, or start without resuming."
        )
    tensors, metadata = load_tensors(key, path, WAY_OUT)
    if metadata.get("schema_version") != SCHEMA_VERSION:
        raise LayerselError(
            f"{key}: {path} has schema_version {metadata.get('schema_version')!r}, this version of axolotl-layersel "
            f"reads {SCHEMA_VERSION}. Resume with the version that wrote it."
        )
    with reading(key, path, WAY_OUT):
        then, modules = parse_json(metadata["settings"]), parse_json(metadata["modules"])
        max_rank, pool = parse_count(metadata["max_rank"]), parse_count(metadata["pool"])
        exponent = float(metadata.get(EXPONENT, 0))  # earlier versions had none
        if not isinstance(then, dict) or not isinstance(modules, list) or not all(isinstance(m, str) for m in modules):
            raise ValueError("its settings or modules have a wrong type")
        if not 0 <= exponent <= 1:
            raise ValueError(f"its {EXPONENT} is {exponent}")
        check_settings(then, settings, checkpoint)
        adapter = {n.removeprefix(ADAPTER_PREFIX): t for n, t in tensors.items() if n.startswith(ADAPTER_PREFIX)}
        gates = {n.removeprefix(GATE_PREFIX): t for n, t in tensors.items() if n.startswith(GATE_PREFIX)}
        costs = measure_costs(adapter, modules, max_rank)
        check_gates(gates, len(modules) * max_rank)
    history = RankHistory.read(checkpoint, key)
    ranks = dict(zip(modules, gates["active"].view(len(modules), max_rank).sum(dim=1).tolist()))
    fault = find_rank_fault(history, ranks, pool, costs, settings)
    if fault is None and metadata.get("ranks", find_ranks_digest(history)) != find_ranks_digest(history):
        fault = f"is not the one that {path} was written with"
    if fault:
        raise refuse(key, ranks_path(checkpoint), fault, WAY_OUT)
    return State(modules, max_rank, gates, pool, history, exponent)


def check_settings(then: dict, settings: L1RAConfig, checkpoint: str | Path) -> None:
    for name, value in settings.model_dump().items():
        if then.get(name) != value:
            raise LayerselError(
                f"layersel.l1ra.{name}: {value!r} contradicts the checkpoint {checkpoint}, which was made with "
                f"{then.get(name)!r}. Restore the value, or start without resuming."
            )


def check_exponent(state: State, exponent: float, checkpoint: str | Path) -> None:
    """Raise LayerselError unless a run scales modules by the exponent of the checkpoint that ``state`` is of."""
    if state.exponent != exponent:
        raise LayerselError(
            f"layersel.scaling_exponent: {exponent} contradicts the checkpoint {checkpoint}, which was made with "
            f"{state.exponent}. Restore the value, or start without resuming."
        )


def measure_costs(adapter: dict[str, torch.Tensor], modules: list[str], max_rank: int) -> dict[str, int]:
    """Return the number of parameters in one component of each module.

    Raises:
        ValueError: if a module's weights do not have rank ``max_rank``.
    """
    costs = {}
    for module in modules:
        down, up = (adapter[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
        if down.dim() != 2 or up.dim() != 2 or down.shape[0] != max_rank or up.shape[1] != max_rank:
            raise ValueError(f"the weights of {module} have no room for rank {max_rank}")
        costs[module] = down.shape[1] + up.shape[0]
    return costs


def check_gates(gates: dict[str, torch.Tensor], components: int) -> None:
    """Raise ValueError unless the flat tensors are possible for so many components."""
    if gates.keys() != GATE_TYPES.keys():
        raise ValueError(f"its tensors of the gates are {', '.join(sorted(gates)) or 'missing'}")
    for name, kind in GATE_TYPES.items():
        if gates[name].dtype != kind or gates[name].shape != (components,):
            raise ValueError(f"{GATE_PREFIX}{name} is {gates[name].dtype} of shape {tuple(gates[name].shape)}")
    if not ((gates["values"] >= 0) & (gates["values"] <= 1)).all():
        raise ValueError("a gate is outside of 0 to 1")
    if (gates["exp_avg_sq"] < 0).any() or (gates["steps"] < 0).any():
        raise ValueError("a second moment or a count of steps is negative")
    idle = ~gates["active"]
    if any(gates[name][idle].any() for name in GATE_TYPES):
        raise ValueError("an inactive component has a gate or moments")


def find_rank_fault(
    history: RankHistory, ranks: dict[str, int], pool: int, costs: dict[str, int], settings: L1RAConfig
) -> str | None:
    """Return why ``history`` contradicts the ``ranks`` of the active components, None if it does not."""
    start, last = history.ranks[0], history.ranks[max(history.ranks)]
    if list(last.items()) != list(ranks.items()):
        return "does not end with the ranks of the state next to it"
    low = next((name for name in ranks if ranks[name] < min(settings.min_rank, start[name])), None)
    if low is not None:
        return f"leaves {low} fewer than min_rank: {settings.min_rank} components"
    cost = BUDGETS[settings.budget_unit](costs)
    before, now = (sum(count * cost[name] for name, count in counts.items()) for counts in (start, ranks))
    reassigns = settings.get("reassign") is not False
    if (reassigns and now + pool != before) or (not reassigns and (pool or now > before)):
        return f"began with a budget of {before}, but the state next to it uses {now} and has {pool} unused"
    return None
