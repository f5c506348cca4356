"""Check that all processes of a run agree, and name a difference before it hangs the run or spoils its adapter."""

import logging
import platform
import random
import re
from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset

from axolotl_layersel.common.digests import hash_json, hash_tensor
from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.versions import find_version
from axolotl_layersel.config.initialisation import changes_base
from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.config.strict_block import quote
from axolotl_layersel.engines import collectives
from axolotl_layersel.lora.run import Run

LOG = logging.getLogger("axolotl.layersel")

PACKAGES = ("axolotl-layersel", "axolotl", "torch", "transformers", "peft", "accelerate", "deepspeed")
PATIENCE = 600  # seconds that processes wait at the first check, which all should reach within seconds
SAMPLED_ROWS = 32
SHOWN = 16  # characters of a digest
# Values of a frozen weight at each end, where a resized vocabulary has its new rows, and about as many in between.
SAMPLED_VALUES = 2**16
# A base weight of a layer with LoRA. The names of heads and embeddings have no number.
LAYER_WEIGHT = re.compile(r"\.\d+\..*\.base_layer\.")
# What to do about a difference, by the group of facts that it is in.
WAYS_OUT = {
    "settings": "Start all processes from the same YAML file and with the same options.",
    "versions": "Install the same versions on all nodes.",
    "rows": "Give all nodes the same files, and delete the other files in `dataset_prepared_path`.",
    "weights": "Give all nodes the same base model and the same adapter.",
    "base model": "Scores would mix two models: give all nodes the same base model.",
}
# Keys of the YAML file that determine a run, and so must be equal in all processes. Nodes may keep models and data at
# different paths, so the contents are compared instead; output_dir must agree, because checkpoints name paths below it.
AGREEING_KEYS = (
    *("output_dir", "resume_from_checkpoint"),
    *("adapter", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_linear"),
    *("lora_modules_to_save", "peft_layers_to_transform", "lora_rank_pattern", "lora_alpha_pattern"),
    *("peft_use_rslora", "peft_use_dora", "peft_init_lora_weights", "load_in_8bit", "load_in_4bit", "rl"),
    *("seed", "max_steps", "num_epochs", "micro_batch_size", "gradient_accumulation_steps", "sequence_len"),
    *("sample_packing", "learning_rate", "lr_scheduler", "warmup_steps", "warmup_ratio", "optimizer", "weight_decay"),
    *("max_grad_norm", "val_set_size", "save_steps", "save_strategy", "eval_steps", "eval_strategy"),
    *("load_best_model_at_end", "early_stopping_patience", "auto_resume_from_checkpoints", "gradient_checkpointing"),
    *("deepspeed", "fsdp", "fsdp_version", "fsdp_config", "bf16", "fp16"),
)
# The same of the Trainer's arguments and of PEFT's configuration, by the YAML keys that set them.
SAME_NAMES = (
    *("output_dir", "seed", "max_steps", "gradient_accumulation_steps", "learning_rate", "warmup_steps"),
    *("weight_decay", "max_grad_norm", "save_steps", "eval_steps", "load_best_model_at_end"),
)
ARGUMENTS = {
    **dict(zip(SAME_NAMES, SAME_NAMES)),
    "num_epochs": "num_train_epochs",
    "micro_batch_size": "per_device_train_batch_size",
    "lr_scheduler": "lr_scheduler_type",
    "optimizer": "optim",
}
ADAPTER_SETTINGS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "peft_use_rslora": "use_rslora",
    "peft_use_dora": "use_dora",
    "peft_init_lora_weights": "init_lora_weights",
    "lora_rank_pattern": "rank_pattern",
}


def check_started_alike(settings: Mapping[str, Any]) -> None:
    """Raise LayerselError, on every process, unless all have the same ``settings``, nested by key, and packages.

    The error also names processes that do not call this within ``PATIENCE`` seconds.
    """
    absent = collectives.find_absent_ranks("started", PATIENCE)
    if absent:
        raise LayerselError(
            f"plugins: processes {absent} have not started axolotl_layersel in {PATIENCE} seconds. Read their logs; if "
            "they are still running, list the plugin in the YAML files of all processes."
        )
    check_same({"settings": settings, "versions": find_versions()})


def check_trainers_alike(run: Run, settings: LayerselConfig, resume_from: str | None, continues_adapter: bool) -> None:
    """Raise LayerselError, on every process, unless the trainers of all have the same settings, rows and packages.

    ``resume_from`` and ``continues_adapter``: see ``prepare_trainer``.
    """
    if not collectives.is_distributed():
        return
    arguments = run.trainer.args
    chosen = {
        "layersel": settings.model_dump(),
        **{key: getattr(arguments, name) for key, name in ARGUMENTS.items()},
        **{key: getattr(run.config, name) for key, name in ADAPTER_SETTINGS.items()},
        "resume_from_checkpoint": resume_from,
        "lora_model_dir": "given" if continues_adapter else None,
    }
    rows = {
        "datasets": describe_rows(run.trainer.train_dataset, arguments.seed),
        "eval set": describe_rows(run.trainer.eval_dataset, arguments.seed),
    }
    check_same({"settings": chosen, "versions": find_versions(), "rows": rows})


@torch.no_grad()
def share_new_weights(run: Run, continues_adapter: bool) -> None:
    """Give all processes the newly initialised weights of process 0, as DDP does; a collective call.

    These are heads, embeddings of a resized vocabulary, and LoRA that was not drawn from the seed. Call it before the
    engine is built. Processes without whole weights are not compared.

    Args:
        run: the run whose model it is.
        continues_adapter: whether the LoRA weights are a trained adapter's, and so not new.

    Raises:
        LayerselError: on every process, if weights differ that were read from files.
    """
    if not collectives.is_distributed():
        return
    weights, digests = find_weights(run), None
    if run.engine.has_weights():
        digests = {name: hash_weight(weight, whole=weight.requires_grad) for name, weight in weights.items()}
    if not collectives.find_differing_ranks(None if digests is None else repr(digests).encode()):
        return
    everyone = [theirs for theirs in collectives.gather_from_all(digests) if theirs is not None]
    differing = [name for name in everyone[0] if any(theirs.get(name) != everyone[0][name] for theirs in everyone)]
    # Weights that a process lacks, or has in another shape, can be neither compared nor copied.
    shapes = {shorten(name, run.adapter): str(list(weight.shape)) for name, weight in weights.items()}
    check_same({"weights": {"shape of weights": None if digests is None else shapes}})
    lora, given = sort_weights(run, differing)
    check_same({"weights": {"initial LoRA weights": pick(digests, lora if continues_adapter else {})}})
    check_same({"base model": {"base weights": pick(digests, given)}})
    for name in differing:
        share(run, weights[name])
    if collectives.get_rank() == 0:
        LOG.info(
            "layersel: %d weights were new in each process, such as %s; all processes take those of process 0",
            len(differing),
            differing[0],
        )


def find_weights(run: Run) -> dict[str, torch.Tensor]:
    """Return the weights that this process holds whole, by name, except frozen ones of a tensor subclass."""
    return {
        name: parameter
        for name, parameter in run.model.named_parameters()
        if run.engine.holds_whole(parameter)
        and not parameter.is_meta
        and (parameter.requires_grad or type(parameter.data) is torch.Tensor)
    }


def sort_weights(run: Run, names: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the LoRA weights among ``names``, and those that were read from the files of the base model.

    The latter are quantised weights, and those of layers with LoRA, unless its initialisation changes them. The keys
    are the names for messages.
    """
    lora = {shorten(name, run.adapter): name for name in names if ".lora_" in name}
    computed = changes_base(run.config.init_lora_weights)
    parameters = dict(run.model.named_parameters())
    given = {
        shorten(name, run.adapter): name
        for name in names
        if (LAYER_WEIGHT.search(name) and not computed) or not parameters[name].is_floating_point()
    }
    return lora, given


def shorten(name: str, adapter: str) -> str:
    """Return the name of a weight in the file of an adapter."""
    return name.replace(f".{adapter}.", ".").replace(".base_layer.", ".")


def pick(digests: dict[str, str] | None, names: Mapping[str, str]) -> dict[str, str] | None:
    """Return the digests of ``names``, by the names for messages; None for a process that is not compared."""
    return None if digests is None else {shown: digests[name] for shown, name in names.items()}


def share(run: Run, weight: torch.Tensor) -> None:
    """Copy process 0's values of ``weight`` to all processes, in place; a collective call."""
    values = weight.detach().contiguous().flatten().view(torch.uint8).to(run.device)
    collectives.broadcast(values)
    weight.data.copy_(values.to(weight.device).view(weight.dtype).view(weight.shape))


def check_same(facts: Mapping[str, Mapping[str, Any] | None]) -> None:
    """Raise LayerselError, on every process, for the first process and key with another value than process 0.

    A collective call. ``facts``: by group, see ``WAYS_OUT``, and by nested key; None in a process that is not compared.
    """
    everyone = collectives.gather_from_all({group: make_plain(values) for group, values in facts.items()})
    for group, way_out in ((group, WAYS_OUT[group]) for group in facts):
        for process, theirs in enumerate(everyone):
            difference = None if theirs[group] is None else find_difference(everyone[0][group], theirs[group])
            if difference:
                key, here, there = difference
                raise LayerselError(
                    f"{key}: {quote(there)} on process {process}, {quote(here)} on process 0. {way_out}"
                )


def find_difference(ours: Any, theirs: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """Return the first difference of two nested mappings as a dotted key and both values, or None."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for name in {**ours, **theirs}:
            inner = f"{key}.{name}" if key else name
            difference = find_difference(ours.get(name), theirs.get(name), inner)
            if difference:
                return difference
        return None
    return None if ours == theirs else (key, ours, theirs)


def make_plain(value: Any) -> Any:
    """Return a value as numbers, texts, lists and dictionaries, which are equal for equal values in every process."""
    if isinstance(value, Mapping):
        return {str(key): make_plain(inner) for key, inner in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return [make_plain(inner) for inner in value]
    value = getattr(value, "value", value)  # an enumeration's
    return value if value is None or isinstance(value, bool | int | float | str) else str(type(value))


def find_versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages that a run depends on; None for a missing one."""
    versions: dict[str, str | None] = {"version of Python": ".".join(platform.python_version_tuple()[:2])}
    versions |= {f"version of {name}": find_version(name) for name in PACKAGES}
    return versions


def describe_rows(dataset: Any, seed: int) -> Any:
    """Return the number of a dataset's rows and the digest of a sample drawn by ``seed``; None if it is streamed.

    Only stored rows are hashed, without any transformation.
    """
    if isinstance(dataset, Mapping):
        return {name: describe_rows(part, seed) for name, part in dataset.items()}
    if not hasattr(dataset, "__len__"):
        return None
    count = len(dataset)
    if not isinstance(dataset, Dataset):
        return {"number of rows": count}
    drawn = random.Random(seed).sample(range(count), min(count, SAMPLED_ROWS))
    untransformed = dataset.with_format(None)
    rows = [untransformed[row] for row in drawn]
    digest = hash_json(rows, default=lambda value: str(type(value)))
    return {"number of rows": count, "hash of some rows": digest[:SHOWN]}


def hash_weight(weight: torch.Tensor, whole: bool = True) -> str:
    """Return a digest of a weight; for a large one, unless ``whole``, of its ends and of a sample in between."""
    values = weight.detach().flatten()
    if not whole and len(values) > 3 * SAMPLED_VALUES:
        between = values[:: len(values) // SAMPLED_VALUES]
        values = torch.cat([values[:SAMPLED_VALUES], between, values[-SAMPLED_VALUES:]])
    return hash_tensor(values)[:SHOWN]
