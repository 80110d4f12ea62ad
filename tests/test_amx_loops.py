"""Guards the machine code of AMX's main loop (cpp/src/cpu/product/tiles-inl.h), which cannot be timed without AMX.

A tile product costs at most one load, the loop stores no tile, and the decoder beside it keeps its values in registers.
"""

import importlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OBJECTS = sorted(ROOT.glob("build/**/cpu/backend/amx_bf16.cpp.o"), key=lambda path: path.stat().st_mtime)

pytestmark = [
    pytest.mark.skipif(not OBJECTS, reason="reads what `make test-cpp` compiles for AMX"),
    pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump"),
]


def functions(listing, make_instruction):
    """{a function's name: its code} in a listing of objdump."""
    found = {}
    for line in listing:
        if match := re.match(r"^[0-9a-f]+ <(.*)>:$", line):
            code = found[match[1]] = []
        elif match := re.match(r"^\s+([0-9a-f]+):\s+(\S+)\s*([^/]*)", line):
            code.append(make_instruction(int(match[1], 16), "", match[2], match[3].strip()))
    return found


def target(instruction):
    """Where a branch of x86-64 goes."""
    if not instruction.opcode.startswith("j"):
        return None
    return int(instruction.operands.split()[0], 16)


def falls_through(instruction):
    return instruction.opcode not in ("jmp", "ret")


@pytest.fixture(scope="module")
def blocks():
    """{a block's tiles of accumulators and what is decoded beside it: the loop over units of its machine code}."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools")
        machine_code = importlib.import_module("machine_code")
        listing = subprocess.run(
            ("objdump", "-dC", "--no-show-raw-insn", str(OBJECTS[-1])), capture_output=True, text=True, check=True
        ).stdout.splitlines()
        found = {}
        for name, code in functions(listing, machine_code.Instruction).items():
            if "multiply_tiles<" not in name or not any(i.opcode == "tdpbf16ps" for i in code):
                continue
            loops = machine_code.loops(code, target, falls_through)
            found[name] = max((loop for loop in loops if any(i.opcode == "tdpbf16ps" for i in loop)), key=len)
        return found


def count(loop, opcode):
    return sum(i.opcode == opcode for i in loop)


@pytest.mark.parametrize(
    ("size", "loads", "products"), [("2, 2", 4, 4), ("4, 1", 5, 4), ("1, 4", 5, 4), ("1, 2", 3, 2), ("1, 1", 2, 1)]
)
def test_block_loads_each_tile_once(blocks, size, loads, products):
    found = {name: loop for name, loop in blocks.items() if f"multiply_tiles<{size}," in name}
    # Of two by two tiles in Y and in dX, over 4 and over 8 bits, and without decoding.
    assert len(found) >= (5 if size == "2, 2" else 1), list(blocks)
    for name, loop in found.items():
        assert (count(loop, "tileloadd"), count(loop, "tdpbf16ps")) == (loads, products), name


def test_accumulators_stay_in_registers(blocks):
    for name, loop in blocks.items():
        assert count(loop, "tilestored") == 0, name
        spilled = [i for i in loop if "zmm" in i.operands and ("(%rsp)" in i.operands or "(%rbp)" in i.operands)]
        assert not spilled, (name, spilled)
