"""The names of tensors in an adapter's file, and of its files. No torch."""

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
LORA, DOWN, UP = ".lora_", ".lora_A.weight", ".lora_B.weight"
WAY_OUT = "Give the folder of a LoRA adapter."
