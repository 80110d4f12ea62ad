"""The lines of a table that sums up reports of run.py, a column for each report.

A cell is the range over shapes and over the rows of X that its line names, with the worst figure first. README.md and
docs/numbers.md have such tables of several machines (readme.py), and each machine's report one of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cases import ADAMW_ADAPTER, ADAMW_TENSOR, LORA_RANK, OURS, SHAPES, Row
from tables import table

LARGE = (256, 512, 1024, 2048)
NONE = "–"
# {figure of a line: what the table calls it}. Figures that are not here are called by their own names.
AGAINST = {
    "limit": "the machine's limit",
    "lora": "without",
    "in NF4": "NF4",
    "ratio": "bitsandbytes + PEFT",
    "dense_ratio": "LoRA over bf16",
    "memory": NONE,
    "torch dense": "dense",
    "torch fused": "torch's fused AdamW",
    "bitsandbytes packed": "bitsandbytes over weights that it has repacked",
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the table: which cases, and which figure.

    figure     name of a peer, or "fastest peer": times as fast as it | "in NF4": as our product over NF4 |
               "limit": fraction of the machine's limit | "lora": slowdown against the product without an adapter |
               "ratio": a training step, times as fast as that of bitsandbytes + PEFT | "dense_ratio": as that of LoRA
               over bf16 weights | "memory": the largest extra memory of a call
    operation  that of a case; or one of STEPS, "memory", or a case of optimizer.py
    """

    label: str
    figure: str
    operation: str
    Ms: tuple[int, ...] = (0,)
    dtype: str = "bfloat16"
    rank: int = 0
    format: str = "nf4"
    memory: str = "default"

    @property
    def against(self) -> str:
        """What ours is compared with."""
        return AGAINST.get(self.figure, self.figure) + (", kept memory" if self.memory == "kept" else "")


def line(label: str, figure: str, operation: str, *Ms: int, **fields: object) -> Line:
    """A line, with its rows of X as arguments."""
    return Line(label=label, figure=figure, operation=operation, Ms=Ms or (0,), **fields)


FORMATS = ("mxfp4", "nvfp4")
# Those of docs/numbers.md.
LINES = [
    line("Y = X·Wᵀ, 1 row", "bitsandbytes packed", "forward", 1),
    line("Y, 4 rows", "bitsandbytes packed", "forward", 4),
    *(line(f"Y, {M} row{'s' * (M > 1)}", "torch dense", "forward", M) for M in (1, 4, 16, 64)),
    line("Y, 256 … 2048 rows", "torch dense", "forward", *LARGE),
    *(line(f"dX = dY·W, {M} row{'s' * (M > 1)}", "torch dense", "dx", M) for M in (1, 16, 64)),
    line("dX, 256 … 2048 rows", "torch dense", "dx", *LARGE),
    line("Y in fp32, 1 row", "torch dense", "forward", 1, dtype="float32"),
    line("Y in fp32, 256 … 2048 rows", "torch dense", "forward", *LARGE, dtype="float32"),
    line("dX in fp32, 256 … 2048 rows", "torch dense", "dx", *LARGE, dtype="float32"),
    *(line(f"Y of {each.upper()}, 1 … 256 rows", "in NF4", "forward", 1, 16, 256, format=each) for each in FORMATS),
    *(line(f"dX of {each.upper()}, 256 rows", "in NF4", "dx", 256, format=each) for each in FORMATS),
    line("LoRA r=16 inside Y", "lora", "forward", 1, 16, 64, *LARGE, rank=LORA_RANK),
    line("LoRA r=16 inside dX", "lora", "dx", 16, 64, *LARGE, rank=LORA_RANK),
    line("dA and dB of r=16, 512 rows", "torch dense", "lora_gradients", 512, rank=LORA_RANK),
    line("a training step of SmolLM2, LoRA r=16", "dense_ratio", "step_dense"),
    line("a training step of SmolLM2, LoRA r=16", "ratio", "step_kept", memory="kept"),
    line("a training step of SmolLM2, LoRA r=16", "ratio", "step"),
    line("a step of AdamW8bit, 4.9 M in 360 tensors", "torch fused", ADAMW_ADAPTER),
    line("a step of AdamW8bit, one tensor of 100 M", "torch fused", ADAMW_TENSOR),
    line("quantize from bf16", "bitsandbytes", "quantize"),
    line("dequantize to bf16", "limit", "dequantize"),
    line("dequantize to bf16", "limit", "dequantize", memory="kept"),
]
# Those that only the report of a machine has, in addition.
MORE_LINES = [
    line("Y, 1 row", "limit", "forward", 1),
    line("Y, 1 row", "bitsandbytes", "forward", 1),
    line("Y, 4096 … 8192 rows", "torch dense", "forward", 4096, 8192),
    line("dX, 4096 … 8192 rows", "torch dense", "dx", 4096, 8192),
    line("Y in fp32, up to 512 rows", "bitsandbytes", "forward", 1, 16, 64, 256, 512, dtype="float32"),
    line("dX in fp32, up to 512 rows", "bitsandbytes", "dx", 16, 64, 256, 512, dtype="float32"),
    line("a training step of SmolLM2, LoRA r=16, dropout 0.05", "ratio", "step_dropout"),
    line("a step of AdamW8bit, 4.9 M in 360 tensors", "bitsandbytes", ADAMW_ADAPTER),
    line("a step of AdamW8bit, one tensor of 100 M", "limit", ADAMW_TENSOR),
    line("quantize from bf16", "limit", "quantize", memory="kept"),
    line("extra memory of one call", "memory", "memory"),
]
# Those of README.md.
SHORT = [
    line("Y = X·Wᵀ, 1 row", "fastest peer", "forward", 1),
    line("Y, 16 rows", "fastest peer", "forward", 16),
    line("Y, 256 … 2048 rows", "fastest peer", "forward", *LARGE),
    line("dX = dY·W, 1 row", "fastest peer", "dx", 1),
    line("dX, 16 rows", "fastest peer", "dx", 16),
    line("dX, 256 … 2048 rows", "fastest peer", "dx", *LARGE),
    line("Y in fp32, 256 … 2048 rows", "fastest peer", "forward", *LARGE, dtype="float32"),
    line("a training step of SmolLM2-135M, LoRA r=16", "ratio", "step_kept", memory="kept"),
    line("a step of 8-bit AdamW, 4.9 M parameters", "torch fused", ADAMW_ADAPTER),
    line("a step of 8-bit AdamW, one tensor of 100 M", "torch fused", ADAMW_TENSOR),
]
FASTEST_OF = ("torch dense", "bitsandbytes", "bitsandbytes packed", "torchao")


def values(line: Line, result: Mapping) -> list[float]:
    """The figures of a line in a report, with the worst one first."""
    if line.figure in ("ratio", "dense_ratio"):
        step = result.get(line.operation, {})
        return [step[line.figure]] if step.get(line.figure) else []
    if line.figure == "memory":
        return [max(row["bytes"] for row in result["memory"])] if result["memory"] else []
    if line.operation in (ADAMW_ADAPTER, ADAMW_TENSOR):
        rows = [row for row in result.get("optimizer", ()) if row["name"] == line.operation]
        found = [_value(line, row["us"], row["limit_us"]) for row in rows]
    else:
        shapes = SHAPES["cuda" if "gpu" in result["machine"] else "cpu"]
        rows = [row for row in result["rows"] if _has(line, row, shapes)]
        found = [_value(line, row.us, row.limit_us(result["limits"])) for row in rows]
    return sorted((value for value in found if value is not None), reverse=line.figure == "lora")


def _has(line: Line, row: Row, shapes: Iterable[tuple[int, int]]) -> bool:
    fields = ("operation", "dtype", "rank", "format", "memory")
    same = all(getattr(row, field) == getattr(line, field) for field in fields)
    plain = row.via == "function" and not row.dropout and not row.threads
    return same and plain and row.M in line.Ms and row.shape in shapes


def _value(line: Line, us: Mapping[str, float], limit_us: float) -> float | None:
    if line.figure == "limit":
        return limit_us / us[OURS]
    if line.figure == "lora":
        return us[OURS] / us["without LoRA"] - 1
    peers = FASTEST_OF if line.figure == "fastest peer" else (line.figure,)
    return min((us[peer] / us[OURS] for peer in peers if peer in us), default=None)


def cell(line: Line, result: Mapping) -> str:
    """The range of a line's figures in a report."""
    shown = [_format(line, value) for value in values(line, result)]
    return " … ".join(dict.fromkeys((shown[0], shown[-1]))) if shown else NONE


def _format(line: Line, value: float) -> str:
    if line.figure == "limit":
        return f"{100 * value:.0f} %"
    if line.figure == "lora":
        return f"{100 * value:+.1f} %"
    if line.figure == "memory":
        return f"{value / 2**20:.1f} MB"
    return f"{value:.2f} ×" if value < 10 else f"{value:.0f} ×"


def summary(results: Mapping[str, Mapping], lines: Iterable[Line] = LINES) -> str:
    """The table, of {column: report}, without the lines that no report has."""
    rows = [(line.label, line.against, *(cell(line, result) for result in results.values())) for line in lines]
    return table(("", "against", *results), [row for row in rows if set(row[2:]) != {NONE}])
