"""The values of ``peft_init_lora_weights`` in PEFT 0.20, and which of them a selection supports."""

from collections.abc import Iterator, Mapping
from typing import Any

from axolotl_layersel.common.errors import LayerselError, find_fault, suggest
from axolotl_layersel.config.engines import find_zero_stage
from axolotl_layersel.config.strict_block import as_mapping

# A is random and B is zero: every component adds nothing at the start, independently of the others.
PLAIN = (True, "gaussian")
# Drawn again from the run's seed, so that every engine starts with the same weights.
SEEDED = (*PLAIN, "orthogonal")
# PEFT subtracts the product of the initial factors from the base weight, and does so again whenever it loads the
# adapter. The product is added again to the base weight of a module whose LoRA is removed.
RESTORED = ("pissa", "olora")
REFUSED = {
    False: "Axolotl ignores it and starts as with `true`",
    "corda": "Axolotl does not collect the statistics that it needs",
    "eva": "Axolotl does not pass it the data that it needs, so it would be plain LoRA",
    "loftq": "it replaces base weights by quantised ones, and they cannot be restored in a layer without LoRA",
    "lora_ga": "Axolotl does not compute the gradients that it needs, so it would be plain LoRA",
    "mica": "it trains only half of each module, which the plugin does not support",
    "pissa_niter": "it is random at every load, so a saved adapter or a resumed run would not fit its base model",
}
# PEFT compares these in lower case.
ANY_CASE = ("gaussian", "olora")


def normalise(value: bool | str | None) -> bool | str:
    """Return the name of an initialisation in the tables above, or ``value`` unchanged if it is in none."""
    if value is None:
        return True
    if isinstance(value, str) and value.lower() in ANY_CASE:
        return value.lower()
    if isinstance(value, str) and value.startswith("pissa_niter_"):
        return "pissa_niter"
    return value


def changes_base(value: bool | str | None) -> bool:
    """Return whether this initialisation changes base weights."""
    return normalise(value) in (*RESTORED, "corda", "loftq", "lora_ga", "pissa_niter")


def describe_rounding(value: bool | str | None, found: str) -> str:
    """Return the message for base weights that are stored with too low a precision to be restored."""
    return (
        f"peft_init_lora_weights: {value!r} with `unselected: remove` needs base weights in float32, so that the part "
        f"that it subtracts can be added again exactly, but {found}. Set `unselected: freeze`, or remove "
        "peft_init_lora_weights."
    )


def describe_continued(value: bool | str | None, adapter: str) -> str:
    """Return the message for an adapter whose initial factors, needed to restore the base weights, are lost."""
    return (
        f"layersel.selection.unselected: remove is not possible: {adapter} started as {value!r}, which changed the "
        "base weights, and the change is not known after training. Set `unselected: freeze`."
    )


def check_supported(value: bool | str | None) -> None:
    """Raise LayerselError for an initialisation that is unknown or that a selection does not support."""
    name = normalise(value)
    if name in SEEDED or name in RESTORED:
        return
    known = [*SEEDED[1:], *RESTORED]
    reason = REFUSED.get(name) if isinstance(name, bool | str) else None
    if reason is None:
        raise LayerselError(f"peft_init_lora_weights: {value!r} is not known: {suggest(str(value).lower(), known)}")
    raise LayerselError(
        f"peft_init_lora_weights: {value!r} cannot be combined with layersel.selection: {reason}. "
        f"Remove it, or use {', '.join(known[:-1])} or {known[-1]}."
    )


def check_redrawn(value: bool | str | None, rank: str) -> None:
    """Raise LayerselError for an initialisation under which modules cannot be rebuilt with other ranks.

    Args:
        value: the value of ``peft_init_lora_weights``.
        rank: the value of ``layersel.selection.rank_allocation``.
    """
    if normalise(value) not in PLAIN:
        raise LayerselError(
            f"peft_init_lora_weights: {value!r} cannot be combined with layersel.selection.rank_allocation: {rank}, "
            "which rebuilds modules with other ranks. Remove it, use `gaussian`, or set `rank_allocation: same`."
        )


def find_initialisation_faults(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield why a selection does not support the initialisation that a YAML file sets."""
    if data.get("lora_model_dir"):
        return  # Axolotl ignores these keys when it continues an adapter.
    yield from find_fault(check_loftq, data)
    initial = data.get("peft_init_lora_weights")
    yield from find_fault(check_supported, initial)
    lacking = None
    if find_zero_stage(data.get("deepspeed")) == 3:
        lacking = "ZeRO-3 splits before PEFT sees them. Use ZeRO-2"
    elif as_mapping(data.get("fsdp_config")).get("cpu_ram_efficient_loading"):
        lacking = "fsdp_config.cpu_ram_efficient_loading loads on one process only. Set it to false"
    if changes_base(initial) and lacking:
        yield (
            f"peft_init_lora_weights: {initial!r} is computed on every process from the base weights, which {lacking}, "
            "or another initialisation such as `gaussian`."
        )


def check_loftq(data: Mapping[str, Any]) -> None:
    """Raise LayerselError if a YAML file sets LoftQ in its own block."""
    if as_mapping(data.get("peft")).get("loftq_config"):
        raise LayerselError("peft.loftq_config: LoftQ changes base weights, and is not supported. Remove it.")
