"""Write a plan, or the ranks of a trained adapter, as an experiment of PEFT's method comparison.

The experiment is a folder with an adapter_config.json and a training_params.json, as seen in huggingface/peft at commit
30072d5, method_comparison/MetaMathQA. No weights are read: PEFT's script trains from scratch, with AdamW and a cosine
schedule. benchmarks/peft_method_comparison/README.md says how to make a plan and propose the folder.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import yaml
from peft import LoraConfig
from peft.utils import CONFIG_NAME

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.files import write_atomically
from axolotl_layersel.lora.layouts import read_config, sort_sets
from axolotl_layersel.lora.patterns import write_pattern
from axolotl_layersel.selection.plan import Plan
from axolotl_layersel.selection.plan_file import read_plan

BASE_MODEL = "meta-llama/Llama-3.2-3B"  # the comparison's own, which its parameters need not name
PARAMETERS = "training_params.json"


def describe_plan(plan: Plan, run: dict[str, Any]) -> LoraConfig:
    """Return the LoRA configuration of a plan that was made with the Axolotl file of content ``run``.

    As in a run with the plugin, the scaling of every module is what ``lora_alpha`` and ``lora_r`` make it, whatever its
    rank.

    Raises:
        LayerselError: if the plan was made for another ``lora_r``, or keeps LoRA in experts.
    """
    lora_r, lora_alpha, by_root = run["lora_r"], run["lora_alpha"], bool(run.get("peft_use_rslora"))
    made_for = plan.budget.lora_r if plan.budget else None
    if made_for not in (None, lora_r):
        raise LayerselError(f"CONFIG: lora_r: {lora_r} is not the {made_for} of the plan. Give the file that made it.")
    if run.get("lora_target_parameters"):
        raise LayerselError("CONFIG: lora_target_parameters: LoRA on experts cannot be written. Remove the key.")
    scaling = lora_alpha / (math.sqrt(lora_r) if by_root else lora_r)
    ranks = {name: plan.ranks.get(name, lora_r) for name in (*plan.modules, *plan.modules_outside)}
    highest = max(ranks.values())
    lower = {name: rank for name, rank in ranks.items() if rank != highest}
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=highest,
        lora_alpha=shorten(scaling * highest),  # type: ignore[arg-type]  # PEFT takes a float too
        lora_dropout=run.get("lora_dropout") or 0.0,
        target_modules=sorted(ranks),
        rank_pattern=write_pattern(lower),
        alpha_pattern=write_pattern({name: shorten(scaling * rank) for name, rank in lower.items()}),
    )


def shorten(value: float) -> float:
    """Return a whole number as an int, for files that people read."""
    return int(value) if value == int(value) else value


def read_source(source: Path, run: dict[str, Any]) -> LoraConfig:
    """Return the LoRA configuration to train with, from a plan.json or from the folder of a trained adapter.

    Raises:
        LayerselError: if ``source`` is neither, or does not fit the Axolotl file of content ``run``.
    """
    if not source.is_dir():
        return describe_plan(read_plan(source, "SOURCE"), run)
    config = read_config(source / CONFIG_NAME)
    if not isinstance(config, LoraConfig):
        raise LayerselError(f"SOURCE: {source} holds a {config.peft_type} adapter. Give the folder of a LoRA adapter.")
    # Where it is trained, and not where it was.
    config.base_model_name_or_path, config.inference_mode = None, False
    return config


def describe_training(run: dict[str, Any]) -> dict[str, Any]:
    """Return what the experiment says of its training, from the content of an Axolotl file.

    Raises:
        LayerselError: if the file trains with an optimizer or a schedule that the comparison does not have.
    """
    for key, expected in (("optimizer", "adamw_torch"), ("lr_scheduler", "cosine")):
        if run[key] != expected:
            raise LayerselError(f"CONFIG: {key}: {run[key]} is not what the comparison trains with. Use {expected}.")
    own = {"lr": run["learning_rate"], "weight_decay": run["weight_decay"]}
    model = {} if run["base_model"] == BASE_MODEL else {"model_id": run["base_model"]}
    return {**model, "optimizer_kwargs": own}


def write_experiment(run: dict[str, Any], source: Path, experiment: Path) -> None:
    """Write the two files of an experiment to the folder ``experiment``.

    Args:
        run: the content of the Axolotl file that made the plan or trained the adapter.
        source: a plan.json, or the folder of an adapter.
        experiment: a folder without such files; the comparison's experiments are never changed.

    Raises:
        LayerselError: if ``source`` cannot be used, or the folder has an experiment.
    """
    if (experiment / CONFIG_NAME).exists():
        raise LayerselError(f"EXPERIMENT: {experiment} has an {CONFIG_NAME}. Give the experiment another name.")
    config, training = read_source(source, run), describe_training(run)
    sort_sets(config)
    for name, content in ((CONFIG_NAME, config.to_dict()), (PARAMETERS, training)):
        write_atomically(experiment / name, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("config", type=Path, help="the Axolotl file that made the plan or trained the adapter")
    parser.add_argument("source", type=Path, help="a plan.json, or the folder of an adapter")
    parser.add_argument("experiment", type=Path, help="the folder to write, such as experiments/lora/NAME")
    given = parser.parse_args()
    try:
        write_experiment(yaml.safe_load(given.config.read_text(encoding="utf-8")), given.source, given.experiment)
    except LayerselError as error:
        raise SystemExit(str(error)) from error
    print(f"{given.experiment}: {CONFIG_NAME} and {PARAMETERS}")


if __name__ == "__main__":
    main()
