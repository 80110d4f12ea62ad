"""What the CUDA kernels ask of a GPU, read from their machine code. No GPU is needed, and nothing is timed.

    make sass                     a table of the kernels that `make test-cpp` has compiled, and of bitsandbytes'
    make sass ARGS=--check        fails where a kernel spills, or is behind its figures in results/sass.json
    make sass ARGS=--output       writes those figures, and results/sass.md for people

A kernel's main loop is the one with the most tensor-core instructions (HMMA) that are in no loop inside of it, or, in a
kernel without, with the most instructions; or, in one that has a loop for what vectors can reach and one for the rest,
with the most 16-byte loads and stores. Its length times the threads of a block, divided by the weights that the block
passes in one turn, is how many thread-instructions a weight costs. An H100 issues about 29e12 of them a second: a bound
on speed from one side, which says nothing of waits. Every branch of a loop counts, also what it does only at the edges
of an array or for another dtype. Shared memory is not among the figures: ours is asked for at launch.

It needs NVIDIA's cuobjdump and nvdisasm, which come from PyPI (the extra `sass` of pyproject.toml), or with CUDA.
"""

from __future__ import annotations

import argparse
import collections
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "build/cpp/libqlora_native.a"
RESULTS = ROOT / "bench/results/sass.json"
ARCHITECTURES = ("sm_80", "sm_90")
# Compilers of one release give the same code. How far a figure may rise before it counts as fallen behind.
SLACK = 0.02

# Kinds of instructions, by how their names begin; the first that fits.
KINDS = {
    "tensor core": ("HMMA", "IMMA", "HGMMA"),
    "shared memory": ("LDS", "STS", "LDSM", "ATOMS"),
    "global memory": ("LDG", "STG", "LDGSTS", "LD", "ST", "RED", "ATOM"),
    "local memory": ("LDL", "STL"),
    "constants": ("LDC", "ULDC", "LDCU"),
    "fp32": ("FADD", "FMUL", "FFMA", "FMNMX", "FSEL", "FSETP", "FCHK", "MUFU", "FSET"),
    "16-bit": ("HADD", "HMUL", "HFMA", "HSET", "HMNMX"),
    "convert": ("F2F", "I2F", "F2I", "F2FP", "I2FP", "FRND", "I2I"),
    "move": ("MOV", "SHFL", "R2UR", "S2R", "S2UR", "CS2R", "R2P", "P2R"),
    "control": ("BRA", "BSSY", "BSYNC", "BAR", "EXIT", "CALL", "RET", "DEPBAR", "LDGDEPBAR", "WARPSYNC", "NOP", "BREAK",
                "YIELD", "NANOSLEEP", "MEMBAR", "ERRBAR", "CCTL", "BRX"),
    "uniform": ("U",),
}  # fmt: skip
OTHERS = "integer"


class Instruction(NamedTuple):
    """One line of a listing."""

    address: int
    guard: str  # its predicate, or ""
    opcode: str
    operands: str


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture."""

    name: str  # demangled, short
    architecture: str
    code: tuple[Instruction, ...]
    registers: int
    stack: int  # bytes a thread: locals and spilled registers


# ---- listings --------------------------------------------------------------------------------------------------------

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:\{ )?\s*(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")


def functions(listing: Iterable[str]) -> Iterator[tuple[str, str, tuple[Instruction, ...]]]:
    """(architecture, mangled name, code) of each function that `cuobjdump -sass` lists."""
    architecture, name, code = "", "", []
    for line in listing:
        if "Function : " in line or line.startswith("\tcode for "):
            if name:
                yield architecture, name, tuple(code)
            name, code = "", []
            if "Function : " in line:
                name = line.split("Function : ")[1].strip()
            else:
                architecture = line.split("code for ")[1].strip()
        elif match := _LINE.match(line):
            code.append(Instruction(int(match[1], 16), match[2] or "", match[3], match[4]))
    if name:
        yield architecture, name, tuple(code)


def resources(listing: Iterable[str]) -> dict[tuple[str, str], dict[str, int]]:
    """{(architecture, mangled name): {"REG": ..., "STACK": ..., ...}} of `cuobjdump -res-usage`."""
    found, architecture, name = {}, "", ""
    for line in listing:
        if line.startswith("arch = "):
            architecture = line.split("=")[1].strip()
        elif match := re.match(r"\s*Function (\S+?):\s*$", line):
            name = match[1]
        elif name and "REG:" in line:
            found[architecture, name] = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
            name = ""
    return found


def tool(name: str) -> str:
    """The path of a program of NVIDIA's: from the package of PyPI, or with CUDA."""
    installed = Path(sysconfig.get_path("purelib")).glob(f"nvidia/*/bin/{name}")
    path = next((str(p) for p in installed), None) or shutil.which(name)
    if path is None:
        raise SystemExit(f"{name} is missing: pip install nvidia-cuda-{name}")
    return path


def run(*command: str) -> list[str]:
    """The lines that a program prints. cuobjdump looks for nvdisasm on the path."""
    environment = {**os.environ, "PATH": f"{Path(tool('nvdisasm')).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if "does not contain device code" in done.stderr:
        return []
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.splitlines()


def short_names(mangled: Sequence[str]) -> dict[str, str]:
    """Demangled, without return types, namespaces and parameters."""
    text = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    names = {}
    for raw, line in zip(mangled, text.splitlines(), strict=True):
        line = re.sub(r"\(anonymous namespace\)::|\bqlora_native::(?:cuda::)?", "", line)
        line = re.sub(r"\((\w+)\)(\d+)", r"\2", line).removeprefix("void ")  # "(int)128", "(bool)1"
        depth, end = 0, len(line)
        for i, c in enumerate(line):
            depth += (c == "<") - (c == ">")
            if c == "(" and depth == 0:
                end = i
                break
        names[raw] = line[:end].strip()
    return names


def kernels(binary: Path, pattern: str = "", architectures: Sequence[str] = ARCHITECTURES) -> list[Kernel]:
    """The kernels of an object, a library or a program whose short name matches."""
    found = []
    for architecture in architectures:
        arguments = ("-arch", architecture, str(binary))
        usage = resources(run(tool("cuobjdump"), "-res-usage", *arguments))
        names = short_names([name for arch, name in usage if arch == architecture])
        wanted = sorted(name for name, short in names.items() if re.search(pattern, short))
        if not wanted:
            continue
        chosen = ("-fun", ",".join(wanted)) if pattern else ()
        for arch, name, code in functions(run(tool("cuobjdump"), "-sass", *chosen, *arguments)):
            if name in wanted and arch == architecture:
                used = usage[arch, name]
                found.append(Kernel(names[name], arch, code, used["REG"], used["STACK"]))
    return found


# ---- loops -----------------------------------------------------------------------------------------------------------


def target(instruction: Instruction) -> int | None:
    """Where a branch goes that is taken in the usual course. BRA.DIV is not: it serves a warp that fell apart.

    For sm_80 the way out of a loop may be a call under a condition, which does not return.
    """
    kind = instruction.opcode.split(".")[0]
    is_branch = kind == "BRA" and ".DIV" not in instruction.opcode
    if not (is_branch or (kind == "CALL" and instruction.guard)):
        return None
    match = re.search(r"0x([0-9a-f]+)\s*$", instruction.operands)
    return int(match[1], 16) if match else None


def falls_through(instruction: Instruction) -> bool:
    """Whether what stands below an instruction may come next."""
    kind = instruction.opcode.split(".")[0]
    if kind in ("EXIT", "RET", "BRX", "JMP", "JMX"):
        return bool(instruction.guard) and instruction.guard != "PT"
    if kind == "BRA" and ".DIV" not in instruction.opcode:
        return bool(instruction.guard) or "," in instruction.operands
    return True


def loops(code: Sequence[Instruction]) -> list[tuple[Instruction, ...]]:
    """The natural loops: of each branch back to a block that dominates it, all from which that branch is reached."""
    at = {instruction.address: i for i, instruction in enumerate(code)}
    begins = {0} | {at[t] for i in code if (t := target(i)) in at}
    begins |= {i + 1 for i, instruction in enumerate(code[:-1]) if not _is_plain(instruction)}
    order = sorted(begins)
    number = {first: block for block, first in enumerate(order)}
    ends = [*order[1:], len(code)]
    after: list[list[int]] = [[] for _ in order]
    for block, end in enumerate(ends):
        last = code[end - 1]
        if (t := target(last)) in at:
            after[block].append(number[at[t]])
        if falls_through(last) and end < len(code):
            after[block].append(number[end])
    before: list[list[int]] = [[] for _ in order]
    for block, nexts in enumerate(after):
        for following in nexts:
            before[following].append(block)

    reached, todo = {0}, [0]
    while todo:
        todo += [n for n in set(after[todo.pop()]) - reached if not reached.add(n)]
    everything = (1 << len(order)) - 1
    dominators = [1 if block == 0 else everything for block in range(len(order))]  # a bit for each block
    changed = True
    while changed:
        changed = False
        for block in sorted(reached - {0}):
            common = everything
            for previous in before[block]:
                if previous in reached:
                    common &= dominators[previous]
            common |= 1 << block
            changed |= common != dominators[block]
            dominators[block] = common

    bodies: dict[int, set[int]] = {}
    for block in reached:
        for head in after[block]:
            if dominators[block] >> head & 1:
                body = bodies.setdefault(head, {head})
                todo = [block]
                while todo:
                    b = todo.pop()
                    if b in reached and b not in body:
                        body.add(b)
                        todo += before[b]
    return [tuple(i for b in sorted(body) for i in code[order[b] : ends[b]]) for body in bodies.values()]


def _is_plain(instruction: Instruction) -> bool:
    return target(instruction) is None and falls_through(instruction)


def count(code: Sequence[Instruction], *kinds: str) -> int:
    """How many of the instructions begin with one of these names."""
    return sum(i.opcode.split(".")[0] in kinds for i in code)


# Kernels with two loops: over what vector loads can reach, and over the rest.
IN_VECTORS = r"look_kernel<|update_kernel<|dequantize_kernel<"


def main_loop(code: Sequence[Instruction], name: str = "") -> tuple[Instruction, ...]:
    """The loop in which a kernel spends its time, by the rule above; empty if there is none."""
    found = loops(code)
    if not found:
        return ()
    bodies = [{i.address for i in loop} for loop in found]
    own = []
    for loop, body in zip(found, bodies, strict=True):
        inner = set().union(*(other for other in bodies if other < body))
        own.append([i for i in loop if i.address not in inner])

    def vectors(loop: Sequence[Instruction]) -> int:
        fills_tables = count(loop, "STS") > 0
        return 0 if fills_tables else sum(i.opcode.startswith(("LDG.E.128", "STG.E.128")) for i in loop)

    prefers = vectors if re.match(IN_VECTORS, name) else lambda loop: 0
    return found[max(range(len(found)), key=lambda n: (count(own[n], "HMMA"), prefers(own[n]), len(own[n])))]


def kinds(code: Sequence[Instruction]) -> dict[str, int]:
    """How many instructions of each kind."""
    counted = collections.Counter(_kind(i.opcode) for i in code)
    return {kind: counted[kind] for kind in (*KINDS, OTHERS) if counted[kind]}


def _kind(opcode: str) -> str:
    if opcode.startswith("IMAD.MOV"):
        return "move"
    name = opcode.split(".")[0].rstrip("0123456789") if opcode[:3] in ("HAD", "HMU", "HFM") else opcode.split(".")[0]
    for kind, names in KINDS.items():
        if kind == "uniform" and name.startswith("U"):
            return kind
        if name in names:
            return kind
    return OTHERS


# ---- figures ---------------------------------------------------------------------------------------------------------


# Of what is counted by its output: how many units a thread passes in one turn of the main loop.
WORK: tuple[tuple[str, str, Callable[[re.Match[str], Sequence[Instruction]], float]], ...] = (
    # A warp's mma takes 16 of the inner dimension of 8 columns or, in ours, of 16; those of other rows take the same
    # weights once more.
    (r"gemm_kernel<\w+, \w+, GemmTile<(?P<rows>\d+),", "weight", lambda m, loop: _weights_of_mma(loop, int(m["rows"]))),
    (r"gemm_4bit_sm80\w*<\w+, (?P<rows>\d+),", "weight", lambda m, loop: _weights_of_mma(loop, int(m["rows"]))),
    # Its turns are of 64 weights a lane; what else has a multiply-add in it is not as much as a turn.
    (r"gemv_kernel<(Bf16|F16), ", "weight", lambda m, loop: count(loop, "HMMA") * 16 * 16 / 32),
    (r"gemv_kernel<float, (?P<rows>\d+),", "weight", lambda m, loop: count(loop, "FFMA") // int(m["rows"]) // 64 * 64),
    (r"gemm_4bit_simt<|kgemm_4bit_inference_naive<", "weight", lambda m, loop: 32),
    (r"dequantize_kernel<|look_kernel<|update_kernel<", "element", lambda m, loop: 8),
    (r"kDequantizeBlockwise<.*, 8, 0>", "element", lambda m, loop: 8),
    (r"kDequantizeBlockwise<.*, 8, [12]>", "element", lambda m, loop: 16),
    (r"kOptimizerStatic8bit2StateBlockwise<", "element", lambda m, loop: 1),
)


def _weights_of_mma(loop: Sequence[Instruction], tile_rows: int) -> float:
    return count(loop, "HMMA") * (16 * 8 / 32) / (tile_rows / 16)


def figures(kernel: Kernel) -> dict[str, Any]:
    """What the report says of a kernel."""
    loop = main_loop(kernel.code, kernel.name)
    result: dict[str, Any] = {
        "registers": kernel.registers,
        "local": count(kernel.code, "LDL", "STL"),
        "stack": kernel.stack,
        "instructions": len(kernel.code),
        "loop": len(loop),
    }
    if hmma := count(loop, "HMMA"):
        result["hmma"] = round(hmma / len(loop), 3)
    for pattern, unit, units in WORK:
        if loop and (match := re.match(pattern, kernel.name)):
            result[f"per_{unit}"] = round(len(loop) / units(match, loop), 2)
    return {**result, "kinds": kinds(loop)}


def nvcc_version() -> str:
    """Of the compiler, as 13.0; empty where there is none."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return ""
    return re.search(r"release ([\d.]+)", " ".join(run(nvcc, "--version")))[1]


def report(library: Path, pattern: str = "") -> dict[str, dict[str, Any]]:
    """{kernel: {architecture: figures}}."""
    found: dict[str, dict[str, Any]] = {}
    for kernel in kernels(library, pattern):
        found.setdefault(kernel.name, {})[kernel.architecture] = figures(kernel)
    return dict(sorted(found.items()))


def faults(now: dict[str, Any], committed: dict[str, Any], same_compiler: bool = True) -> list[str]:
    """What is wrong with a report: memory where registers should be, and what is worse than it was or has no figure."""
    found = []
    for name, architectures in now.items():
        for architecture, figure in architectures.items():
            where = f"{name} for {architecture}"
            before = committed.get(name, {}).get(architecture)
            if figure["local"] or figure["stack"]:
                found.append(f"{where}: {figure['stack']} bytes of stack, {figure['local']} accesses to local memory")
            if not same_compiler:
                continue
            if before is None:
                found.append(f"{where}: no committed figure (make sass ARGS=--output writes it)")
                continue
            for key in ("registers", "loop", "per_weight", "per_element"):
                if key in before and figure.get(key, 0) > before[key] * (1 + SLACK):
                    found.append(f"{where}: {key} {figure[key]}, was {before[key]}")
            if figure.get("hmma", 0) < before.get("hmma", 0) * (1 - SLACK):
                found.append(f"{where}: share of HMMA {figure.get('hmma', 0)}, was {before['hmma']}")
    return found


# ---- the command -----------------------------------------------------------------------------------------------------

HEADER = (
    "kernel",
    "for",
    "registers",
    "spills",
    "main loop",
    "HMMA",
    "a weight",
    "an element",
    "kinds of the main loop",
)
# What of bitsandbytes is set beside ours: the kernels that its 4-bit layers and its 8-bit AdamW run in bf16.
PEER = (
    r"gemm_4bit_(sm80_m16n8k16<__nv_bfloat16, (128, 128|128, 64|64, 64), 64>|simt<__nv_bfloat16, [1248]>)"
    r"|kgemm_4bit_inference_naive<__nv_bfloat16"
    r"|k(Deq|Q)uantizeBlockwise<(__nv_bfloat16, (512|64), .*2|float, 512, 64, 8, 0)>"
    r"|kOptimizerStatic8bit2StateBlockwise<__nv_bfloat16, 0,"
)


def rows(found: dict[str, dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """The lines of the table below HEADER."""
    for name, architectures in found.items():
        for architecture, figure in architectures.items():
            yield (
                name,
                architecture,
                str(figure["registers"]),
                str(figure["local"]),
                str(figure["loop"]),
                f"{figure['hmma']:.0%}" if "hmma" in figure else "",
                str(figure.get("per_weight", "")),
                str(figure.get("per_element", "")),
                ", ".join(f"{n} {kind}" for kind, n in sorted(figure["kinds"].items(), key=lambda item: -item[1])),
            )


def adamw_step(found: dict[str, Any]) -> Iterator[str]:
    """What a step of the 8-bit AdamW costs: each gradient is looked at, then all is updated."""
    for dtype in ("float", "Bf16", "F16"):
        look, update = (found.get(f"{kernel}_kernel<{dtype}>", {}) for kernel in ("look", "update"))
        sums = {arch: look[arch]["per_element"] + update[arch]["per_element"] for arch in look if arch in update}
        if sums:
            costs = ", ".join(f"{cost:.1f} ({architecture})" for architecture, cost in sums.items())
            yield f"A step of AdamW8bit in {dtype}, look and update: {costs} thread-instructions a parameter; goal: 90."


def peer_library() -> Path | None:
    """The newest of bitsandbytes' libraries for CUDA, where it is installed; it is read, not loaded."""
    spec = importlib.util.find_spec("bitsandbytes")
    if spec is None or spec.origin is None:
        return None
    return max(Path(spec.origin).parent.glob("libbitsandbytes_cuda*.so"), default=None)


def markdown(ours: dict[str, Any], theirs: dict[str, Any], title: str) -> str:
    """The report for people."""

    def table(found: dict[str, Any]) -> str:
        lines = [HEADER, ["---"] * len(HEADER), *rows(found)]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)

    text = [title, table(ours), *adamw_step(ours)]
    if theirs:
        text += ["bitsandbytes, likewise:", table(theirs)]
    return "\n\n".join(text) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path, nargs="?", default=LIBRARY, help=f"default: {LIBRARY.relative_to(ROOT)}")
    parser.add_argument("--kernels", default="", metavar="REGEX", help="only those whose names match")
    parser.add_argument("--check", action="store_true", help="compare with results/sass.json; print only what is wrong")
    parser.add_argument("--output", action="store_true", help="write results/sass.json and results/sass.md")
    args = parser.parse_args(argv)
    if not args.library.exists():
        raise SystemExit(f"{args.library} is missing: make test-cpp builds it")
    version = nvcc_version()
    ours = report(args.library, args.kernels)
    if not ours:
        if version and not args.kernels:
            raise SystemExit(f"{args.library} holds no kernels, although there is an nvcc")
        print(f"{args.library} holds no kernels: nothing to look at")
        return 0
    if args.check:
        committed = json.loads(RESULTS.read_text())
        same = version == committed["nvcc"]
        if not same:
            print(f"The figures are nvcc {committed['nvcc']}'s, this is {version}: only spills are looked for")
        wrong = faults(ours, committed["kernels"], same)
        print(*wrong, sep="\n", end="\n" if wrong else "")
        print(f"{len(ours)} kernels for {' and '.join(ARCHITECTURES)}: {len(wrong)} faults")
        return 1 if wrong else 0
    library = peer_library()
    theirs = report(library, PEER) if library and not args.kernels else {}
    title = f"nvcc {version}" + (f"; bitsandbytes {importlib.metadata.version('bitsandbytes')}" if theirs else "")
    if not args.output:
        print(markdown(ours, theirs, title), end="")
        return 0
    entries = []
    for name, both in ours.items():
        lines = [f"{json.dumps(architecture)}: {json.dumps(figure)}" for architecture, figure in both.items()]
        entries.append(f"{json.dumps(name)}: {{\n   " + ",\n   ".join(lines) + "}")
    RESULTS.write_text(f'{{"nvcc": {json.dumps(version)}, "kernels": {{\n  ' + ",\n  ".join(entries) + "\n}}\n")
    RESULTS.with_suffix(".md").write_text(markdown(ours, theirs, PREFACE.format(title)))
    return 0


PREFACE = """The machine code of the CUDA kernels, as `make sass ARGS=--output` found it ({}). No GPU ran it, nothing
was timed: these are counts of instructions, which bound speed from one side. `bench/sass.py` says how they come about.
"Spills" are instructions that use local memory; "main loop", "a weight" and "an element" are thread-instructions."""

if __name__ == "__main__":
    sys.exit(main())
