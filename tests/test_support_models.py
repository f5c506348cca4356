"""Every method, and l1ra, on decoders of many families: the first rows of the table of models."""

import pytest
import torch
from conftest import make_trainer
from families import FAMILIES, make_family, make_lora_family
from support import try_every_method

BATCH = {"input_ids": torch.arange(3, 23)[None]}

pytestmark = pytest.mark.trains


@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_chooses_in_a_decoder_and_rank_moves(family, tmp_path, support):
    def make(folder, **arguments):
        return make_trainer(make_lora_family(family), folder, **arguments)

    try_every_method(support, "model", family, make, lambda: make_family(family), tmp_path, BATCH)
