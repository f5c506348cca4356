"""Compare the base model and the data of a plan with those of a run."""

from typing import Any

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.paths import name_model
from axolotl_layersel.config.facts import find_text_config, read_fact
from axolotl_layersel.selection.data.batch_rows import Collate, read_collated
from axolotl_layersel.selection.data.calibration import fingerprint, read_row
from axolotl_layersel.selection.methods.flexora.validation import join_eval_sets
from axolotl_layersel.selection.plan import Plan

# Config keys that tell models of one name apart, except for the vocabulary, which a run may extend, and quantisation.
SHAPE = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_local_experts",
    "num_experts",
)


def describe_shape(config: Any) -> dict[str, int | str]:
    """Return the shape of a model's language model, from its configuration."""
    text = find_text_config(config)
    values: dict[str, Any] = {key: read_fact(text, key) for key in SHAPE}
    return {key: value for key, value in values.items() if type(value) in (int, str)}


def shorten(base_model: str) -> str:
    """Return the name of a model by which two are compared, in lower case."""
    return name_model(base_model).lower()


def list_base_differences(plan: Plan, base_model: str | None, shape: dict[str, int | str] | None) -> list[str]:
    """Return the differences in name and shape between a run's base model and the one that a plan was made for.

    Args:
        plan: the reused plan.
        base_model: the run's, as a path or hub name; None or empty if unknown.
        shape: the run's, see ``describe_shape``; None if unknown.
    """
    differences = []
    if plan.base_model and base_model and shorten(plan.base_model) != shorten(base_model):
        differences.append(f"base_model: {base_model} is not {plan.base_model}, which it was made for")
    if plan.base_shape is not None and shape is not None:
        pairs = {key: (shape.get(key), plan.base_shape.get(key)) for key in SHAPE}
        made_for = f"{plan.base_model}, which it was made for," if plan.base_model else "the one that it was made for"
        differences += [
            f"base_model: {base_model or 'this model'} has {key}: {now!r}, and {made_for} has {then!r}"
            for key, (now, then) in pairs.items()
            if now != then
        ]
    return differences


def compare_data(plan: Plan, train_dataset: Any, eval_dataset: Any, collate: Collate | None = None) -> str | None:
    """Return how the rows that a plan was made on differ from those of the run; None if they do not, or none was read.

    ``collate``: the trainer's collator, for rows that are not tokenised.
    """
    if plan.dataset_fingerprint is None:
        return None
    search = plan.settings.get("flexora")
    of_eval = isinstance(search, dict) and search.get("val_source") == "eval"
    name = "eval" if of_eval else "training"
    dataset: Any = join_eval_sets(eval_dataset) if of_eval else train_dataset
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return f"it was made on rows of the {name} set, and this run has none that could be compared"
    highest = max(plan.calibration_rows, default=-1)
    if highest >= len(dataset):
        return f"it was made on row {highest} of the {name} set, and this run's has {len(dataset)} rows"
    read = None if collate is None else lambda row: read_collated(dataset, row, collate, plan.seed)
    try:
        samples = [read_row(dataset, row, read_untokenised=read) for row in plan.calibration_rows]
    except LayerselError:
        return f"the rows of this run's {name} set have no token ids"
    if fingerprint(samples) != plan.dataset_fingerprint:
        return f"the {len(samples)} rows of the {name} set that it was made on hold other tokens now"
    return None
