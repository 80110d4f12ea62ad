"""The table of README.md, from the reports below results/: python bench/readme.py [--write].

A column is a machine, or an instruction set that it was held to; the one that is furthest behind comes first. A cell is
the range over the shapes 4096×4096 and 4096×14336, and over the rows of X that its line names; the worst figure stands
first. A line that no report has is left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from cases import ADAMW_ADAPTER, DOWN, LORA_RANK, SQUARE
from goals import GOALS, LARGE, LEFT_OUT, Goal, _against, _format, _values

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- bench/readme.py begins -->\n", "<!-- bench/readme.py ends -->\n"
# Reports in the order of their columns.
COLUMNS = {
    "Intel Xeon (Cascade Lake)": "intel-xeon-cascade-lake-2-threads-avx512.json",
    "AMD EPYC (Zen 4), held to AVX2": "amd-epyc-2-threads-avx2.json",
    "AMD EPYC (Zen 4)": "amd-epyc-2-threads-avx512_bf16.json",
}


def line(label: str, figure: str, operation: str, *Ms: int, **fields: object) -> Goal:
    """A line of the table: a goal without an aim."""
    return Goal(label=label, figure=figure, must=None, operation=operation, Ms=Ms or (0,), **fields)


LINES = [
    line("Y = X·Wᵀ, 1 row", "bitsandbytes_packed", "forward", 1),
    *(line(f"Y, {M} row{'s' * (M > 1)}", "torch_dense", "forward", M) for M in (1, 4, 16, 64)),
    line("Y, 256 … 2048 rows", "torch_dense", "forward", *LARGE),
    *(line(f"dX = dY·W, {M} rows", "torch_dense", "dx", M) for M in (16, 64)),
    line("dX, 256 … 2048 rows", "torch_dense", "dx", *LARGE),
    line("Y in fp32, 1 row", "torch_dense", "forward", 1, dtype="float32"),
    line("Y in fp32, 256 … 2048 rows", "torch_dense", "forward", *LARGE, dtype="float32"),
    line("dX in fp32, 256 … 2048 rows", "torch_dense", "dx", *LARGE, dtype="float32"),
    line("LoRA r=16 inside Y", "lora", "forward", 1, 16, 64, *LARGE, rank=LORA_RANK),
    line("LoRA r=16 inside dX", "lora", "dx", 16, 64, *LARGE, rank=LORA_RANK),
    line("a training step of SmolLM2, LoRA r=16", "step_dense", "step_dense"),
    line("a training step of SmolLM2, LoRA r=16", "step", "step_kept", memory="kept"),
    line("a training step of SmolLM2, LoRA r=16", "step", "step"),
    line("a step of AdamW8bit, 4.9 M in 360 tensors", "torch_fused", ADAMW_ADAPTER),
    line("quantize from bf16", "bitsandbytes", "quantize"),
    line("dequantize to bf16", "limit", "dequantize", memory="kept"),
]


def cells(goal: Goal) -> Iterator[str]:
    """What each report says of a line."""
    special = {other.isa for other in GOALS if other.isa}
    for name in COLUMNS.values():
        result = json.loads((ROOT / "bench/results" / name).read_text())
        isa = result["machine"]["isa"]
        wanted = replace(goal, isa=isa if isa in special else None)
        values = sorted(v for shape in (SQUARE, DOWN) for v in _values(wanted, result, shape, SQUARE))
        if goal.figure == "lora":
            values.reverse()
        shown = [_format(goal, value) for value in values]
        yield " … ".join(dict.fromkeys((shown[0], shown[-1]))) if shown else LEFT_OUT


def table() -> str:
    """The table in Markdown."""
    rows = [["", "against", *COLUMNS], ["---"] * (2 + len(COLUMNS))]
    lines = [[goal.label, _against(goal), *cells(goal)] for goal in LINES]
    rows += [cells for cells in lines if set(cells[2:]) != {LEFT_OUT}]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def written(readme: str) -> str:
    """README.md with the table of today."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into README.md")
    if not parser.parse_args().write:
        return print(table(), end="")
    path = ROOT / "README.md"
    path.write_text(written(path.read_text()))


if __name__ == "__main__":
    main()
