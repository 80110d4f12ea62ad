"""Guards each further instruction set of this machine: the tests that depend on kernels run once more for it."""

import functools

import process
import pytest
import test_adamw

from qlora_native import _C

OF = ("conformance", "attention", "microscaling", "bitsandbytes", "determinism", "inputs", "adamw", "file_formats")
FILES = [f"test_{name}.py" for name in OF]
QUANTIZE = ("-c", "import torch, qlora_native as qn; qn.quantize(torch.ones(2, 2))")
# One case in so many shows that an instruction set works; prime, so that each loop of cases.py is sampled.
EVERY = 17
# The emulated tiles multiply bfloat16; all else is that of another instruction set.
SELECTED = {"amx_emulated": ("-k", "bf16 or bfloat16")}


@pytest.mark.skipif("amx_bf16" in _C.available_isas(), reason="this processor has AMX")
def test_error_says_why_an_instruction_set_is_missing():
    assert "amx_bf16" in process.succeed("-m", "qlora_native", QLN_FORCE_ISA="amx_bf16").stdout
    shown = process.run(*QUANTIZE, QLN_FORCE_ISA="amx_bf16")
    assert shown.returncode != 0
    reasons = ("is not in this processor", "is not in this build", "is not permitted by the operating system")
    assert any(f'"amx_bf16" {reason}' in shown.stderr for reason in reasons), shown.stderr


@pytest.mark.parametrize("isa", [isa for isa in _C.available_isas() if isa != _C.current_isa()])
@pytest.mark.parametrize("every", [EVERY, pytest.param(1, marks=pytest.mark.thorough)])
def test_other_instruction_set_keeps_the_promises(isa, every):
    process.pytest_of(f"--every={every}", *SELECTED.get(isa, ()), *FILES, QLN_FORCE_ISA=isa)


def test_every_instruction_set_gives_the_same_bits_of_adamw():
    digest = functools.partial(process.succeed, "-c", "import test_adamw; print(test_adamw.digest())")
    for isa in _C.available_isas():
        assert digest(QLN_FORCE_ISA=isa).stdout.strip() == test_adamw.digest(), isa


@pytest.mark.parametrize("isa", _C.available_isas())
def test_forced_instruction_set_is_used(isa):
    shown = process.succeed("-c", "import qlora_native._C as c; print(c.current_isa())", QLN_FORCE_ISA=isa)
    assert shown.stdout.split() == [isa]


def test_unknown_instruction_set_is_named_beside_the_known():
    shown = process.run(*QUANTIZE, QLN_FORCE_ISA="avx1024")
    assert shown.returncode != 0
    assert 'QLN_FORCE_ISA: "avx1024" is not known; this machine has' in shown.stderr
    assert "scalar" in shown.stderr


def test_report_says_what_a_bug_report_needs():
    shown = process.succeed("-m", "qlora_native", QLN_FORCE_ISA="scalar")
    lines = dict(line.split("  ", 1) for line in shown.stdout.splitlines())
    assert lines.keys() >= {"qlora_native", "threads", "CUDA backend", "CUDA devices", "torch"}
    assert lines["instruction set used"].strip() == "scalar (QLN_FORCE_ISA=scalar)"
    assert "scalar" in lines["instruction sets found"].split(", ")[-2:]
    process.succeed("-m", "qlora_native", QLN_FORCE_ISA="avx1024")  # where something is wrong, it is needed most
