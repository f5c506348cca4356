"""The programs that will read the adapter."""

import math

from peft import get_peft_model_state_dict

from axolotl_layersel.cli.doctor.case import Case, Fact, add_up
from axolotl_layersel.cli.doctor.model import Model
from axolotl_layersel.config.selection import MAX_RANK_FACTOR, find_budget
from axolotl_layersel.lora.modules import get_adapter_name
from axolotl_layersel.lora.names import PREFIX
from axolotl_layersel.lora.patterns import scale_by_rank
from axolotl_layersel.lora.readers import AdapterFile, find_readers
from axolotl_layersel.reports.outcome import describe_readers


def describe_serving(case: Case, model: Model) -> list[Fact]:
    """Return which programs read the adapter as it is.

    The file is imagined: with LoRA in as many units as are kept, and with another rank in one module if ranks differ.
    """
    if case.block.selection is not None and case.block.selection.plan is not None:
        return [Fact("right", None, "The ranks of the plan decide which programs read the adapter as it is.")]
    file = imagine_file(case, model)
    readers = find_readers(file, model.stack.paths)
    facts = [Fact("right", readers.right, " ".join(describe_readers(readers)))]
    if readers.export_for:
        text = f"`axolotl-layersel export --for {readers.export_for}` writes it for the others."
        facts.append(Fact("export_for", readers.export_for, text))
    return facts


def imagine_file(case: Case, model: Model) -> AdapterFile:
    """Return the adapter file that the run is expected to write."""
    choice = case.choice
    assert choice is not None, "the case has a model"
    frozen = case.selection is not None and case.selection.unselected == "freeze"
    kept = set(model.sizes if frozen else choice.modules)
    config = model.peft.peft_config[get_adapter_name(model.peft)].to_dict()
    config["init_lora_weights"] = case.data.get("peft_init_lora_weights") or True
    config["use_rslora"] = bool(case.data.get("peft_use_rslora"))
    config["rank_pattern"] = dict(case.data.get("lora_rank_pattern") or {})
    named = dict(model.peft.named_parameters(remove_duplicate=False))
    shapes = {
        name: tuple(each.shape)
        for name, each in get_peft_model_state_dict(model.peft, named, save_embedding_layers=False).items()
        if is_kept(name.removeprefix(PREFIX), kept, set(model.sizes))
    }
    is_folded = case.block.l1ra is not None
    is_ranked = is_folded or (case.selection is not None and case.selection.rank_allocation != "same")
    if is_ranked and config["use_rslora"]:  # such a file has alphas for every rank in place of rsLoRA
        config["use_rslora"], config["lora_alpha"] = False, config["lora_alpha"] * math.sqrt(config["r"])
    first = next((name for name in choice.modules if f"{PREFIX}{name}.lora_A.weight" in shapes), None)
    if first is not None and (is_folded or (is_ranked and has_different_ranks(case, model, kept))):
        down, up = (shapes[f"{PREFIX}{first}.lora_{part}.weight"] for part in "AB")
        shapes[f"{PREFIX}{first}.lora_A.weight"] = (down[0] + 1, *down[1:])
        shapes[f"{PREFIX}{first}.lora_B.weight"] = (*up[:-1], up[-1] + 1)
        config["rank_pattern"][first] = down[0] + 1
        # The scaling, alpha / r, follows the rank; l1ra folds it into B, so that its file has one for all modules.
        exponent = 0 if is_folded else case.block.scaling_exponent or 0
        scaling = scale_by_rank(config["lora_alpha"] / down[0], down[0], down[0] + 1, exponent)
        config["alpha_pattern"] = {**config["alpha_pattern"], first: scaling * (down[0] + 1)}
    config["target_modules"] = sorted({name.rpartition(".")[2] for name in kept})
    return AdapterFile(config, shapes, len(model.stack.layers))


def has_different_ranks(case: Case, model: Model, kept: set[str]) -> bool:
    """Return whether modules of the adapter will have different ranks, with ``rank_allocation`` other than ``same``.

    ``kept``: the modules of the adapter. Units that scores or gates decide on are taken to be the lowest ones.
    """
    settings, choice = case.selection, case.choice
    assert settings is not None and choice is not None and model.units is not None, "the case has a selection"
    if settings.rank_allocation == "score" or choice.kept is None:
        return True
    units = [unit for unit in model.units if set(choice.modules).issuperset(unit.modules)]
    costs = {unit.name: add_up(model.component_sizes, unit.modules) for unit in units}
    lora = sum(add_up(model.sizes, unit.modules) for unit in model.units)
    most = settings.max_rank or MAX_RANK_FACTOR * case.lora_r
    # The rule of ``selection.ranks.match_budget``, whose imports take seconds: the first unit by name gets more first.
    rank, left = divmod(find_budget(settings, lora), sum(costs.values()))
    if rank < most and left >= costs[min(costs)]:
        return True
    others = kept.difference(name for unit in units for name in unit.modules)  # they stay at ``lora_r``
    return bool(others) and min(rank, most) != case.lora_r


def is_kept(name: str, kept: set[str], modules: set[str]) -> bool:
    """Return whether a tensor will be in the file: those of no LoRA module, and of the ones that are kept."""
    module = name.partition(".lora_")[0]
    return module in kept or module not in modules
