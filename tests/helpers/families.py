"""Small random decoders of many families, with LoRA."""

import copy
import functools

import torch
import transformers

from helpers.models import make_lora

SIZE = {
    **{"vocab_size": 97, "num_hidden_layers": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1},
    **{"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2},
}
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 3, "num_experts_per_tok": 2}
LATENT = {
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    **{"moe_intermediate_size": 24, "num_experts_per_tok": 2, "num_key_value_heads": 4},
}
GATED_DELTA = {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    **{"head_dim": 8, "shared_expert_intermediate_size": 24},
}
STATES = {
    **{"mamba_d_state": 4, "mamba_d_conv": 2, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    **{"num_experts": 2, "num_experts_per_tok": 1},
}
# Upper layers share keys and values with lower ones, and each layer has embeddings of its own.
SHARED = {
    **{"head_dim": 8, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    **{"sliding_window": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97},
}
# Four predictions of the hidden state of each token, one of which the layers read.
PREDICTIONS = {"intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0], "laurel_rank": 4}
ATTENTION = ["q_proj", "v_proj"]
# By the name of a class of transformers: settings of its configuration besides the size, and the modules with LoRA.
FAMILIES = {
    "Llama": ({}, ATTENTION),
    "Mistral": ({}, ATTENTION),
    "Qwen2": ({}, ATTENTION),
    "Qwen3": ({"head_dim": 8}, ATTENTION),
    "SmolLM3": ({}, ATTENTION),
    "Gemma2": ({"head_dim": 8}, ATTENTION),
    "Gemma3": ({"head_dim": 8}, ATTENTION),
    "Gemma3n": ({**SHARED, **PREDICTIONS}, [*ATTENTION, "k_proj"]),
    "Gemma4": ({**SHARED, "global_head_dim": 8, "use_double_wide_mlp": True}, [*ATTENTION, "k_proj"]),
    "Phi3": ({}, ["qkv_proj", "o_proj"]),
    "Olmo2": ({}, ATTENTION),
    "Cohere": ({}, ATTENTION),
    "Granite": ({}, ATTENTION),
    "Glm4": ({"head_dim": 8}, ATTENTION),
    "GPTNeoX": ({}, ["query_key_value", "dense"]),
    "GPT2": ({}, ["c_attn", "c_proj"]),
    "Falcon": ({}, ["query_key_value", "dense"]),
    "Mixtral": ({"num_local_experts": 3}, ATTENTION),
    "Qwen3Moe": ({**EXPERTS, "head_dim": 8}, ATTENTION),
    "GptOss": ({"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8}, ATTENTION),
    "DeepseekV3": (LATENT, ["q_b_proj", "kv_b_proj", "o_proj"]),
    "Qwen3Next": ({**EXPERTS, **GATED_DELTA}, ["q_proj", "v_proj", "in_proj_qkvz", "out_proj"]),
    "Jamba": (STATES, ["q_proj", "v_proj", "in_proj"]),
    "Mamba2": ({"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8}, ["in_proj"]),
}


@functools.cache
def make_base(family: str):
    settings, _ = FAMILIES[family]
    text = "Text" if family in ("Gemma3", "Gemma3n", "Gemma4") else ""  # the others have a configuration for text only
    kind = getattr(transformers, f"{family}{text}Config")
    # Weights so large that layers differ.
    config = kind(**{**SIZE, "initializer_range": 0.1, **settings})
    torch.manual_seed(0)
    name = {"GPT2": "GPT2LMHeadModel"}.get(family, f"{family}ForCausalLM")
    model = getattr(transformers, name)(config)
    with torch.no_grad():  # gpt-oss leaves its experts uninitialised
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1) if parameter.dim() > 2 else None
    return model


def make_family(family: str):
    """Return a new model without LoRA, the same each time."""
    return copy.deepcopy(make_base(family))


def make_lora_family(family: str):
    return make_lora(make_family(family), FAMILIES[family][1])
