"""Guards each further instruction set of this machine: the tests that depend on kernels run once more for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import test_adamw

from qlora_native import _C

TESTS = Path(__file__).parent
FILES = (
    "test_conformance.py",
    "test_attention.py",
    "test_microscaling.py",
    "test_bitsandbytes.py",
    "test_determinism.py",
    "test_inputs.py",
    "test_adamw.py",
)
# One case in so many shows that an instruction set works; prime, so that each loop of cases.py is sampled.
EVERY = 17
# The emulated tiles multiply bfloat16; all else is that of another instruction set.
SELECTED = {"amx_emulated": ("-k", "bf16 or bfloat16")}


def run(command, isa):
    environment = {**os.environ, "QLN_FORCE_ISA": isa}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, cwd=TESTS)


@pytest.mark.skipif("amx_bf16" in _C.available_isas(), reason="this processor has AMX")
def test_error_says_why_an_instruction_set_is_missing():
    shown = run(["-m", "qlora_native"], "amx_bf16")
    assert shown.returncode == 0 and "amx_bf16" in shown.stdout
    shown = run(["-c", "import torch, qlora_native as qn; qn.quantize(torch.ones(2, 2))"], "amx_bf16")
    assert shown.returncode != 0
    reasons = ("is not in this processor", "is not in this build", "is not permitted by the operating system")
    assert any(f'"amx_bf16" {reason}' in shown.stderr for reason in reasons), shown.stderr


@pytest.mark.parametrize("isa", [isa for isa in _C.available_isas() if isa != _C.current_isa()])
@pytest.mark.parametrize("every", [EVERY, pytest.param(1, marks=pytest.mark.thorough)])
def test_other_instruction_set_keeps_the_promises(isa, every):
    arguments = ("--tb=short", "-p", "no:cacheprovider", f"--every={every}", *SELECTED.get(isa, ()))
    shown = run(["-m", "pytest", *arguments, *FILES], isa)
    assert shown.returncode == 0, f"QLN_FORCE_ISA={isa}\n{shown.stdout[-20000:]}{shown.stderr[-2000:]}"


def test_every_instruction_set_gives_the_same_bits_of_adamw():
    others = [isa for isa in _C.available_isas() if isa != _C.current_isa()]
    for isa in others:
        shown = run(["-c", "import test_adamw; print(test_adamw.digest())"], isa)
        assert shown.stdout.strip() == test_adamw.digest(), f"{isa}, {_C.current_isa()}\n{shown.stderr}"


@pytest.mark.parametrize("isa", _C.available_isas())
def test_forced_instruction_set_is_used(isa):
    shown = run(["-c", "import qlora_native._C as c; print(c.current_isa())"], isa)
    assert shown.stdout.split() == [isa], shown.stderr


def test_unknown_instruction_set_is_named_beside_the_known():
    shown = run(["-c", "import torch, qlora_native as qn; qn.quantize(torch.ones(2, 2))"], "avx1024")
    assert shown.returncode != 0
    assert 'QLN_FORCE_ISA: "avx1024" is not known; this machine has' in shown.stderr
    assert "scalar" in shown.stderr


def test_report_says_what_a_bug_report_needs():
    shown = run(["-m", "qlora_native"], "scalar")
    assert shown.returncode == 0, shown.stderr
    lines = dict(line.split("  ", 1) for line in shown.stdout.splitlines())
    assert lines.keys() >= {
        "qlora_native",
        "instruction sets found",
        "threads",
        "CUDA backend",
        "CUDA devices",
        "torch",
    }
    assert lines["instruction set used"].strip() == "scalar (QLN_FORCE_ISA=scalar)"
    assert "scalar" in lines["instruction sets found"].split(", ")[-2:]
    assert run(["-m", "qlora_native"], "avx1024").returncode == 0, "the report is wanted most where something is wrong"
