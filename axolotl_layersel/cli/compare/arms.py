"""The arms of a comparison: their names, and the keys of the YAML file that each of them sets."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from axolotl_layersel.cli.compare.cells import BEST, PAGE, PICTURES, PREPARED
from axolotl_layersel.cli.compare.figures import COMPARISON, LORA, RANDOM, ArmSettings
from axolotl_layersel.common.errors import LayerselError, suggest
from axolotl_layersel.common.files import read_parsed
from axolotl_layersel.config.methods import METHODS, Method
from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.config.selection import IDLE_BOUNDS, SelectionConfig, find_new_rank_faults
from axolotl_layersel.config.strict_block import as_mapping, as_number, as_whole, quote
from axolotl_layersel.training.ending import describe_error

L1RA = "l1ra"
PLUS = f"+{L1RA}"  # the end of the name of an arm that chooses layers and moves rank
AT = f"{LORA}@"  # the begin of the name of plain LoRA at another rank
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@+-]*")  # of an arm, which is also the name of a folder
TAKEN = (BEST, COMPARISON, PAGE, PICTURES, PREPARED)  # the other names in the folder of a comparison
# Settings of the user's selection that also apply to an arm of another method.
SHARED = ("candidates", "unselected", "outside_layers", "stacks", "plan_check")
BUDGETS = ("budget", "budget_parameters")
# Keys that are equal in all arms, or that the comparison itself sets.
COMMON = (
    "base_model",
    "dataset_prepared_path",
    "datasets",
    "learning_rate",
    "max_steps",
    "num_epochs",
    "output_dir",
    "plugins",
    "seed",
    "sequence_len",
    "test_datasets",
    "val_set_size",
)


def make_arms(names: Sequence[str] | None, data: Mapping[str, Any], own: Path | None = None) -> dict[str, ArmSettings]:
    """Return the arms of a comparison by name: ``lora`` first, and ``random`` last if it was added.

    Args:
        names: the names that the user gave; None takes the defaults, or only the user's own arms if there are any.
        data: the content of the user's YAML file.
        own: the file of the user's own arms.

    Raises:
        LayerselError: for an unknown name, or an arm whose settings are refused.
    """
    arms = {} if own is None else read_own_arms(own)
    if names is None:
        names = list_default_names(data) if own is None else []
    for name in names:
        if name not in arms:
            arms[name] = make_arm(name, data)
    arms = {LORA: make_arm(LORA, data), **arms}
    if any(arm.choosing for arm in arms.values()) and RANDOM not in arms:
        arms[RANDOM] = make_arm(RANDOM, data)
    return arms


def list_default_names(data: Mapping[str, Any]) -> list[str]:
    """Return the names of the default arms, with that of the file's own ``layersel`` block if it has one."""
    names = [LORA]
    block = as_mapping(data.get("layersel"))
    method = as_mapping(block.get("selection")).get("method")
    if block:
        names.append(f"{method}{PLUS}" if method and L1RA in block else str(method or L1RA))
    names += ["gradient", "cka", RANDOM, f"{AT}{2 * find_rank(data)}"]
    return list(dict.fromkeys(names))


def find_rank(data: Mapping[str, Any]) -> int:
    """Return ``lora_r`` of a YAML file.

    Raises:
        LayerselError: if it is missing or no rank.
    """
    rank = as_whole(data.get("lora_r"))
    if rank is None or rank < 1:
        raise LayerselError(f"lora_r: {quote(data.get('lora_r'))} is not a valid rank. Set 1 or more, such as 16.")
    return rank


def make_arm(name: str, data: Mapping[str, Any]) -> ArmSettings:
    """Return the arm with a name that this package knows.

    Raises:
        LayerselError: if it does not know the name, or the settings of the file are refused for this arm.
    """
    if name == LORA:
        return ArmSettings(keys={"layersel": None}, choosing=False)
    if name.startswith(AT):
        return make_rank_arm(name, data)
    method, moves = name.removesuffix(PLUS), name == L1RA or name.endswith(PLUS)
    if method != L1RA and method not in METHODS:
        known = [LORA, f"{AT}{2 * find_rank(data)}", L1RA, *METHODS, *(f"{each}{PLUS}" for each in METHODS)]
        raise LayerselError(f"--arms: {quote(name)} is not known: {suggest(name, known)}")
    block: dict[str, Any] = {}
    if method != L1RA:
        block["selection"] = make_selection(METHODS[method], data)
    if moves:
        block[L1RA] = dict(as_mapping(as_mapping(data.get("layersel")).get(L1RA)))
    check_block(name, block)
    exponent = as_mapping(data.get("layersel")).get("scaling_exponent")
    if exponent is not None and not LayerselConfig.model_validate(block).keeps_rank():
        block["scaling_exponent"] = exponent
        check_block(name, block)
    return ArmSettings(keys={"layersel": block}, choosing=chooses(block))


def make_rank_arm(name: str, data: Mapping[str, Any]) -> ArmSettings:
    """Return plain LoRA at the rank in ``name``, with the scaling of the YAML file.

    Raises:
        LayerselError: if the rank is the file's own or no rank, or if no ``lora_alpha`` keeps the scaling.
    """
    rank, lora_r = as_whole(name.removeprefix(AT)), find_rank(data)
    if rank is None or rank < 1:
        raise LayerselError(f"--arms: {quote(name)} has no valid rank. Write a rank such as {AT}{2 * lora_r}.")
    if rank == lora_r:
        raise LayerselError(f"--arms: {name} is the arm `{LORA}` itself, because lora_r is {lora_r}. Leave it out.")
    keys: dict[str, Any] = {"layersel": None, "lora_r": rank}
    alpha = as_number(data.get("lora_alpha"))
    # With rsLoRA the scaling is alpha / √r, which is made to keep one alpha at all ranks.
    if alpha is not None and not data.get("peft_use_rslora"):
        scaled = alpha * rank / lora_r
        if not scaled.is_integer():
            raise LayerselError(
                f"--arms: {name} needs lora_alpha: {scaled:g} for the scaling of the file (lora_alpha: {alpha:g} with "
                f"lora_r: {lora_r}), but Axolotl takes whole numbers only. Choose another rank."
            )
        keys["lora_alpha"] = int(scaled)
    return ArmSettings(keys=keys, choosing=False)


def make_selection(method: Method, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``selection`` block of an arm: the file's own for its method, and one with equal parameters otherwise.

    Ranks are as high as LoRA's parameters allow. Where ranks cannot change, such as after a search on an engine that
    splits weights, they stay at ``lora_r``, and the arm has fewer parameters. The arm ``random`` has no ``seed`` of its
    own: as a control it draws other layers with each seed of the comparison.
    """
    given = as_mapping(as_mapping(data.get("layersel")).get("selection"))
    if given.get("method") == method.name:
        return {key: value for key, value in given.items() if method.name != RANDOM or key != "seed"}
    block: dict[str, Any] = {"method": method.name}
    scored = method.rank_allocation == "score"
    if not scored:
        block["rank_allocation"] = "match"
    kept = [*SHARED, *BUDGETS, "max_rank", *(key for key in method.keys if key not in ("seed", "keep", "layers"))]
    if scored:
        kept.append("min_rank")
    elif "keep" not in method.keys:  # with scores, and with gates, these decide how many units are kept
        kept += ["ratio", *(["num_layers"] if method.units[0] == "layer" else [])]
    block |= {key: given[key] for key in kept if given.get(key) is not None}
    samples = as_whole(block.get("num_samples"))
    if samples is not None and samples < method.fewest_samples:
        block["num_samples"] = method.fewest_samples
    try:
        fault = next(find_new_rank_faults(data, SelectionConfig.model_validate(block)), None)
    except ValidationError:
        return block  # `check_block` reports it with the name of the arm
    if fault is not None:  # the arm then has the ranks of the file
        idle = (*BUDGETS, *IDLE_BOUNDS["same"])
        block = {key: value for key, value in block.items() if key not in idle} | {"rank_allocation": "same"}
    return block


def chooses(block: Mapping[str, Any]) -> bool:
    """Return whether a ``layersel`` block chooses by the data."""
    method = METHODS.get(str(as_mapping(block.get("selection")).get("method")))
    return method is not None and method.needs_data


def check_block(name: str, block: Mapping[str, Any]) -> None:
    """Raise LayerselError if a ``layersel`` block is refused; the message names the arm."""
    try:
        LayerselConfig.model_validate(block)
    except ValidationError as error:
        raise LayerselError(f"arm {name}: {'; '.join(describe_error(error).splitlines())}") from error


def read_own_arms(path: Path) -> dict[str, ArmSettings]:
    """Return the arms in a YAML file, which maps each name to the keys that the arm sets.

    Raises:
        LayerselError: if the file or an arm of it is refused.
    """
    way_out = "Write a name for each arm, and below it the keys that it sets, such as `layersel:`."
    try:
        content = read_parsed("--arms-file", path, way_out, yaml.safe_load)
    except yaml.YAMLError as error:
        raise LayerselError(f"--arms-file: {path} is not valid YAML ({error}). {way_out}") from error
    if not isinstance(content, dict) or not content:
        raise LayerselError(f"--arms-file: {path} is not a mapping of arms. {way_out}")
    arms = {}
    for name, keys in content.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise LayerselError(
                f"--arms-file: {quote(name)} is not a name for an arm. Use letters, digits, and the characters _.@+-, "
                "and begin with a letter or a digit."
            )
        if name in TAKEN:
            raise LayerselError(
                f"--arms-file: {name} is the name of a file or folder that the command itself writes. Use another name."
            )
        if name in (LORA, RANDOM) or name.startswith(AT):
            raise LayerselError(f"--arms-file: {name} is the name of an arm of the command. Use another name.")
        if not isinstance(keys, dict) or not keys:
            raise LayerselError(f"--arms-file: the arm {name} sets no keys. {way_out}")
        shared = next((key for key in keys if key in COMMON), None)
        if shared is not None:
            raise LayerselError(f"--arms-file: the arm {name} sets {shared}, which is the same in all arms. Remove it.")
        block = keys.get("layersel")
        if block is not None:
            if not isinstance(block, dict):
                raise LayerselError(f"arm {name}: layersel: {quote(block)} is not a mapping.")
            check_block(name, block)
        arms[name] = ArmSettings(keys={"layersel": None, **keys}, choosing=chooses(as_mapping(block)))
    return arms
