"""Export an adapter in a layout that other programs read."""

from pathlib import Path

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.lora.factors import DOWN, UP, Factors, fold, split
from axolotl_layersel.lora.layouts import WAY_OUT, lay_out, read_adapter, write_adapter
from axolotl_layersel.lora.patterns import resolve

LAYOUTS = ("ragged", "uniform")


def find_factor_fault(factors: dict[str, Factors], ranks: dict[str, int]) -> str | None:
    """Return why PEFT could not load these matrices into modules of these ranks, None if it can."""
    for name, pair in factors.items():
        rank = ranks[name]
        if pair.down.dim() != 2 or pair.up.dim() != 2 or (pair.down.shape[0], pair.up.shape[1]) != (rank, rank):
            shapes = f"{tuple(pair.down.shape)} and {tuple(pair.up.shape)}"
            return f"the matrices of {name} have the shapes {shapes}, and its rank is {rank}"
        if not (pair.down.is_floating_point() and pair.up.is_floating_point()):
            return f"the matrices of {name} are not of a floating-point dtype"
    return None


def export_adapter(folder: str | Path, layout: str, output: str | Path) -> int:
    """Write the adapter in ``folder`` to ``output`` in one of ``LAYOUTS``, and return its highest rank.

    Raises:
        LayerselError: if ``folder`` does not hold a LoRA adapter of linear modules.
    """
    tensors, config = read_adapter(folder)
    halves = {name.removesuffix(DOWN).removesuffix(UP) for name in tensors if name.endswith((DOWN, UP))}
    lacking = next((name for name in sorted(halves) if not {f"{name}{DOWN}", f"{name}{UP}"} <= tensors.keys()), None)
    if lacking:
        raise LayerselError(f"ADAPTER: {folder} is damaged ({lacking} lacks one of its two matrices). {WAY_OUT}")
    factors, rest = split(tensors)
    if not factors:
        raise LayerselError(f"ADAPTER: {folder} holds no LoRA matrices. {WAY_OUT}")
    resolved = resolve(config, factors)
    fault = find_factor_fault(factors, {module: rank for module, (rank, _) in resolved.items()})
    if fault:
        raise LayerselError(f"ADAPTER: {folder} is damaged ({fault}). {WAY_OUT}")
    folded = {module: fold(pair, resolved[module][1]) for module, pair in factors.items()}
    tensors, config = lay_out(folded, rest, config, layout)
    write_adapter(output, tensors, config)
    return config.r
