"""Grow LoRA modules to the highest rank that they may reach, before any engine exists, so that shapes stay static."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.gate_requirements import check_generation
from axolotl_layersel.config.l1ra import (
    OPTIMIZERS,
    L1RAConfig,
    check_bounds,
    check_library,
    check_optimizer,
    find_max_rank,
    find_room,
    refuse_optimizer,
)
from axolotl_layersel.config.schedule import check_run_length
from axolotl_layersel.engines import collectives
from axolotl_layersel.engines.moments import find_library
from axolotl_layersel.engines.trainers import check_no_optimizer, count_optimizer_steps, uses_vllm
from axolotl_layersel.lora.factors import Factors, find_used
from axolotl_layersel.lora.modules import (
    find_lora_modules,
    get_adapter_name,
    get_base_model,
    get_config,
    get_linears,
    list_linear,
)
from axolotl_layersel.lora.patterns import scale_by_rank
from axolotl_layersel.lora.plain_lora import check_plain_lora
from axolotl_layersel.lora.resizing import (
    check_trained_rank,
    describe_ranks,
    resize_linear,
    set_ranks,
    set_scaling,
)
from axolotl_layersel.lora.run import Run
from axolotl_layersel.lora.weights import initialize_module


def check_trainer(run: Run, settings: L1RAConfig, lora_r: int) -> str:
    """Return the library of the run's optimizer, a key of ``moments.LAYOUTS``.

    Raises:
        LayerselError: if rank cannot move in this run.
    """
    check_bounds(settings, lora_r)
    check_no_optimizer(run.trainer)
    chosen = run.trainer.optimizer_cls_and_kwargs
    if chosen is None:
        optimizer = run.trainer.args.optim
        name = getattr(optimizer, "value", optimizer)
        check_optimizer(name, run.engine.name, run.engine.writes_whole_state())
        library = OPTIMIZERS[name]
    else:
        library = check_optimizer_class(chosen[0], run.engine.name, run.engine.writes_whole_state())
    run.engine.check_optimizer()
    steps = count_optimizer_steps(run.trainer)
    check_run_length(steps, settings)
    return library


def check_optimizer_class(optimizer: Any, engine: str, whole_state: bool) -> str:
    """Return the library of an optimizer's class.

    Raises:
        LayerselError: for a class or factory of optimizers that rank cannot move with.
    """
    name = getattr(optimizer, "__name__", repr(optimizer))
    library = find_library(optimizer) if isinstance(optimizer, type) else None
    if library is None:
        raise refuse_optimizer(name, engine)
    check_library(name, library, engine, whole_state)
    return library


@dataclass(frozen=True)
class Capacity:
    """The ranks of grown modules.

    Attributes:
        lora_r: their initial rank.
        max_rank: the rank that each has room for.
        slots: components in use, by module.
        library: library of the optimizer, a key of ``moments.LAYOUTS``.
    """

    lora_r: int
    max_rank: int
    slots: dict[str, list[int]]
    library: str


def make_room(
    run: Run,
    settings: L1RAConfig,
    lora_r: int | None,
    scaling: float | None,
    least: int = 0,
    exponent: float = 0,
) -> Capacity:
    """Check that rank can move in this run, and grow its LoRA modules, see ``grow_modules``.

    Args:
        run: a run whose engine is not built yet.
        settings: the ``l1ra`` block.
        lora_r: the rank that ``max_rank`` is derived from; default: the adapter's.
        scaling: the scaling of modules of rank ``lora_r``, for which B is rescaled; None: each keeps its own.
        least: lower bound of the default ``max_rank``.
        exponent: how ``scaling`` follows the rank, see ``patterns.scale_by_rank``.

    Raises:
        LayerselError: if rank cannot move.
    """
    check_plain_lora(run, run.lora_modules, "layersel.l1ra")
    check_generation(uses_vllm(run.trainer))
    lora_r = lora_r or run.config.r
    library = check_trainer(run, settings, lora_r)
    used = {name: len(slots) for name, slots in find_components(run.model).items()}
    max_rank = find_max_rank(settings, lora_r, max(least, find_room(used.values())))
    scalings = None
    if scaling is not None:
        ranks = {name: used.get(name, module.r[run.adapter]) for name, module in run.lora_modules.items()}
        scalings = {name: scale_by_rank(scaling, lora_r, rank, exponent) for name, rank in ranks.items()}
    return Capacity(lora_r, max_rank, grow_modules(run.model, max_rank, scalings), library)


def grow_modules(model: PeftModel, max_rank: int, scalings: Mapping[str, float] | None = None) -> dict[str, list[int]]:
    """Pad every linear LoRA module with zeros to ``max_rank`` components, without changing its output.

    Call it before the optimizer or an engine exists. Padding in a loaded adapter becomes room, too. LoRA on expert
    parameters keeps its rank.

    Args:
        model: a model with plain LoRA modules, see ``check_plain_lora``.
        max_rank: the capacity of a module.
        scalings: new scalings of all modules, for which B is rescaled; None: each keeps its own.

    Returns:
        The slots in use of each linear module, by name.

    Raises:
        LayerselError: if a module uses more than ``max_rank``.
    """
    adapter = get_adapter_name(model)
    everything = find_lora_modules(get_base_model(model), adapter)
    modules = list_linear(everything)
    linears = {name: get_linears(module, adapter) for name, module in modules.items()}

    components = find_components(model)
    for name, module in modules.items():
        used = components[name]
        if len(used) > max_rank:
            raise LayerselError(
                f"layersel.l1ra.max_rank: {max_rank} is less than the rank {len(used)} that {name} has. "
                f"Set max_rank to at least {max(map(len, components.values()))}."
            )
        rescale = 1.0 if scalings is None else module.scaling[adapter] / scalings[name]
        grow_linear(linears[name][0], 0, used, max_rank, 1.0)
        grow_linear(linears[name][1], 1, used, max_rank, rescale)
        module.r[adapter] = max_rank
        set_scaling(module, adapter, module.scaling[adapter] / rescale)
    if scalings is not None:
        for name in everything.keys() - modules.keys():
            rescale_experts(everything[name], adapter, scalings[name])
    model.peft_config[adapter] = describe_ranks(get_config(model), everything, adapter)
    return {name: list(range(len(used))) for name, used in components.items()}


def find_components(model: PeftModel) -> dict[str, list[int]]:
    """Return the components in use of each linear LoRA module, by name; every process must call this."""
    adapter = get_adapter_name(model)
    modules = list_linear(find_lora_modules(get_base_model(model), adapter))
    linears = {name: get_linears(module, adapter) for name, module in modules.items()}

    def find() -> dict[str, list[int]]:
        components = {
            name: find_used(Factors(down.weight, up.weight)).nonzero() for name, (down, up) in linears.items()
        }
        return {name: found.flatten().tolist() for name, found in components.items()}

    # With FSDP's cpu_ram_efficient_loading only process 0 holds weights.
    return collectives.decide_on_rank_zero(find)


@torch.no_grad()
def grow_linear(linear: nn.Linear, dim: int, used: list[int], rank: int, factor: float) -> None:
    """Resize A (``dim`` 0) or B (``dim`` 1) to ``rank`` components: the ``used`` ones times ``factor``, then zeros."""
    weight = linear.weight
    index = torch.tensor(used, dtype=torch.long, device=weight.device)
    resize_linear(linear, dim, rank)
    linear.weight.narrow(dim, 0, len(used)).copy_(weight.index_select(dim, index) * factor)


@torch.no_grad()
def rescale_experts(module: LoraLayer, adapter: str, scaling: float) -> None:
    """Change the scaling of LoRA on expert parameters, and rescale B so that its output stays."""
    _, up = get_linears(module, adapter)
    up.weight.mul_(module.scaling[adapter] / scaling)
    set_scaling(module, adapter, scaling)


@torch.no_grad()
def start_from(
    run: Run,
    capacity: Capacity,
    ranks: dict[str, int],
    seed: int,
    continues_adapter: bool,
    exponent: float = 0,
) -> None:
    """Start modules at ``ranks`` with new weights drawn from ``seed``; modules that were not grown are resized.

    Args:
        run: a run whose modules were grown.
        capacity: the ranks that they have, which are changed.
        ranks: ranks by module.
        seed: seed of the initial weights.
        continues_adapter: the weights are those of a trained adapter, which must have these ranks; they stay.
        exponent: how the scaling follows the rank, see ``patterns.scale_by_rank``.

    Raises:
        LayerselError: if there is no room for these ranks, or a trained adapter has others.
    """
    fixed = {name: rank for name, rank in ranks.items() if name not in capacity.slots}
    set_ranks(run, fixed, seed, continues_adapter, exponent)
    ranks = {name: rank for name, rank in ranks.items() if name in capacity.slots}
    if continues_adapter:
        for name, rank in ranks.items():
            check_trained_rank(name, len(capacity.slots[name]), rank)
        return
    if not ranks:
        return
    highest = max(ranks, key=lambda name: ranks[name])
    if ranks[highest] > capacity.max_rank:
        raise LayerselError(
            f"layersel.l1ra.max_rank: {capacity.max_rank} is less than the rank {ranks[highest]} that the plan gives "
            f"{highest}. Raise it to {ranks[highest]} or more, or set `layersel.selection.max_rank`."
        )
    modules = run.lora_modules
    for name, rank in ranks.items():
        initialize_module(run.model, name, modules[name], seed, capacity.lora_r)
        down, _ = get_linears(modules[name], run.adapter)
        down.weight[rank:] = 0
        scaling = modules[name].scaling[run.adapter]
        set_scaling(modules[name], run.adapter, scale_by_rank(scaling, len(capacity.slots[name]), rank, exponent))
        capacity.slots[name] = list(range(rank))
    run.model.peft_config[run.adapter] = describe_ranks(run.config, modules, run.adapter)
