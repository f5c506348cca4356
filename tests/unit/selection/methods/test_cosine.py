import math

import pytest
import torch

from axolotl_layersel.selection.methods.cosine import sum_turns
from axolotl_layersel.selection.passes.forward import average_over_tokens


def test_turns_are_counted_at_real_tokens_only():
    inputs = torch.tensor([[[1.0, 0], [1, 0], [5, 5]]])
    outputs = torch.tensor([[[0.0, 2], [1, 1], [-5, -5]]])
    turns = sum_turns(inputs, outputs, torch.tensor([[1, 1, 0]]))
    assert turns.tolist() == pytest.approx([1 + (1 - math.sqrt(0.5))])


def test_every_token_counts_alike_whatever_sample_it_is_in():
    turns = torch.tensor([[1.0, 2.0], [3.0, 0.0]], dtype=torch.float64)
    assert average_over_tokens(turns, torch.tensor([1, 4])) == pytest.approx([0.8, 0.4])
