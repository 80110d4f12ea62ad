"""Guards the machine code of AMX's loops in cpp/src/cpu/product/: tiles, strip_nt, strip_nn and panel_pipeline-inl.h.

They cannot be timed without AMX. A tile product costs little more than one load, no loop stores a tile, and decoding
keeps its values in registers.
"""

import importlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OBJECT = next(ROOT.glob("build/package/**/cpu/backend/amx_bf16.cpp.o"), None)

pytestmark = [
    pytest.mark.skipif(OBJECT is None, reason="reads what `make test-cpp` compiles for AMX"),
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
def loops():
    """{a function's name: its loops} in the object of the backend."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools")
        machine_code = importlib.import_module("machine_code")
        listing = subprocess.run(
            ("objdump", "-dC", "--no-show-raw-insn", str(OBJECT)), capture_output=True, text=True, check=True
        ).stdout.splitlines()
        return {
            name: machine_code.loops(code, target, falls_through)
            for name, code in functions(listing, machine_code.Instruction).items()
            if re.search(r"multiply_tiles<|::multiply_block\(|StripNn<.*::decode\(|Decoder<.*::decode\(", name)
        }


def multiplies(loop):
    return any(i.opcode == "tdpbf16ps" for i in loop)


@pytest.fixture(scope="module")
def blocks(loops):
    """{a block's tiles of accumulators and what is decoded beside it: the loop over units of its machine code}."""
    return {
        name: max(filter(multiplies, of_name), key=len)
        for name, of_name in loops.items()
        if "multiply_tiles<" in name and any(map(multiplies, of_name))
    }


@pytest.fixture(scope="module")
def strips(loops):
    """{the rows of W and the tiles that a strip of X is wide: the loops of its machine code}."""
    return {name: of_name for name, of_name in loops.items() if "StripNt<" in name and "::multiply_block(" in name}


def count(loop, *opcodes):
    return sum(i.opcode in opcodes for i in loop)


@pytest.mark.parametrize(
    ("size", "loads", "products"), [("2, 2", 5, 4), ("4, 1", 5, 4), ("2, 1", 3, 2), ("1, 2", 3, 2), ("1, 1", 2, 1)]
)
def test_block_loads_a_tile_when_another_one_is_multiplied_next(blocks, size, loads, products):
    found = {name: loop for name, loop in blocks.items() if f"multiply_tiles<{size}," in name}
    assert found, list(blocks)
    for name, loop in found.items():
        assert products * count(loop, "tileloadd", "tileloaddt1") == loads * count(loop, "tdpbf16ps"), name


def test_accumulators_stay_in_registers(blocks):
    for name, loop in blocks.items():
        assert count(loop, "tilestored") == 0, name
        spilled = [i for i in loop if "zmm" in i.operands and ("(%rsp)" in i.operands or "(%rbp)" in i.operands)]
        assert not spilled, (name, spilled)


@pytest.fixture(scope="module")
def stages(loops):
    """{whose stages of W are decoded for dX: the loops of its machine code}."""
    return {name: of_name for name, of_name in loops.items() if "StripNn<" in name}


@pytest.mark.parametrize(("width", "loads", "products"), [(1, 5, 4), (2, 5, 4), (3, 4, 3), (4, 5, 4)])
def test_accumulators_of_a_strip_stay_in_tiles(strips, width, loads, products):
    """Nothing is stored before all chunks of a block have been multiplied."""
    found = {name: of_name for name, of_name in strips.items() if f", {width}>::multiply_block(" in name}
    assert len(found) >= 5, list(strips)  # over 4 and over 8 bits, with minima and without
    for name, of_name in found.items():
        multiplying = list(filter(multiplies, of_name))
        assert multiplying, name
        for loop in multiplying:
            assert products * count(loop, "tileloadd", "tileloaddt1") == loads * count(loop, "tdpbf16ps"), name
            assert count(loop, "tilestored") == 0, name


def test_decoding_keeps_its_values_in_registers(loops, strips):
    decoding = [(name, loop) for name, of_name in strips.items() for loop in of_name if not multiplies(loop)]
    decoding += [
        (name, loop)
        for name, of_name in loops.items()
        if "StripNn<" in name or ("ProductNt<" in name and "::decode()" in name)
        for loop in of_name
    ]
    for kind in ("StripNt<", "StripNn<", "ProductNt<"):
        assert sum(kind in name for name, _ in decoding) >= 5, kind  # over 4 and over 8 bits, with minima and without
    for name, loop in decoding:
        moved = [i for i in loop if re.search(r"\(%r[sb]p", i.operands) or i.opcode in ("vpinsrq", "vpextrq", "call")]
        assert not moved, (name, moved)


def test_two_rows_of_4_bits_are_decoded_with_one_table(strips, stages):
    """128 weights of blocks of 64 take two conversions to words, four lookups and one rounding."""
    of_strips = {name: of_name for name, of_name in strips.items() if re.search(r", [12]>::multiply_block", name)}
    found = [
        (loop, 36 if name in strips else 44)  # dX also has rows to interleave
        for name, of_name in (of_strips | stages).items()
        if "CodeKind)0, 1, " in name
        for loop in of_name
        if not multiplies(loop)
    ]
    assert len(found) == 6  # with minima and without: strips of one and of two tiles for Y, and stages for dX
    for loop, instructions in found:
        assert [count(loop, i) for i in ("vpmovzxbw", "vpermw", "vcvtne2ps2bf16", "vcvtneps2bf16")] == [2, 4, 1, 0]
        assert len(loop) <= instructions, len(loop)
