"""What the targets of the Makefile would do, in a clone without an environment."""

import os
import subprocess

import pytest
from helpers.places import ROOT


@pytest.fixture
def list_commands(tmp_path):
    """Return a function that returns the commands of a target; none of them is run."""

    def list_commands(target: str) -> str:
        command = ["make", "--dry-run", target, f"VENV={tmp_path / 'venv'}"]
        # The make that runs the tests must not be the parent of this one, which would print its folder too.
        alone = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
        return subprocess.run(command, cwd=ROOT, env=alone, check=True, capture_output=True, text=True).stdout

    return list_commands


def test_the_demo_installs_the_package_without_the_development_tools(list_commands):
    commands = list_commands("demo").splitlines()
    installed = [line.partition(" install ")[2] for line in commands if " pip install " in line]
    assert installed == ["--no-compile torch==2.13.0", "--no-compile -e '.[plots]'"]
    assert commands[-1].endswith("/python -m demo")


@pytest.mark.parametrize("target", ["lint", "check", "site", "wheel"])
def test_the_other_targets_install_the_development_tools_too(list_commands, target):
    assert "install --no-compile -e '.[dev,plots]'" in list_commands(target)


def test_a_release_is_tried_in_an_environment_of_its_own(list_commands):
    text = list_commands("release-check")
    assert 'build/release/venv/bin/python -m pip install "$(ls dist/*.whl)[plots]"' in text
    assert text.rstrip().endswith("venv/bin/python -m demo") and "cp -r demo build/release/demo" in text
