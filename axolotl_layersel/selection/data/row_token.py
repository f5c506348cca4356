"""The token of a row that ``token: auto`` resolves to, by the kind of model.

Relied on in transformers 5.16.1: models that read a row in both directions are in the mapping of masked language
models, by ``model_type``; ``is_decoder`` is true where one of them is built as a decoder instead. Their
classification heads read the first token, except with ``classifier_pooling``, which is ``mean`` in some ModernBERT and
``late``, a mean of all tokens' logits, in EuroBERT. ``tests/families/test_encoders.py`` compares this with the models.
"""

from typing import cast

from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from axolotl_layersel.config.facts import read_fact
from axolotl_layersel.config.layer_names import VISION
from axolotl_layersel.config.selection import Token

MEANS = ("mean", "late")


def is_encoder(base: PreTrainedModel) -> bool:
    """Return whether every token of a transformers model attends to the whole row."""
    config = base.config
    turned = read_fact(config, "is_decoder") or read_fact(config, "is_encoder_decoder")
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not turned


def find_token(base: PreTrainedModel, token: str, side: str = "") -> Token:
    """Return the token that stands for a row: ``cls``, ``mean``, ``last``, or ``ending`` for the last one before it.

    Args:
        base: a transformers model.
        token: the setting. ``auto`` is an encoder's first token, or the mean if its own pooling is a mean, and in other
            models the last token before the ending that nearly all rows share. An encoder with a decoder has no token
            that stands for a row, because the decoder reads all of them: it is the mean. For the patches of a vision
            tower it always is the mean.
        side: the side of the model, see ``layers.Side``.
    """
    if side == VISION:
        return "mean"
    if token != "auto":
        return cast(Token, token)
    if side == "encoder":
        return "mean"
    if not is_encoder(base):
        return "ending"
    return "mean" if read_fact(base.config, "classifier_pooling") in MEANS else "cls"
