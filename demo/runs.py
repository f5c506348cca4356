"""The runs of the demo: a choice of layers, plain LoRA, and a random choice, at equal trainable parameters."""

import copy
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "example_configs" / "demo.yml"
# In the order that they train. `choice` is the file of the example, and the others differ from it in one thing each.
NAMES = ("lora", "choice", "random")


def write_configs(work: Path, steps: int | None = None) -> dict[str, Path]:
    """Write the YAML file of every run to ``work``, and return their paths by name.

    ``steps``: train for so many; default: as many as the example does.
    """
    example = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8").replace("demo/work", str(work)))
    if steps is not None:
        example |= {"max_steps": steps, "eval_steps": steps, "logging_steps": 1}
    paths = {}
    for name in NAMES:
        paths[name] = work / f"{name}.yml"
        content = yaml.safe_dump(derive(example, name), sort_keys=False)
        paths[name].write_text(f"# Written by the demo from {EXAMPLE.name}.\n{content}", encoding="utf-8")
    return paths


def derive(example: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the configuration of the run ``name``, which is the example with one thing changed."""
    config = copy.deepcopy(example)
    config["output_dir"] = str(Path(example["output_dir"]).with_name(name))
    if name == "lora":
        del config["plugins"], config["layersel"]
    elif name == "random":
        kept = ("ratio", "rank_allocation")
        selection = {key: value for key, value in config["layersel"]["selection"].items() if key in kept}
        config["layersel"]["selection"] = {"method": "random", **selection}
    elif name != "choice":
        raise ValueError(f"there is no run {name!r}")
    return config
