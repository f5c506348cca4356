"""The demo: train plain LoRA, a choice of layers and a random choice on a small model, and compare them.

Every run is an `axolotl train` in a process of its own. Nothing is downloaded.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from demo.runs import NAMES, write_configs

# One thread: the model is so small that a second one gains little, and loses much where cores are shared.
SETTINGS = {
    "AXOLOTL_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def call(*command: str) -> None:
    """Print a command and run it, with the programs of this environment first on the path.

    Raises:
        SystemExit: with its exit code if it fails.
    """
    print(f"\n$ {shlex.join(command)}", flush=True)
    programs = str(Path(sys.executable).parent)
    environment = {**os.environ, **SETTINGS, "PATH": os.pathsep.join([programs, os.environ.get("PATH", os.defpath)])}
    code = subprocess.run(command, env=environment).returncode
    if code:
        raise SystemExit(f"The demo ends here: {shlex.join(command)} ended with exit code {code}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", default="demo/work", help="folder for the base, the data and the runs")
    parser.add_argument("--pretrain-steps", help="pre-train the base for so many steps, not for 90 s")
    parser.add_argument("--steps", type=int, help="train each run for so many steps, not for 60")
    arguments = parser.parse_args()
    started = time.monotonic()
    limit = ["--max-steps", arguments.pretrain_steps] if arguments.pretrain_steps else []
    call("python", "-m", "demo.prepare", "--work", arguments.work, *limit)
    work = Path(arguments.work)
    for name in NAMES:
        shutil.rmtree(work / name, ignore_errors=True)
    for path in write_configs(work, arguments.steps).values():
        # One process: nothing is distributed here, and a launcher would import everything again.
        call("axolotl", "train", str(path), "--launcher", "python")
    call("python", "-m", "demo.report", "--work", arguments.work)
    print(f"\nThe demo took {time.monotonic() - started:.0f} s.")


if __name__ == "__main__":
    main()
