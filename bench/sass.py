"""What the CUDA kernels ask of a GPU, read from their machine code. No GPU is needed, and nothing is timed.

    make sass                     compiles the kernels, and prints a table of them
    make sass ARGS=--check        fails where a kernel spills, or is worse than bench/results/sass.json says
    make sass ARGS=--output       writes those figures, and the tables of the READMEs below cuda/

The main loop of a kernel is the one with the most tensor-core instructions (HMMA, HGMMA) of its own, not counting loops
inside it. Without any of them it is the loop with the most instructions; or, in a kernel that has one loop with vector
loads and one for the remaining elements, the loop with the most 16-byte loads and stores. Its length times the threads
of a block, divided by the weights that the block processes in one iteration, is the number of thread-instructions for
each weight. An H100 issues about 29e12 of them a second, which gives a lower bound on the time, without waits. Every
branch of a loop counts, also code for the edges of an array or for another dtype. Shared memory is not among the
figures, because it is requested at launch.

The script needs NVIDIA's cuobjdump and nvdisasm, from PyPI (the extra `sass` of pyproject.toml) or from CUDA.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent / "tools"))

from machine_code import ARCHITECTURES, Instruction, Kernel, count, kernels, kinds, main_loop, run

from tables import table, with_part

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "build/sass/libqlora_native.a"
RESULTS = ROOT / "bench/results/sass.json"
# What bench/results/sass.json keeps of a kernel's figures; a fault is a higher one, or a lower share of HMMA.
BOUNDED = ("registers", "loop", "per_weight", "per_element")
KEPT = (*BOUNDED, "hmma")
# Compilers of one release give the same code. How far a figure may rise before it counts as fallen behind.
SLACK = 0.02

# ---- figures ---------------------------------------------------------------------------------------------------------


# {kernel: the unit of its work, and how many units a thread processes in one iteration of the main loop}.
WORK: tuple[tuple[str, str, Callable[[re.Match[str], Sequence[Instruction]], float]], ...] = (
    # A warp's mma takes 16 of the inner dimension of 16 columns; those of other rows take the same weights once more.
    (r"gemm_kernel<\w+, \w+, GemmTile<(?P<rows>\d+),", "weight", lambda m, loop: _weights_of_mma(loop, int(m["rows"]))),
    (r"small_m_gemm_kernel<\w+, (?P<rows>\d+)", "weight", lambda m, loop: _weights_of_mma(loop, int(m["rows"]))),
    # A warpgroup's wgmma takes 16 of the inner dimension of 64 columns.
    (r"wgmma_gemm_kernel<", "weight", lambda m, loop: count(loop, "HGMMA") * 16 * 64 / 128),
    # Its iterations are of 64 weights a lane; what else has a multiply-add in it is not as much as one.
    (r"gemv_kernel<(Bf16|F16), ", "weight", lambda m, loop: count(loop, "HMMA") * 16 * 16 / 32),
    (r"gemv_kernel<float, (?P<rows>\d+),", "weight", lambda m, loop: count(loop, "FFMA") // int(m["rows"]) // 64 * 64),
    (r"(dequantize|panel|concatenate|check|update)_kernel<", "element", lambda m, loop: 8),
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
        "loop": len(loop),
    }
    if hmma := count(loop, "HMMA"):
        result["hmma"] = round(hmma / len(loop), 3)
    if is_serialized(kernel.code):
        result["serialized"] = True
    for pattern, unit, units in WORK:
        if loop and (match := re.match(pattern, kernel.name)):
            result[f"per_{unit}"] = round(len(loop) / units(match, loop), 2)
    return {**result, "kinds": kinds(loop)}


def is_serialized(code: Sequence[Instruction]) -> bool:
    """Whether each wgmma ends a group of its own, for which the next one waits.

    That is what ptxas makes where it cannot tell that registers are left alone in the meantime (its notes C7510 ...).
    """
    wgmma = [instruction for instruction in code if instruction.opcode.startswith("HGMMA")]
    return bool(wgmma) and all("gsb" in instruction.operands for instruction in wgmma)


def nvcc_version() -> str:
    """The version of nvcc, such as 13.0; empty if there is none."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return ""
    return re.search(r"release ([\d.]+)", " ".join(run(nvcc, "--version")))[1]


def report(compiled: Sequence[Kernel]) -> dict[str, dict[str, Any]]:
    """{kernel: {architecture: figures}}."""
    found: dict[str, dict[str, Any]] = {}
    for kernel in compiled:
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
            if figure.get("serialized"):
                found.append(f"{where}: each wgmma waits for the one before")
            if not same_compiler:
                continue
            if before is None:
                found.append(f"{where}: no committed figure (make sass ARGS=--output writes it)")
                continue
            for key in BOUNDED:
                if key in before and figure.get(key, 0) > before[key] * (1 + SLACK):
                    found.append(f"{where}: {key} {figure[key]}, was {before[key]}")
            if figure.get("hmma", 0) < before.get("hmma", 0) * (1 - SLACK):
                found.append(f"{where}: share of HMMA {figure.get('hmma', 0)}, was {before['hmma']}")
    return found


# ---- the command -----------------------------------------------------------------------------------------------------

HEADER = ("kernel", "for", "registers", "spills", "main loop", "HMMA", "a weight", "an element",
          "kinds of the main loop")  # fmt: skip


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


MARK = "bench/sass.py"  # of the table in a page
# What a page shows of kernels in bf16 over 4-bit weights: {page: {a kernel's name there: its name}}.
SHOWN = {
    ROOT / "cuda/product/README.md": {
        **{
            f"small-M GEMM, {rows} × 128, forward": f"small_m_gemm_kernel<Bf16, {rows}, false>" for rows in (16, 32, 64)
        },
        **{
            f"GEMM, {rows} × {cols}, {direction}": f"gemm_kernel<Bf16, {layout}, GemmTile<{rows}, {cols}, true>, false>"
            for rows, cols in ((16, 128), (64, 128), (128, 128), (128, 256), (256, 128))
            for direction, layout in (("forward", "DecodedRows"), ("dX", "DecodedColumns"))
        },
        "GEMV, up to 8 rows": "gemv_kernel<Bf16, 8, 4, true, true, false>",
        "GEMV, up to 8 rows, in groups": "gemv_kernel<Bf16, 8, 4, true, true, true>",
        "small-M GEMM, 16 × 128, forward, in groups": "small_m_gemm_kernel<Bf16, 16, true>",
        "GEMM, 16 × 128, dX, in groups": "gemm_kernel<Bf16, DecodedColumns, GemmTile<16, 128, true>, true>",
        "GEMM, 128 × 128, forward, in groups": "gemm_kernel<Bf16, DecodedRows, GemmTile<128, 128, true>, true>",
        "decoding a panel": "panel_kernel<Bf16, 4, true>",
        "GEMV, up to 8 rows, a weight of a file": "gemv_kernel<Bf16, 8, 4, false, true, false>",
        "decoding a panel, a weight of a file": "panel_kernel<Bf16, 4, false>",
    },
    ROOT / "cuda/product/wgmma/README.md": {
        f"wgmma, {rows} × 128, {direction}": f"wgmma_gemm_kernel<Bf16, {layout}, {rows}>"
        for rows in (16, 32, 64, 128, 256)
        for direction, layout in (("forward", "WgmmaRows"), ("dX", "WgmmaColumns"))
    },
}


def short_table(committed: dict[str, Any], shown: dict[str, str]) -> str:
    """The table of a page, of the committed figures."""
    lines = []
    for title, name in shown.items():
        figure = list(committed["kernels"][name].values())[-1]  # of the newest architecture
        unit = figure.get("per_weight", figure.get("per_element", ""))
        share = f"{figure['hmma']:.0%}" if "hmma" in figure else ""
        lines.append((title, figure["registers"], figure["loop"], share, unit))
    header = (f"sm_90(a), nvcc {committed['nvcc']}", "registers", "main loop", "share of mma", "for a weight")
    return table(header, lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path, nargs="?", default=LIBRARY, help=f"default: {LIBRARY.relative_to(ROOT)}")
    parser.add_argument("--kernels", default="", metavar="REGEX", help="only those whose names match")
    results = RESULTS.relative_to(ROOT)
    parser.add_argument("--check", action="store_true", help=f"compare with {results}; print only what is wrong")
    parser.add_argument("--output", action="store_true", help=f"write {results}, and the tables of the READMEs")
    args = parser.parse_args(argv)
    if not args.library.exists():
        raise SystemExit(f"{args.library} is missing: make sass builds it")
    version = nvcc_version()
    compiled = kernels(args.library, args.kernels)
    ours = report(compiled)
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
    if args.output:
        write(version, ours)
        return 0
    print(f"nvcc {version}\n\n{table(HEADER, rows(ours))}", end="")
    return 0


def write(version: str, found: dict[str, Any]) -> None:
    """Write bench/results/sass.json, with a line for each kernel, and the tables of the pages."""
    kept = {
        name: {arch: {key: figure[key] for key in KEPT if key in figure} for arch, figure in both.items()}
        for name, both in found.items()
    }
    entries = ",\n  ".join(f"{json.dumps(name)}: {json.dumps(both)}" for name, both in kept.items())
    RESULTS.write_text(f'{{"nvcc": {json.dumps(version)}, "kernels": {{\n  {entries}\n}}}}\n')
    committed = json.loads(RESULTS.read_text())
    for path, shown in SHOWN.items():
        path.write_text(with_part(path.read_text(), MARK, short_table(committed, shown)))


if __name__ == "__main__":
    sys.exit(main())
