"""The inputs of a decoder with an encoder: the row's answer, shifted by the model itself.

Relied on in transformers 5.16.1: ``prepare_decoder_input_ids_from_labels`` of a model makes decoder inputs of labels,
as its own ``forward`` and ``DataCollatorForSeq2Seq`` do. BART's and T5's sequence classifiers give their decoder the
row itself, and have no such method. ``tests/families/test_encoder_decoders.py`` compares measurements with the models.
"""

import dataclasses

import torch
from transformers import PreTrainedModel

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.selection.data.calibration import Sample
from axolotl_layersel.selection.data.label_alignment import IGNORED_LABEL, ROW, find_kind

SHIFT = "prepare_decoder_input_ids_from_labels"


def give_decoder_inputs(samples: list[Sample], base: PreTrainedModel) -> list[Sample]:
    """Return the samples with the decoder inputs of ``base``, a transformers model, without padding.

    Samples for models with one label per row are returned unchanged.

    Raises:
        LayerselError: if the decoder's tokens of a row are unknown.
    """
    return samples if find_kind(base) == ROW else [give_decoder_input(sample, base) for sample in samples]


def give_decoder_input(sample: Sample, base: PreTrainedModel) -> Sample:
    """Return one sample as ``give_decoder_inputs`` does."""
    labels = trim(sample.labels) if isinstance(sample.labels, list) else None
    given = sample.decoder_input_ids
    if given is not None:
        cut = labels is not None and len(sample.labels) == len(given)
        given = given[: len(labels)] if labels is not None and cut else given
    elif labels:
        shift = getattr(base, SHIFT, None)
        if shift is None:
            raise LayerselError(
                f"base_model: {type(base).__name__} has no {SHIFT}, so it cannot be told what its decoder is given. "
                "Give the rows a column decoder_input_ids, or use a method that needs no data: random, first, last, "
                "explicit."
            )
        given = shift(labels=torch.tensor([labels]))[0].tolist()
    if not given:
        raise LayerselError(
            f"datasets: training row {sample.row} has neither labels nor decoder_input_ids, so the decoder of "
            f"{type(base).__name__} is given nothing. Give the rows labels, or use a method that needs no data: "
            "random, first, last, explicit."
        )
    return dataclasses.replace(sample, labels=labels, decoder_input_ids=given)


def trim(labels: list[int]) -> list[int]:
    """Return labels without ignored ones at the end."""
    answered = [place for place, label in enumerate(labels) if label != IGNORED_LABEL]
    return labels[: answered[-1] + 1] if answered else []
