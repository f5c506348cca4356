"""Ranks of modules, as the records of a run hold them."""

RANKS = {"model.layers.0.self_attn.q_proj": 2, "model.layers.0.mlp.up_proj": 6, "model.layers.1.self_attn.q_proj": 3}
