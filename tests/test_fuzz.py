"""A few seconds of tests/fuzz for each way in, and the inputs that were findings once; `make fuzz` goes on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

FUZZ = Path(__file__).parent / "fuzz"
TARGETS = ("entries", "layer", "optimizer", "config", "folder", "json", "ops")


@pytest.mark.parametrize("target", TARGETS)
def test_any_input_ends_in_a_promised_error_or_none(target):
    command = [sys.executable, FUZZ / "fuzz_python.py", target, "--seconds", "3", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["inputs"] > 0


def test_every_target_is_run():
    shown = subprocess.run([sys.executable, FUZZ / "fuzz_python.py", "--help"], capture_output=True, text=True).stdout
    assert "{" + ",".join(TARGETS) in shown.replace("\n", "").replace(" ", "")
