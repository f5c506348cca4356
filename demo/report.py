"""Print the path of the demo's adapter, and the eval loss before and after training."""

import argparse
import json
from pathlib import Path


def find_last_checkpoint(output: Path) -> Path:
    """Return the checkpoint of the highest step in a run's ``output`` folder.

    Raises:
        SystemExit: if the folder has no checkpoint.
    """
    checkpoints = [path for path in output.glob("checkpoint-*") if (path / "trainer_state.json").exists()]
    if not checkpoints:
        raise SystemExit(f"{output} has no checkpoint: the run stopped too early.")
    return max(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]))


def read_eval_losses(checkpoint: Path) -> dict[int, float]:
    """Return the eval losses by step that the run logged before it wrote ``checkpoint``."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo/work/output"), help="the run's output_dir")
    output = parser.parse_args().output
    losses = read_eval_losses(find_last_checkpoint(output))
    if not (output / "adapter_model.safetensors").exists():
        raise SystemExit(f"{output} has no adapter: the run did not finish.")
    if len(losses) < 2:
        raise SystemExit(f"{output} has no eval losses before and after training. Set eval_steps.")
    first, last = min(losses), max(losses)
    print(f"adapter: {output}")
    print(f"eval loss: {losses[first]:.3f} before training, {losses[last]:.3f} after {last} steps")


if __name__ == "__main__":
    main()
