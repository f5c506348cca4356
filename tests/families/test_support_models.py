"""Every method, and l1ra, on decoders and multimodal models of many families: rows of the table of models."""

import functools

import pytest
import torch
from helpers.families import FAMILIES, make_family, make_lora_family
from helpers.models import make_trainer
from helpers.multimodal import MAKERS, Collator, Rows, make_lora_multimodal, make_multimodal
from helpers.multimodal import make_trainer as make_multimodal_trainer
from helpers.support import try_every_method

BATCH = {"input_ids": torch.arange(3, 23)[None]}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_chooses_in_a_decoder_and_rank_moves(family, tmp_path, support):
    def make(folder, **arguments):
        return make_trainer(make_lora_family(family), folder, **arguments)

    try_every_method(support, "model", family, make, lambda: make_family(family), tmp_path, BATCH)


@pytest.mark.parametrize("name", MAKERS)
def test_every_method_chooses_in_a_vision_tower_and_its_language_model_and_rank_moves(name, tmp_path, support):
    # Gemma 3's processor makes no batch of rows some of which have no image.
    rows = Rows(12, without=() if name == "Gemma3" else (4,))

    def make(folder, **arguments):
        return make_multimodal_trainer(name, make_lora_multimodal(name), folder, rows, **arguments)

    batch, layers = Collator(name)([Rows(1)[0]]), ["vision.1", "language.1"]
    make_base = functools.partial(make_multimodal, name)
    row = f"{name} (`stacks: both`)"
    try_every_method(support, "model", row, make, make_base, tmp_path, batch, layers=layers, stacks="both")
