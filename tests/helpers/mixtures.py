"""Runs of mixtures of experts."""

import torch
import transformers
from peft.tuners.lora import ParamWrapper

from axolotl_layersel.lora.modules import find_lora_modules
from helpers.families import EXPERTS, GATED_DELTA, LATENT, SIZE

MLP = ["gate_proj", "up_proj", "down_proj"]


SPARSE = {**EXPERTS, "head_dim": 8, "num_experts_per_tok": 2}


SHARED = {"moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}


# By the name of a class of transformers: settings of its configuration besides the size, and the modules with LoRA.
FAMILIES = {
    "Qwen3Moe": (SPARSE, ["q_proj", "k_proj", "v_proj", "o_proj", *MLP]),
    "Glm4Moe": ({**SHARED, "head_dim": 8, "first_k_dense_replace": 1}, ["q_proj", "v_proj", *MLP]),
    "DeepseekV3": (LATENT, ["q_b_proj", "kv_b_proj", "o_proj", *MLP]),
    "Qwen3Next": ({**EXPERTS, **GATED_DELTA}, ["q_proj", "v_proj", "in_proj_qkvz", "out_proj", *MLP]),
    "Ernie4_5_Moe": ({**SHARED, "moe_num_experts": 4, "moe_k": 2}, ["q_proj", "v_proj", *MLP]),
    "Mixtral": ({"num_local_experts": 3}, ["q_proj", "v_proj", "w1", "w2", "w3"]),
}


STAYS = "stays at its rank"


def make_base(family: str, **settings):
    """Return a random mixture of experts of width 32 with 4 layers, the same each time."""
    torch.manual_seed(0)
    kind = getattr(transformers, f"{family}Config")
    config = kind(**{**SIZE, "initializer_range": 0.1, **FAMILIES[family][0], **settings})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():  # some leave their experts uninitialised
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1) if parameter.dim() > 2 else None
    return model


def compute(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 23)[None]).logits


def find_ranks(model, experts: bool) -> dict[str, int]:
    """Return the ranks of LoRA, either on experts or on linear modules."""
    modules = find_lora_modules(model.get_base_model())
    return {name: m.r["default"] for name, m in modules.items() if isinstance(m, ParamWrapper) == experts}
