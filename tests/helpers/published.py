"""The published files, built from the checkout, and programs that are called without it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from helpers.places import ENVIRONMENT, HANGS, ROOT


def call(*command: str | Path, cwd: Path, timeout: float = HANGS, **environment: str) -> str:
    """Run a command without the checkout on its path, and return the output."""
    inherited = {key: value for key, value in {**os.environ, **ENVIRONMENT}.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, "COLUMNS": "120", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


class Built(NamedTuple):
    """The two published files."""

    sdist: Path
    wheel: Path


def build(folder: Path) -> Built:
    """Build the source distribution, and the wheel from it, of a copy of the checkout in ``folder``."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "work")
    source = shutil.copytree(ROOT, folder / "source", ignore=ignored)
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", cwd=source)
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    (wheel,) = (folder / "dist").glob("*.whl")
    return Built(sdist, wheel)


def install_beside(wheel: Path, folder: Path) -> Path:
    """Install a wheel into a new environment with the libraries of the tests' own, and return the programs' folder.

    The checkout cannot be imported there: the libraries are on the path, and the file that links to it is not read.
    """
    call(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    programs = folder / "bin"
    libraries = Path(sys.prefix, *folder.glob("lib/python*/site-packages").__next__().relative_to(folder).parts)
    (folder / libraries.relative_to(sys.prefix) / "libraries.pth").write_text(f"{libraries}\n")
    call(
        *(sys.executable, "-m", "pip", "--python", programs / "python", "install", "--no-deps"),
        *("--ignore-installed", "--no-index", wheel),
        cwd=folder,
    )
    for name in ("axolotl", "accelerate"):
        _, script = (Path(sys.prefix) / "bin" / name).read_text().split("\n", 1)
        (programs / name).write_text(f"#!{programs / 'python'}\n{script}")
        (programs / name).chmod(0o755)
    return programs
