"""Settings of runs with Axolotl's fused kernels."""

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


ON = {"lora_qkv_kernel": True, "lora_o_kernel": True}
