"""LoRA adapters: in the model that trains, and in their files."""
