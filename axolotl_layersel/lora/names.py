"""The names of tensors in an adapter's file, and of its files. No torch."""

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
LORA, DOWN, UP = ".lora_", ".lora_A.weight", ".lora_B.weight"
WAY_OUT = "Give the folder of a LoRA adapter."


def order_by_layer(name: str) -> list[tuple[int, str]]:
    """Return the key that sorts the names of modules or tensors with layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
