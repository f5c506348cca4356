"""The logit that answers each label, for three kinds of models, which are told apart by their loss in transformers.

Relied on in transformers 5.16.1: ``PreTrainedModel.loss_type`` names the loss by the model's class, such as
``ForMaskedLM``, or is None for other class names (GPT2LMHeadModel, MarianMTModel). Encoder-decoder models compare each
logit with the label of its own position, whatever the name of their loss.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.facts import read_fact

IGNORED_LABEL = -100

NEXT_TOKEN = "next token"  # the logits at a token answer the label of the token after it
SAME_TOKEN = "same token"  # the logits at a token answer its own label: masked language models, token classification
ROW = "row"  # a row has one label, or one for each output: classification and regression of whole rows

KINDS_BY_LOSS = {
    "ForCausalLM": NEXT_TOKEN,
    "ForConditionalGeneration": NEXT_TOKEN,
    "ForMaskedLM": SAME_TOKEN,
    "ForTokenClassification": SAME_TOKEN,
    "ForSequenceClassification": ROW,
}
# Collators of transformers rename the others to the first.
LABEL_COLUMNS = ("labels", "label", "label_ids")


def find_kind(model: nn.Module) -> str:
    """Return the kind of labels, see above, that the logits of ``model``, a PEFT model or a plain one, answer.

    Raises:
        LayerselError: if its class does not tell.
    """
    base = getattr(model, "get_base_model", lambda: model)()
    kind = KINDS_BY_LOSS.get(getattr(base, "loss_type", None) or "")
    if kind is None:
        names = {ancestor.__name__ for ancestor in type(base).__mro__}
        # A few old classes are in both mappings; their losses do not shift.
        if not names.isdisjoint(MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()):
            kind = SAME_TOKEN
        elif not names.isdisjoint(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
            kind = NEXT_TOKEN
        elif not names.isdisjoint(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()):
            kind = SAME_TOKEN
    if kind is None:
        raise LayerselError(
            f"base_model: {type(base).__name__} is not known to be a causal or masked language model, or one that "
            "classifies tokens or rows, so it cannot be told which of its logits answers which label. Use "
            "`layersel.selection.method: cka` or `cosine`, which look at no labels, or another model class."
        )
    encoder_decoder = read_fact(getattr(base, "config", None), "is_encoder_decoder")
    return SAME_TOKEN if kind == NEXT_TOKEN and encoder_decoder else kind


def align(labels: torch.Tensor, kind: str) -> torch.Tensor:
    """Return the label that the logits at each position answer, −100 without one, in the shape of ``labels``.

    Args:
        labels: (..., tokens) as in a data set, −100 where not trained on; of rows, any shape.
        kind: the kind of labels, see ``find_kind``.
    """
    if kind != NEXT_TOKEN:
        return labels
    return nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORED_LABEL)


def get_labels(row: Mapping[str, Any]) -> Any:
    """Return the labels of a row of a data set, None without any."""
    found = (row[column] for column in LABEL_COLUMNS if row.get(column) is not None)
    return next((labels for labels in found if not isinstance(labels, str)), None)  # text can have the same name


def count_answered(labels: torch.Tensor, kind: str) -> int:
    """Return the number of logits, of tokens or rows, that have a label to answer.

    Args:
        labels: (..., tokens); of rows (rows,) or (rows, outputs).
        kind: the kind of labels, see ``find_kind``.
    """
    if labels.is_floating_point():
        return len(labels)  # regression targets, none of which is ignored
    return int(align(labels, kind).ne(IGNORED_LABEL).sum())


def log_likelihood(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the summed log-likelihood of the targets, a scalar in fp32.

    Args:
        logits: (positions, classes).
        targets: (positions,), as ``align`` returns them; −100 adds nothing.
    """
    answered = targets != IGNORED_LABEL
    return -nn.functional.cross_entropy(logits[answered].float(), targets[answered], reduction="sum")


def row_log_likelihood(logits: torch.Tensor, label: torch.Tensor, problem_type: str | None) -> torch.Tensor:
    """Return the log-likelihood of one row's label up to a constant: minus the loss, summed over the outputs.

    Args:
        logits: (outputs,).
        label: one number, or (outputs,).
        problem_type: as in the model's configuration; None to infer it from the label as transformers does.
    """
    logits = logits.float()
    if problem_type is None:
        whole = not label.is_floating_point() and label.numel() == 1
        problem_type = "single_label_classification" if whole else "multi_label_classification"
        problem_type = "regression" if len(logits) == 1 else problem_type
    if problem_type == "single_label_classification":
        return log_likelihood(logits[None], label.view(1))
    label = label.float().view(-1)
    if problem_type == "regression":
        return -nn.functional.mse_loss(logits, label, reduction="sum")
    return -nn.functional.binary_cross_entropy_with_logits(logits, label, reduction="sum")
