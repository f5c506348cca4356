"""What trainers that generate need in a YAML file: prompts, and a reward."""


def make_prompts(cfg, *args, **kwargs):
    """Return what makes a row a prompt, as Axolotl's data sets for GRPO ask for it."""

    def transform(row, tokenizer=None):
        return {"prompt": row["instruction"]}

    return transform, {"remove_columns": ["instruction", "input", "output"]}


def reward_variety(prompts, completions, **kwargs) -> list[float]:
    """Return how many different characters there are in each completion."""
    return [float(len(set(completion))) for completion in completions]
