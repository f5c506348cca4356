"""Prompts and rewards for trainers that generate, in a YAML file and without Axolotl."""

import json
from pathlib import Path

from helpers.models import make_lora, make_small_llama
from helpers.multimodal import make_tokenizer


def make_prompts(cfg, *args, **kwargs):
    """Return a function that makes a prompt of a row, as Axolotl's data sets for GRPO need."""

    def transform(row, tokenizer=None):
        return {"prompt": row["instruction"]}

    return transform, {"remove_columns": ["instruction", "input", "output"]}


def reward_variety(prompts, completions, **kwargs) -> list[float]:
    """Return the number of different characters in each completion."""
    return [float(len(set(completion))) for completion in completions]


def make_generating_trainer(folder, **arguments):
    """Return TRL's GRPO trainer, which generates the answers that it trains on."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    values = {"num_generations": 2, "per_device_train_batch_size": 2, "max_steps": 20, "report_to": []}
    arguments = GRPOConfig(output_dir=str(folder), use_cpu=True, bf16=False, **{**values, **arguments})
    rows = Dataset.from_list([{"prompt": f"{i} 8 9"} for i in range(10, 20)])
    rewards = [lambda completions, **_: [float(len(completion)) for completion in completions]]
    return GRPOTrainer(make_lora(make_small_llama()), rewards, arguments, rows, processing_class=make_tokenizer())


def write_rows(folder: Path, rows: list[dict], kind: object) -> dict:
    """Write rows to a file in ``folder``, and return the YAML keys to train on them."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"datasets": [{"path": str(path), "ds_type": "json", "type": kind}]}


def ask(i: int) -> str:
    return f"How many apples are {i} and {i + 1}?"


def train_by_grpo(folder: Path) -> dict:
    rows = [{"instruction": ask(i), "input": "", "output": ""} for i in range(24)]
    rewards = {"reward_funcs": ["helpers.generation.reward_variety"], "num_generations": 2, "max_completion_length": 8}
    return {**write_rows(folder, rows, "helpers.generation.make_prompts"), "rl": "grpo", "trl": rewards}
