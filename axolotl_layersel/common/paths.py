"""Where the files of this package lie in the folder of a run or of a checkpoint."""

from pathlib import Path

# The folder, in that of a run and of each of its checkpoints.
FOLDER = "layersel"


def plan_path(folder: str | Path) -> Path:
    """Return where the plan of a run or checkpoint in ``folder`` lies."""
    return Path(folder) / FOLDER / "plan.json"


def ranks_path(folder: str | Path) -> Path:
    """Return where the ranks of a run or checkpoint in ``folder`` lie, by optimizer step."""
    return Path(folder) / FOLDER / "ranks.csv"


def gates_path(folder: str | Path) -> Path:
    """Return where the gates of a search lie, by its steps, of a run or checkpoint in ``folder``."""
    return Path(folder) / FOLDER / "gates.csv"


def state_path(checkpoint: str | Path) -> Path:
    """Return where the state lies from which ``l1ra`` resumes at ``checkpoint``."""
    return Path(checkpoint) / FOLDER / "state.safetensors"
