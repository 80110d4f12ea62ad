"""Guards tools/mutants.py: its list fits the tree, and tests notice a sample of the mutants."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments):
    folder = os.path.dirname(sys.executable)  # where `make` has installed cmake and ninja
    environment = {**os.environ, "PATH": folder + os.pathsep + os.environ["PATH"]}
    command = [sys.executable, ROOT / "tools/mutants.py", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_each_mutant_changes_one_place_of_the_tree():
    done = run("--check")
    assert done.returncode == 0, done.stderr


@pytest.mark.thorough
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the copy is of what git lists")
@pytest.mark.skipif(shutil.which("g++") is None and "CXX" not in os.environ, reason="no compiler")
def test_sample_of_mutants_is_noticed():
    done = run("--sample")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "4 mutants: 4 noticed, 0 not" in done.stdout, done.stdout
