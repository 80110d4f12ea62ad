"""The main loops of the Arm kernels, read from their machine code, and their cycles in models of two processors.

    make test-arm                 cross-compiles the library that is read
    python bench/arm.py           prints the table
    python bench/arm.py --output  writes results/neon-main-loops.json, and .md for people

No Arm machine is needed, and nothing is timed. llvm-mca predicts the cycles of a loop whose data is in the first cache,
by LLVM's scheduling models of these processors. The script needs the binutils of the cross compiler, or those of an Arm
machine, and an llvm-mca of LLVM 16 or later.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent / "tools"))

from machine_code import Instruction, count, loops

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "build/arm/libqlora_native.a"
RESULTS = ROOT / "bench/results/neon-main-loops.json"
# {processor: its name in LLVM}. apple-a14 has the cores of an M1. LLVM's model of it is that of the A7 (2013), which
# has three vector units instead of four, so its cycles are an upper bound.
PROCESSORS = {"Neoverse V2": "neoverse-v2", "Apple M1": "apple-a14"}
ITERATIONS = 200
VECTOR_PIPES = 4  # of a Neoverse V2; a multiply-add, a lookup and an interleaving each occupy one for a cycle
MULTIPLY_ADDS = ("fmla", "bfdot")


@dataclass(frozen=True)
class Dot:
    """How a product multiplies, and what decoding costs there."""

    name: str  # its name in the source
    label: str
    elements: int  # elements of the inner dimension in a lane of a multiply-add
    lookups: int  # table lookups for 16 weights
    interleavings: int  # interleavings for 16 weights
    table: int  # instructions that make the table of a block: products, rounding, separating bytes

    def weights(self, multiply_adds: int, rows: int) -> int:
        """The weights that these multiply-adds process for `rows` rows of X."""
        return multiply_adds * 4 * self.elements // rows


DOTS = (
    Dot("DotF32<(DType)0>", "fp32", 1, 4, 8, 4 + 8),
    Dot("DotF32<(DType)1>", "bf16 as fp32", 1, 2, 6, 4 + 4 * 5 + 2),
    Dot("DotBf16", "bf16, bfdot", 2, 2, 2, 4 + 4 + 2),
)


@dataclass(frozen=True)
class Figure:
    """One loop: its instructions, and the least that it could have."""

    loop: str
    dot: str
    unit: str  # what `units` counts
    units: int  # units in one turn of the loop
    instructions: int
    least: int
    vectors: int  # the least number of instructions for the vector pipes
    stack: int  # accesses to the stack, for spilled registers and locals
    kinds: dict[str, int]
    cycles: dict[str, float]  # {processor: cycles of a turn}

    def row(self) -> tuple[str, ...]:
        """The cells of a line of the table."""
        return (
            self.loop,
            self.dot,
            f"{self.units} {self.unit}s",
            str(self.instructions),
            str(self.least),
            str(self.stack),
            f"{self.instructions / self.units:.3f}",
            f"{self.vectors / VECTOR_PIPES:.1f}",
            *(f"{self.cycles[name]:.1f}" for name in PROCESSORS),
            ", ".join(f"{n} {opcode}" for opcode, n in self.kinds.items()),
        )


# ---- listings --------------------------------------------------------------------------------------------------------


def tool(*names: str) -> str:
    """The path of the first of these programs that is installed."""
    for name in names:
        if path := shutil.which(name):
            return path
    raise SystemExit(f"none of these programs is installed: {', '.join(names)}")


def functions(library: Path) -> dict[str, list[Instruction]]:
    """{demangled name without namespaces: code} of all functions."""
    command = (tool("aarch64-linux-gnu-objdump", "objdump"), "-dC", "--no-show-raw-insn", str(library))
    return functions_of(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines())


def functions_of(listing: Sequence[str]) -> dict[str, list[Instruction]]:
    """{demangled name without namespaces: code} of the functions in a listing of objdump."""
    found: dict[str, list[Instruction]] = {}
    code: list[Instruction] = []
    for line in listing:
        if match := re.match(r"^[0-9a-f]+ <(.*)>:$", line):
            name = re.sub(r"qlora_native::(\w+::(?=\(anonymous))?|\(anonymous namespace\)::", "", match[1])
            code = found.setdefault(name, [])
            code.clear()
        elif match := re.match(r"^\s+([0-9a-f]+):\s+(\S+)\s*([^/]*)", line):
            code.append(Instruction(int(match[1], 16), "", match[2], match[3].strip()))
    return found


def target(instruction: Instruction) -> int | None:
    """The address that a branch goes to, or None."""
    if instruction.opcode.split(".")[0] not in ("b", "cbz", "cbnz", "tbz", "tbnz"):
        return None
    match = re.search(r"([0-9a-f]+) <", instruction.operands)
    return int(match[1], 16) if match else None


def falls_through(instruction: Instruction) -> bool:
    """Whether the instruction below may be executed next."""
    return instruction.opcode not in ("b", "br", "ret")


def own_loops(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """The instructions of each loop without those of the loops inside it."""
    found = loops(code, target, falls_through)
    bodies = [{i.address for i in loop} for loop in found]
    inner = [set().union(*(other for other in bodies if other < body)) for body in bodies]
    return [[i for i in loop if i.address not in inside] for loop, inside in zip(found, inner, strict=True)]


def is_stack(instruction: Instruction) -> bool:
    """Whether an instruction reads or writes the stack."""
    return re.search(r"\[(sp|x29)\b", instruction.operands) is not None


# ---- llvm-mca --------------------------------------------------------------------------------------------------------


def analyzer() -> str:
    """The newest llvm-mca."""
    newest = sorted(Path("/usr/bin").glob("llvm-mca-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return str(newest[-1]) if newest else tool("llvm-mca")


def cycles(lines: Sequence[str], processor: str) -> float:
    """The cycles of a turn of a loop in LLVM's model."""
    command = (analyzer(), "-mtriple=aarch64", f"-mcpu={processor}", "-mattr=+bf16", f"-iterations={ITERATIONS}")
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()}")
    return int(re.search(r"Total Cycles:\s+(\d+)", done.stdout)[1]) / ITERATIONS


def plain(code: Sequence[Instruction]) -> list[str]:
    """A loop without branches, which llvm-mca does not follow."""
    return [f"{i.opcode} {i.operands}" for i in code if target(i) is None and i.opcode not in ("b", "bl", "ret")]


# ---- the loops -------------------------------------------------------------------------------------------------------


def figure(loop: str, dot: Dot, unit: str, units: int, code: Sequence[Instruction], least: int, vectors: int) -> Figure:
    """Make the report's figure of a loop."""
    opcodes = [i.opcode for i in code]
    kinds = {opcode: opcodes.count(opcode) for opcode in sorted(set(opcodes), key=lambda o: (-opcodes.count(o), o))}
    return Figure(
        loop=loop,
        dot=dot.label,
        unit=unit,
        units=units,
        instructions=len(code),
        least=least,
        vectors=vectors,
        stack=sum(map(is_stack, code)),
        kinds=kinds,
        cycles={name: round(cycles(plain(code), processor), 2) for name, processor in PROCESSORS.items()},
    )


def find(code: dict[str, list[Instruction]], pattern: str) -> list[list[Instruction]]:
    """The loops of the functions whose names match `pattern`."""
    found = [loop for name, function in code.items() if re.match(pattern, name) for loop in own_loops(function)]
    if not found:
        raise SystemExit(f"no loop in a function that matches {pattern}")
    return found


def decoding(dot: Dot, weights: int, tables: int) -> int:
    """The least number of vector instructions for decoding: nibbles, lookups, interleavings, and tables of blocks."""
    return weights // 16 * (1 + dot.lookups + dot.interleavings) + tables * dot.table


def few_rows(code: dict[str, list[Instruction]], dot: Dot, rows: int) -> Figure:
    """The loop of linear_forward for up to eight rows of X: two rows of W times a chunk of 64."""
    weights = 2 * 64
    multiply_adds = rows * weights // (4 * dot.elements)
    name = re.escape(dot.name)
    pattern = rf"(parallel_for<)?SmallM<{name} ?>::multiply<{rows}, QuantizedRows<{name}, 4, 1>"
    wanted = [
        loop
        for loop in find(code, pattern)
        if count(loop, *MULTIPLY_ADDS) == multiply_adds and count(loop, "tbl") == weights // 16 * dot.lookups
    ]
    vectors = multiply_adds + decoding(dot, weights, 2)
    loads = 2 + 2 + rows * 64 // (4 * dot.elements) // 2  # codes, scales and X, two registers at a time
    control = 2 + 3  # a prefetch and an address for each row of W, and the loop's own
    return figure(
        f"forward, {rows} rows", dot, "weight", weights, min(wanted, key=len), vectors + loads + control, vectors
    )


def tile(code: dict[str, list[Instruction]], dot: Dot, product: str, shape: tuple[int, int], label: str) -> Figure:
    """The loop of a register tile: a multiply-add for each sum, and the loads that they share."""
    rows, vectors = shape
    pattern = rf"void multiply_register_tile<{product}<{re.escape(dot.name)} ?>, {rows}, {vectors}, .*NoDecoder"
    best = max(find(code, pattern), key=lambda loop: count(loop, *MULTIPLY_ADDS))
    multiply_adds = count(best, *MULTIPLY_ADDS)
    turns = multiply_adds // (shape[0] * shape[1])
    loads = sum(shape)
    return figure(label, dot, "multiply-add", multiply_adds, best, multiply_adds + turns * loads + 3, multiply_adds)


def decode_step(code: dict[str, list[Instruction]], dot: Dot, product: str) -> Figure:
    """The decoding beside the multiplications of a tile: two chunks, for dX in bf16 of two rows."""
    name = re.escape(dot.name)
    decoder = rf"Decoder<{product}<{name} ?>::Panel, QuantizedRows<{name}, 4, 1> ?>"
    if product == "ProductNt":  # a function of its own
        (best,) = (body for function, body in code.items() if re.match(rf"{decoder}::step\(", function))
    else:
        tile = rf"void multiply_register_tile<{product}<{name} ?>, 6, 2, .*{decoder}"
        best = max(find(code, tile), key=lambda loop: count(loop, "tbl"))
    weights = count(best, "tbl") // dot.lookups * 16
    pairs = weights // 8 if product == "ProductNn" and dot.elements == 2 else 0  # two rows interleaved
    vectors = decoding(dot, weights, weights // 64) + pairs
    stores = weights * dot_bytes(dot) // 32
    least = vectors + stores + weights // 64 + weights // 64 + weights // 128 + 8  # codes, scales, prefetches, pointers
    label = f"decode beside {'forward' if product == 'ProductNt' else 'dX'}"
    return figure(label, dot, "weight", weights, best, least, vectors)


def dot_bytes(dot: Dot) -> int:
    """The bytes of a decoded weight in a panel."""
    return 4 // dot.elements


def dequantize(code: dict[str, list[Instruction]], dtype: int, dot: Dot, label: str) -> Figure:
    """The loop that decodes a weight to memory."""
    pattern = rf".*dequantize_as<\(DType\){dtype}, 4, false>"
    best = max(find(code, pattern), key=lambda loop: (count(loop, "tbl") > 0, -len(loop)))
    weights = count(best, "tbl") // dot.lookups * 16
    size = 4 if dtype == 0 else 2
    joined = weights // 4 if size == 4 else weights // 8  # even and odd elements interleaved
    vectors = decoding(dot, weights, weights // 64) + joined
    least = vectors + weights * size // 32 + weights // 32 + weights // 64 + 3
    return figure(f"dequantize to {label}", dot, "weight", weights, best, least, vectors)


def report(library: Path) -> list[Figure]:
    """The figures of all loops."""
    code = functions(library)
    found = [few_rows(code, dot, rows) for rows in (1, 4, 8) for dot in DOTS]
    found += [tile(code, dot, "ProductNt", (8, 3), "forward, many rows") for dot in DOTS]
    found += [tile(code, dot, "ProductNn", (6, 4), "dX") for dot in DOTS]
    found += [decode_step(code, dot, product) for product in ("ProductNt", "ProductNn") for dot in DOTS]
    return [*found, dequantize(code, 0, DOTS[0], "fp32"), dequantize(code, 1, DOTS[1], "bf16")]


def matrix_instruction() -> dict[str, dict[str, float]]:
    """{instruction: {processor: cycles of 24 of them}} for bfdot and bfmmla."""
    forms = {"bfdot": "bfdot v{}.4s, v30.8h, v31.2h[0]", "bfmmla": "bfmmla v{}.4s, v30.8h, v31.8h"}
    return {
        opcode: {
            name: round(cycles([form.format(i) for i in range(24)], processor), 2)
            for name, processor in PROCESSORS.items()
            if processor != "apple-a14"  # which has neither
        }
        for opcode, form in forms.items()
    }


# ---- the command -----------------------------------------------------------------------------------------------------

HEADER = (
    "loop",
    "multiplies",
    "a turn",
    "instructions",
    "at least",
    "on the stack",
    "a weight or multiply-add",
    "cycles at best",
    *PROCESSORS,
    "what is in it",
)
PREFACE = """The main loops of the Arm kernels, as `python bench/arm.py --output` found them
({compiler}; {analyzer}).

**No Arm machine has run this code.** It is tested under QEMU, which says nothing of time. What stands here are counts
of instructions, and the cycles that llvm-mca predicts where all data is in the first cache: not how fast memory gives
it. LLVM's model of the Neoverse V2 is one of that core. Its model of the Apple M1 is that of the A7 (2013), with three
vector units where the M1 has four, so those cycles are an upper bound; and the M1 has no bfdot, which the M2 has.

"At least" counts what the loop cannot do without: the multiply-adds; of decoding the nibbles, lookups (tbl),
interleavings (zip) and each block's table; loads, two registers at a time; stores and the loop's own. 16 weights of
fp32 take four lookups of bytes and eight interleavings, 16 of bfloat16 two and two, and then there is the table of a
block of 64. "Cycles at best" are those of the vector instructions alone on the four vector pipes of a Neoverse V2.
Every branch of a loop counts: in fp32 the sums of a few rows are added to totals, which lie on the stack, in every
fourth turn only. What is decoded beside the forward product is a function of its own, which saves registers there.
"""
MATRIX = """bfmmla, the matrix instruction, multiplies twice as many pairs as bfdot. By the same model of a Neoverse V2
24 bfdot in a row take {bfdot} cycles and 24 bfmmla {bfmmla}, so it would pay in the tiles of many rows. It is not used,
as it does not fit the generic algorithms: its sums are blocks of two rows of X by two of W, and its operands two rows
of four elements, where theirs are lanes along one side and units of 32 bits that are broadcast along the other.
Packing, panels and the write of a result would each be another."""


def markdown(figures: Sequence[Figure], versions: dict[str, str], matrix: dict[str, dict[str, float]]) -> str:
    """The report as Markdown."""
    rows = [HEADER, ["---"] * len(HEADER), *(figure.row() for figure in figures)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    cycles_of = {opcode: f"{of['Neoverse V2']:.1f}" for opcode, of in matrix.items()}
    return f"{PREFACE.format(**versions)}\n{table}\n\n{MATRIX.format(**cycles_of)}\n"


def first_line(*command: str) -> str:
    """The first line of what a program prints, which is its version."""
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return next(line.strip() for line in lines if line.strip())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path, nargs="?", default=LIBRARY, help=f"default: {LIBRARY.relative_to(ROOT)}")
    parser.add_argument("--output", action="store_true", help="write results/neon-main-loops.json and .md")
    args = parser.parse_args(argv)
    if not args.library.exists():
        raise SystemExit(f"{args.library} is missing: make test-arm builds it")
    versions = {
        "compiler": first_line(tool("aarch64-linux-gnu-g++", "g++"), "--version"),
        "analyzer": first_line(analyzer(), "--version"),
    }
    figures, matrix = report(args.library), matrix_instruction()
    text = markdown(figures, versions, matrix)
    if not args.output:
        print(text, end="")
        return 0
    entries: list[dict[str, Any]] = [vars(figure) for figure in figures]
    lines = ",\n  ".join(json.dumps(entry) for entry in entries)
    head = json.dumps({**versions, "matrix": matrix})[:-1]
    RESULTS.write_text(f'{head}, "loops": [\n  {lines}\n]}}\n')
    RESULTS.with_suffix(".md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
