"""Small mixtures of experts, and LoRA on them."""

import torch
import transformers
from peft import LoraConfig, get_peft_model

SIZE = {
    **{"vocab_size": 97, "num_hidden_layers": 3, "attn_implementation": "eager"},
    **{"hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2},
}


FAMILIES = {
    "Mixtral": {"num_local_experts": 3},
    "Qwen3Moe": {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8},
    "GptOss": {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8},
}


PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


def make_base(family: str, **settings):
    """Return a random mixture of experts of width 32 with 3 layers."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZE, **FAMILIES[family], **settings})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():  # gpt-oss leaves its experts uninitialised
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05) if parameter.dim() > 2 else None
    return model


def make_experts(family: str, targets=("q_proj", "v_proj"), **settings):
    """Return such a mixture with LoRA of rank 2 on its experts and on linear modules."""
    values = {"r": 2, "lora_alpha": 4, "target_modules": list(targets), "target_parameters": PARAMETERS}
    return get_peft_model(make_base(family), LoraConfig(**{**values, **settings}))
