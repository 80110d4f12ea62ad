"""Guards tools/mutants.py: its list fits the tree, and tests notice a sample of the mutants."""

import os
import shutil
import sys
from pathlib import Path

import process
import pytest

ROOT = Path(__file__).resolve().parent.parent


def mutants(option):
    path = (
        os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    )  # `make` has installed cmake and ninja there
    return process.succeed(ROOT / "tools/mutants.py", option, PATH=path)


def test_each_mutant_changes_one_place_of_the_tree():
    mutants("--check")


@pytest.mark.thorough
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the copy is of what git lists")
@pytest.mark.skipif(shutil.which("g++") is None and "CXX" not in os.environ, reason="no compiler")
def test_sample_of_mutants_is_noticed():
    assert "4 mutants: 4 noticed, 0 not" in mutants("--sample").stdout
