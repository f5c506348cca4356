"""Moving rank between LoRA modules while the model trains."""
