"""Prompts and a reward for GRPO. Axolotl imports such a module by its plain name, so it is not in helpers/."""


def make_prompts(cfg, *args, **kwargs):
    """Return a function that makes a prompt of a row, as Axolotl's data sets for GRPO need."""

    def transform(row, tokenizer=None):
        return {"prompt": row["instruction"]}

    return transform, {"remove_columns": ["instruction", "input", "output"]}


def reward_variety(prompts, completions, **kwargs) -> list[float]:
    """Return the number of different characters in each completion."""
    return [float(len(set(completion))) for completion in completions]
