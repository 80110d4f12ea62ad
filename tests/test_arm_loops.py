"""Guards bench/arm.py: what it reads from a listing, on an excerpt."""

import importlib
import shutil
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"

# As `objdump -dC --no-show-raw-insn` prints it, shortened: a loop over units inside of one that calls the decoder.
LISTING = """
backend.cpp.o:     file format elf64-littleaarch64

0000000000001000 <void qlora_native::(anonymous namespace)::tile<3, 4>(float const*)>:
    1000:	stp	x29, x30, [sp, #-64]!
    1004:	mov	x29, sp
    1008:	str	q0, [sp, #32]
    100c:	bl	2000 <qlora_native::(anonymous namespace)::step()>
    1010:	ldr	q31, [x1], #16
    1014:	ldr	s30, [x2, #4]
    1018:	fmla	v0.4s, v31.4s, v30.s[0]
    101c:	cmp	x1, x3
    1020:	b.ne	1010 <void qlora_native::(anonymous namespace)::tile<3, 4>(float const*)+0x10>  // b.any
    1024:	tbz	w4, #0, 1008 <void qlora_native::(anonymous namespace)::tile<3, 4>(float const*)+0x8>
    1028:	ret
"""


@pytest.fixture
def arm(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("arm")


@pytest.fixture
def code(arm):
    return arm.functions_of(LISTING.splitlines())["void tile<3, 4>(float const*)"]


def test_function_is_read_with_its_operands(arm, code):
    assert [i.opcode for i in code[:4]] == ["stp", "mov", "str", "bl"]
    assert code[6] == arm.Instruction(0x1018, "", "fmla", "v0.4s, v31.4s, v30.s[0]")
    assert arm.target(code[8]) == 0x1010 and arm.target(code[9]) == 0x1008
    assert arm.falls_through(code[9]) and not arm.falls_through(code[10])


def test_loop_excludes_the_loops_inside_it(arm, code):
    inner, outer = sorted(arm.own_loops(code), key=len, reverse=True)
    assert [i.opcode for i in inner] == ["ldr", "ldr", "fmla", "cmp", "b.ne"]
    assert [i.opcode for i in outer] == ["str", "bl", "tbz"]
    assert [arm.is_stack(i) for i in outer] == [True, False, False]
    assert arm.plain(inner)[-1] == "cmp x1, x3", "llvm-mca follows no branches"


@pytest.mark.skipif(shutil.which("llvm-mca") is None, reason="needs llvm-mca")
def test_cycles_grow_with_the_multiply_adds(arm):
    cycles = [arm.cycles([f"fmla v{i}.4s, v30.4s, v31.4s" for i in range(n)], "apple-a14") for n in (12, 24)]
    assert 1.8 < cycles[1] / cycles[0] < 2.2
