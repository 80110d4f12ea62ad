"""Read the kernels of a CUDA binary with NVIDIA's cuobjdump and nvdisasm: instructions, loops and resources."""

from __future__ import annotations

import collections
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ARCHITECTURES = ("sm_80", "sm_90", "sm_90a")

# {kind of instruction: names}; an instruction belongs to the first kind that fits.
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
                "YIELD", "SYNCS", "WARPGROUP", "ELECT", "NANOSLEEP", "MEMBAR", "ERRBAR", "CCTL", "BRX"),
    "uniform": ("U",),
}  # fmt: skip
OTHERS = "integer"


class Instruction(NamedTuple):
    """One line of a listing."""

    address: int
    guard: str  # the predicate, or ""
    opcode: str
    operands: str


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture."""

    name: str  # demangled, short
    architecture: str
    code: tuple[Instruction, ...]
    registers: int
    stack: int  # bytes for each thread: locals and spilled registers


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
    """The path of a program of NVIDIA, from PyPI or from a CUDA installation."""
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
    """{mangled name: name without return type, namespaces and parameters}."""
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
    """The kernels of an object, a library or a program whose short names match `pattern`."""
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
    """The address that a branch goes to, or None. BRA.DIV does not count: only a warp that has diverged takes it.

    In code for sm_80 a loop may be left by a conditional call that does not return.
    """
    kind = instruction.opcode.split(".")[0]
    is_branch = kind == "BRA" and ".DIV" not in instruction.opcode
    if not (is_branch or (kind == "CALL" and instruction.guard)):
        return None
    match = re.search(r"0x([0-9a-f]+)\s*$", instruction.operands)
    return int(match[1], 16) if match else None


def falls_through(instruction: Instruction) -> bool:
    """Whether the instruction below may be executed next."""
    kind = instruction.opcode.split(".")[0]
    if kind in ("EXIT", "RET", "BRX", "JMP", "JMX"):
        return bool(instruction.guard) and instruction.guard != "PT"
    if kind == "BRA" and ".DIV" not in instruction.opcode:
        return bool(instruction.guard) or "," in instruction.operands
    return True


def loops(
    code: Sequence[Instruction],
    target: Callable[[Instruction], int | None] = target,
    falls_through: Callable[[Instruction], bool] = falls_through,
) -> list[tuple[Instruction, ...]]:
    """The natural loops: for each branch back to a block that dominates it, the blocks from which it can be reached.

    `target` and `falls_through` are replaced for the code of other processors.
    """
    at = {instruction.address: i for i, instruction in enumerate(code)}
    begins = {0} | {at[t] for i in code if (t := target(i)) in at}
    begins |= {i + 1 for i, last in enumerate(code[:-1]) if target(last) is not None or not falls_through(last)}
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
    dominators = [1 if block == 0 else everything for block in range(len(order))]  # one bit for each block
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


def count(code: Sequence[Instruction], *kinds: str) -> int:
    """The number of instructions with one of these names."""
    return sum(i.opcode.split(".")[0] in kinds for i in code)


# Kernels with two loops: one with vector loads, and one for the elements that these cannot reach.
IN_VECTORS = r"(dequantize|panel|concatenate|check|update)_kernel<"
# {kernel whose main loop is inside another loop: turns of the main loop in one of the other}. The outer turn counts.
NESTED = {r"small_m_gemm_kernel<": 2}


def main_loop(code: Sequence[Instruction], name: str = "") -> tuple[Instruction, ...]:
    """The main loop of a kernel, by the rule in bench/sass.py; empty if it has no loop."""
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
    main = max(range(len(found)), key=lambda n: (count(own[n], "HMMA", "HGMMA"), prefers(own[n]), len(own[n])))
    for pattern, times in NESTED.items():
        if re.match(pattern, name):
            around = min((n for n, body in enumerate(bodies) if body > bodies[main]), key=lambda n: len(bodies[n]))
            return tuple(own[around]) + found[main] * times
    return found[main]


def kinds(code: Sequence[Instruction]) -> dict[str, int]:
    """{kind: number of instructions}."""
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
