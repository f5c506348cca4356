"""Weights that are new in each process, such as a head or the rows of added tokens: all take those of the first."""

import torch

from axolotl_layersel.training.process_agreement import SAMPLED_VALUES, hash_weight


def test_what_does_not_train_is_looked_at_where_a_vocabulary_grows():
    weight = torch.zeros(40 * SAMPLED_VALUES)
    grown = weight.clone()
    grown[-1] = 1
    assert hash_weight(weight, whole=False) != hash_weight(grown, whole=False)
    inside = weight.clone()
    inside[SAMPLED_VALUES + 1] = 1
    assert hash_weight(weight) != hash_weight(inside)
