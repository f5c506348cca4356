"""The values of ``peft_init_lora_weights`` in PEFT 0.20, and which of them a selection supports."""

from collections.abc import Mapping
from typing import Any

from axolotl_layersel.common.errors import LayerselError, suggest
from axolotl_layersel.config.engines import find_zero_stage
from axolotl_layersel.config.strict_block import as_mapping

# A is drawn and B is zero, so that a module starts as nothing, each rank component by itself.
PLAIN = (True, "gaussian")
# Drawn again from the run's seed, so that they are the same on every engine.
SEEDED = (*PLAIN, "orthogonal")
# PEFT takes the product of the initial factors out of the base weight, and again whenever it loads the adapter: the
# base weight of a module that is removed gets it back.
RESTORED = ("pissa", "olora")
REFUSED = {
    False: "Axolotl passes over it and starts as with `true`",
    "corda": "Axolotl does not collect the statistics that it starts from",
    "eva": "Axolotl does not look at the data for it, so it would be plain LoRA",
    "loftq": "it exchanges base weights for quantised ones, which a layer without LoRA cannot get back",
    "lora_ga": "Axolotl does not compute the gradients that it starts from, so it would be plain LoRA",
    "mica": "half of each module would stay as it starts, which the plugin does not know",
    "pissa_niter": "it draws random numbers whenever it is loaded, so that no adapter and no resumed run fits its base",
}
# PEFT compares these in lower case.
ANY_CASE = ("gaussian", "olora")


def normalise(value: bool | str | None) -> bool | str:
    """Return the initialisation under the name that it has in the tables above, or as it is where it is in none."""
    if value is None:
        return True
    if isinstance(value, str) and value.lower() in ANY_CASE:
        return value.lower()
    if isinstance(value, str) and value.startswith("pissa_niter_"):
        return "pissa_niter"
    return value


def changes_base(value: bool | str | None) -> bool:
    """Return whether PEFT changes base weights under this initialisation."""
    return normalise(value) in (*RESTORED, "corda", "loftq", "lora_ga", "pissa_niter")


def describe_rounding(value: bool | str | None, found: str) -> str:
    """Return the message for base weights that were rounded after the product of the factors was taken out."""
    return (
        f"peft_init_lora_weights: {value!r} with `unselected: remove` needs base weights in float32, to give them back "
        f"exactly what it takes out of them, and {found}. Set `unselected: freeze`, or remove peft_init_lora_weights."
    )


def describe_continued(value: bool | str | None, adapter: str) -> str:
    """Return the message for an adapter whose initial factors, which fit the base weights, are gone."""
    return (
        f"layersel.selection.unselected: remove cannot be honoured: {adapter} started as {value!r}, which changed the "
        "base weights, and what they had lost is not known after training. Set `unselected: freeze`."
    )


def check_supported(value: bool | str | None) -> None:
    """Raise LayerselError for an initialisation that a selection does not support, or that is not known."""
    name = normalise(value)
    if name in SEEDED or name in RESTORED:
        return
    known = [*SEEDED[1:], *RESTORED]
    reason = REFUSED.get(name) if isinstance(name, bool | str) else None
    if reason is None:
        raise LayerselError(f"peft_init_lora_weights: {value!r} is not known: {suggest(str(value).lower(), known)}")
    raise LayerselError(
        f"peft_init_lora_weights: {value!r} does not go with layersel.selection: {reason}. "
        f"Remove it, or use {', '.join(known[:-1])} or {known[-1]}."
    )


def check_redrawn(value: bool | str | None, rank: str) -> None:
    """Raise LayerselError for an initialisation by which modules of other ranks cannot be begun anew.

    ``rank``: the value of ``layersel.selection.rank_allocation``.
    """
    if normalise(value) not in PLAIN:
        raise LayerselError(
            f"peft_init_lora_weights: {value!r} does not go with layersel.selection.rank_allocation: {rank}, which "
            "begins modules anew with other ranks. Remove it, use `gaussian`, or set `rank_allocation: same`."
        )


def check_initialisation(data: Mapping[str, Any]) -> None:
    """Raise LayerselError for initial LoRA weights that a selection does not support in this file's run."""
    if data.get("lora_model_dir"):
        return  # With an adapter to continue Axolotl does not look at these keys.
    check_loftq(data)
    initial = data.get("peft_init_lora_weights")
    check_supported(initial)
    lacking = None
    if find_zero_stage(data.get("deepspeed")) == 3:
        lacking = "ZeRO-3 has split before PEFT sees them. Use ZeRO-2"
    elif as_mapping(data.get("fsdp_config")).get("cpu_ram_efficient_loading"):
        lacking = "fsdp_config.cpu_ram_efficient_loading loads on one process alone. Set it to false"
    if changes_base(initial) and lacking:
        raise LayerselError(
            f"peft_init_lora_weights: {initial!r} is computed on every process from the base weights, which {lacking}, "
            "or another initialisation such as `gaussian`."
        )


def check_loftq(data: Mapping[str, Any]) -> None:
    """Raise LayerselError where LoftQ is asked for by its own block."""
    if as_mapping(data.get("peft")).get("loftq_config"):
        raise LayerselError("peft.loftq_config: LoftQ changes the base to match LoRA, and is not supported. Remove it.")
