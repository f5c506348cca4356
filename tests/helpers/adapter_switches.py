"""Trainers that switch adapters."""

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from helpers.models import make_lora, make_small_llama
from helpers.multimodal import make_tokenizer

PROMPTS = [{"prompt": f"{i} 8 9"} for i in range(10, 22)]


PAIRS = [{**row, "chosen": f" {i} 11 12", "rejected": f" 15 {i}"} for i, row in enumerate(PROMPTS, 20)]


def make_trained_lora(**settings):
    """Return a model with LoRA whose B is not 0, as after training."""
    model = make_lora(make_small_llama(), task_type="CAUSAL_LM", **settings)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def make_arguments(kind, folder, **arguments):
    common = {"max_steps": 3, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "max_grad_norm": 1e-4}
    quiet = {"report_to": [], "save_strategy": "no", "logging_steps": 1, "seed": 3, "disable_tqdm": True}
    return kind(output_dir=str(folder), use_cpu=True, bf16=False, **{**common, **quiet, **arguments})


def make_dpo(model, folder, **arguments):
    arguments = make_arguments(DPOConfig, folder, **arguments)
    return DPOTrainer(model, args=arguments, train_dataset=Dataset.from_list(PAIRS), processing_class=make_tokenizer())
