"""The paths of this package's files in the folder of a run or of a checkpoint, and names from paths."""

import re
from pathlib import Path

FOLDER = "layersel"  # in the folder of a run and of each checkpoint
PICTURES = ("scores", "gates", "ranks")
PICTURE_ENDINGS = (".png", ".svg")


def plan_path(folder: str | Path) -> Path:
    """Return the path of the plan of a run or checkpoint."""
    return Path(folder) / FOLDER / "plan.json"


def ranks_path(folder: str | Path) -> Path:
    """Return the path of the ranks of a run or checkpoint by optimizer step."""
    return Path(folder) / FOLDER / "ranks.csv"


def gates_path(folder: str | Path) -> Path:
    """Return the path of the gates of a run's search by its steps."""
    return Path(folder) / FOLDER / "gates.csv"


def state_path(checkpoint: str | Path) -> Path:
    """Return the path of the state that ``l1ra`` resumes from."""
    return Path(checkpoint) / FOLDER / "state.safetensors"


def picture_path(folder: str | Path, name: str, ending: str) -> Path:
    """Return the path of a picture of a run: one of ``PICTURES`` with one of ``PICTURE_ENDINGS``."""
    return Path(folder) / FOLDER / f"{name}{ending}"


def list_pictures(folder: str | Path) -> list[Path]:
    """Return the paths of all pictures that a run can have."""
    return [picture_path(folder, name, ending) for name in PICTURES for ending in PICTURE_ENDINGS]


def name_model(base_model: str) -> str:
    """Return the name of a model without its location: the last part of a path or hub name.

    The hub's cache keeps a model in a folder named after its revision, inside one that has the model's name.
    """
    cached = re.findall(r"models--(?:[^/\\]+--)?([^/\\]+)[/\\]snapshots[/\\]", f"{base_model}/")
    return cached[-1] if cached else Path(base_model).absolute().name
