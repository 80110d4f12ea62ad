"""The goals of the figures, and the table that compares a report with them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cases import (
    ADAMW_ADAPTER,
    ADAMW_TENSOR,
    DOWN,
    GPU_LORA_M,
    LARGE_SQUARE,
    LORA_RANK,
    OURS,
    SHAPES,
    SQUARE,
    WIDTHS,
)  # fmt: skip

# {file of an adapter, as goals name it: its name in the table}.
FIGURES = {
    "torch_dense": "torch dense",
    "bitsandbytes": "bitsandbytes",
    "bitsandbytes_packed": "bitsandbytes packed",
    "torch_fused": "torch fused",
}
# {figure of a training step: its key in a report}.
STEP_RATIOS = {"step": "ratio", "step_dense": "dense_ratio"}
LEFT_OUT = "–"


@dataclass(frozen=True, kw_only=True)
class Goal:
    """One line of the table of goals: which cases, which figure, and what it must reach.

    figure     "limit": fraction of the machine's limit | name of a peer: times as fast as the peer | "lora": slowdown
               against the product without an adapter | "step": tokens/s over those of bitsandbytes + PEFT |
               "step_dense": over those of LoRA on bf16 weights | "memory": extra bytes of one call |
               "published": times as fast as PUBLISHED_US
    operation  that of a case; or one of STEPS, "memory", or a case of optimizer.py
    isa        None means any instruction set that does not have goals of its own
    shape      None means any
    """

    label: str
    figure: str
    must: float | None
    aim: float | None = None
    operation: str
    Ms: tuple[int, ...] = (0,)
    dtype: str = "bfloat16"
    rank: int = 0
    memory: str = "default"
    isa: str | None = None
    shape: tuple[int, int] | None = None
    device: str = "cpu"


LARGE = (256, 512, 1024, 2048)
# ggml's IQ4_NL at M=1 with 8-bit activations, measured once on a machine of the same kind, not by this program.
PUBLISHED_US = {DOWN: 2420.0}

GOALS = [
    Goal(label="quantize from bf16", figure="bitsandbytes", must=60, operation="quantize"),
    Goal(label="quantize from bf16", figure="limit", must=None, aim=0.60, operation="quantize", memory="kept"),
    Goal(label="dequantize to bf16", figure="limit", must=0.75, aim=0.95, operation="dequantize", memory="kept"),
    Goal(label="forward, M=1", figure="limit", must=0.60, aim=0.90, operation="forward", Ms=(1,)),
    Goal(label="forward, M=1", figure="torch_dense", must=4, operation="forward", Ms=(1,)),
    Goal(label="forward, M=1", figure="bitsandbytes", must=20, operation="forward", Ms=(1,)),
    Goal(
        label="forward, M=1, against ggml's IQ4_NL", figure="published", must=None, aim=2, operation="forward", Ms=(1,)
    ),
    Goal(label="forward, M=4", figure="torch_dense", must=2.5, aim=3.5, operation="forward", Ms=(4,)),
    Goal(label="forward, M=16", figure="torch_dense", must=1.4, aim=1.8, operation="forward", Ms=(16,)),
    Goal(label="forward, M=64", figure="torch_dense", must=1.1, aim=1.2, operation="forward", Ms=(64,)),
    Goal(label="dX, M=16", figure="torch_dense", must=1.7, aim=2.2, operation="dx", Ms=(16,)),
    Goal(label="dX, M=64", figure="torch_dense", must=1.2, aim=1.35, operation="dx", Ms=(64,)),
    Goal(label="forward, M=256…2048", figure="torch_dense", must=0.97, aim=1.05, operation="forward", Ms=LARGE),
    Goal(label="dX, M=256…2048", figure="torch_dense", must=0.97, aim=1.05, operation="dx", Ms=LARGE),
    Goal(
        label="LoRA r=16 inside the forward product",
        figure="lora",
        must=0.08,
        aim=0.04,
        operation="forward",
        Ms=(1, 16, 64, *LARGE),
        rank=LORA_RANK,
    ),
    Goal(
        label="LoRA r=16 inside dX",
        figure="lora",
        must=0.08,
        aim=0.04,
        operation="dx",
        Ms=(16, 64, *LARGE),
        rank=LORA_RANK,
    ),
    Goal(label="a training step of SmolLM2", figure="step", must=1.4, aim=1.8, operation="step"),
    Goal(label="the same", figure="step", must=None, operation="step_kept", memory="kept"),
    Goal(label="the same with LoRA dropout 0.05", figure="step", must=None, operation="step_dropout"),
    Goal(label="a training step of SmolLM2", figure="step_dense", must=None, operation="step_dense"),
    Goal(label="AdamW8bit, 4.9 M in 360 tensors", figure="bitsandbytes", must=8, operation=ADAMW_ADAPTER),
    Goal(label="AdamW8bit, 4.9 M in 360 tensors", figure="torch_fused", must=1, operation=ADAMW_ADAPTER),
    Goal(label="AdamW8bit, one tensor of 100 M", figure="limit", must=0.60, operation=ADAMW_TENSOR),
    Goal(label="extra memory of one call", figure="memory", must=1, operation="memory"),
    Goal(
        label="fp32 forward, M=256…2048", figure="torch_dense", must=0.9, operation="forward", Ms=LARGE, dtype="float32"
    ),
    Goal(label="fp32 dX, M=256…2048", figure="torch_dense", must=0.9, operation="dx", Ms=LARGE, dtype="float32"),
    Goal(
        label="fp32 forward, M up to 512",
        figure="bitsandbytes",
        must=1,
        operation="forward",
        Ms=(1, 16, 64, 256, 512),
        dtype="float32",
    ),
    Goal(
        label="fp32 dX, M up to 512",
        figure="bitsandbytes",
        must=1,
        operation="dx",
        Ms=(16, 64, 256, 512),
        dtype="float32",
    ),
    Goal(
        label="AVX2, fp32 forward, M=1",
        figure="torch_dense",
        must=3,
        operation="forward",
        Ms=(1,),
        dtype="float32",
        isa="avx2",
    ),
    Goal(
        label="AVX2, fp32 forward, M=256…2048",
        figure="torch_dense",
        must=0.85,
        operation="forward",
        Ms=LARGE,
        dtype="float32",
        isa="avx2",
    ),
    Goal(
        label="AVX2, fp32 dX, M=256…2048",
        figure="torch_dense",
        must=0.85,
        operation="dx",
        Ms=LARGE,
        dtype="float32",
        isa="avx2",
    ),
]

# With AMX, where the dense product is about eight times as fast: (M, must, aim) of Y, and of both directions.
AMX_FEW = ((1, 3, 3.6), (4, 2, 2.8), (8, 1.7, 2.4))
AMX = (
    (16, 1.7, 2.5), (32, 1.5, 2.2), (64, 1.5, 2), (128, 1.3, 1.6), (256, 1.05, 1.4), (512, 1.05, 1.4),
    (1024, 0.92, 1.15), (2048, 0.92, 1.15),
)  # fmt: skip
GOALS += [
    Goal(
        label=f"{label}, M={M}", figure="torch_dense", must=must, aim=aim, operation=operation, Ms=(M,), isa="amx_bf16"
    )
    for operation, label, figures in (("forward", "forward", AMX_FEW + AMX), ("dx", "dX", AMX))
    for M, must, aim in figures
]
GOALS += [
    Goal(
        label=label,
        figure="lora",
        must=0.10,
        aim=0.05,
        operation=operation,
        Ms=(*Ms, *LARGE),
        rank=LORA_RANK,
        isa="amx_bf16",
    )
    for operation, label, Ms in (
        ("forward", "LoRA r=16 inside the forward product", (1, 16, 64)),
        ("dx", "LoRA r=16 inside dX", (16, 64)),
    )
]
GOALS += [
    Goal(
        label="lora_gradients, M=512",
        figure="torch_dense",
        must=1,
        operation="lora_gradients",
        Ms=(512,),
        rank=LORA_RANK,
        isa="amx_bf16",
    ),
    Goal(label="a training step of SmolLM2", figure="step", must=1.5, aim=2, operation="step", isa="amx_bf16"),
    Goal(
        label="a training step of SmolLM2",
        figure="step_dense",
        must=1.2,
        aim=1.5,
        operation="step_dense",
        isa="amx_bf16",
    ),
    Goal(
        label="AdamW8bit, 4.9 M in 360 tensors",
        figure="torch_fused",
        must=1,
        aim=1.3,
        operation=ADAMW_ADAPTER,
        isa="amx_bf16",
    ),
]

# Goals on a GPU. Those in µs are of an H100 (copy 3.0 TB/s, 790 TFLOP/s bf16); the goal is its limit over them.
H100_US = {
    ("dequantize", SQUARE, 0): (14.1, 16.5),
    ("forward", SQUARE, 1): (2.9, 4.5),
    ("forward", DOWN, 1): (10.1, 13.0),
    ("forward", LARGE_SQUARE, 1): (11.6, 14.5),
    ("forward", LARGE_SQUARE, 64): (11.6, 22.0),
    ("forward", LARGE_SQUARE, 128): (21.7, 36.0),
    ("forward", LARGE_SQUARE, 256): (43.5, 70.0),
    ("forward", LARGE_SQUARE, 512): (87.0, 125.0),
}
OF_CUBLAS = {1024: 0.80, 2048: 0.88, 4096: 0.93, 8192: 0.96}
H100_ADAMW_PS = (3.35, 4.3)  # a parameter in bf16

GOALS += [
    Goal(
        label=f"{operation}, M={M}" if M else f"{operation} to bf16",
        figure="limit",
        must=limit / goal,
        operation=operation,
        Ms=(M,),
        shape=shape,
        device="cuda",
    )
    for (operation, shape, M), (limit, goal) in H100_US.items()
]
GOALS += [
    Goal(label=f"{label}, M={M}", figure="torch_dense", must=part, operation=operation, Ms=(M,), device="cuda")
    for operation, label in (("forward", "forward"), ("dx", "dX"))
    for M, part in OF_CUBLAS.items()
]
GOALS += [
    Goal(
        label="LoRA r=16 inside the forward product, M=4096",
        figure="lora",
        must=0.03,
        operation="forward",
        Ms=(GPU_LORA_M,),
        rank=LORA_RANK,
        device="cuda",
    ),
    Goal(
        label="AdamW8bit, bf16, one tensor of 100 M",
        figure="limit",
        must=H100_ADAMW_PS[0] / H100_ADAMW_PS[1],
        operation=ADAMW_TENSOR,
        device="cuda",
    ),
]


def targets(result: dict) -> str:
    """The table of goals and figures as Markdown, with a column for each shape. A range goes over the values of M.

    If a goal covers several M, the worst decides. ✔ aim reached, ○ must reached, ✘ missed.
    """
    device = device_of(result)
    growth = {(width, width) for width in WIDTHS} - set(SHAPES[device])
    # A training step has no shape; its figures stand in the first column.
    shapes = sorted({tuple(row["shape"]) for row in result["rows"]} - growth) or [SQUARE]
    head = ["", "against", "must", "aim", *(f"{N}×{K}" for N, K in shapes)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for goal in GOALS:
        if goal.device != device:
            continue
        cells = [_cell(goal, list(_values(goal, result, shape, shapes[0]))) for shape in shapes]
        if any(cell != LEFT_OUT for cell in cells):
            aims = [LEFT_OUT if value is None else _format(goal, value) for value in (goal.must, goal.aim)]
            if goal.figure == "memory":
                aims = ["8 MB + 1 MB a thread", LEFT_OUT]
            lines.append("| " + " | ".join([goal.label, _against(goal), *aims, *cells]) + " |")
    return "\n".join(lines)


def device_of(result: dict) -> str:
    """The device of cases.py that was measured."""
    return "cuda" if "gpu" in result["machine"] else "cpu"


def _against(goal: Goal) -> str:
    kept = ", kept memory" if goal.memory == "kept" else ""
    names = {
        "limit": "the machine's limit", "lora": "without", "step": "bitsandbytes + PEFT", "memory": LEFT_OUT,
        "step_dense": "LoRA over bf16",
        "published": "its published time", "torch_dense": "dense", "torch_fused": "torch's fused AdamW",
        "bitsandbytes_packed": "bitsandbytes over weights that it has repacked",
    }  # fmt: skip
    return names.get(goal.figure, goal.figure) + kept


def _values(goal: Goal, result: dict, shape: tuple[int, int], first: tuple[int, int]) -> Iterable[float]:
    """The figures of a goal in a report. An instruction set with goals of its own counts only for these."""
    special = {other.isa for other in GOALS if other.isa}
    isa = result["machine"]["isa"]
    if goal.device == "cpu" and goal.isa != (isa if isa in special else None):
        return
    if goal.shape not in (None, shape):
        return
    if goal.figure in STEP_RATIOS:
        ratio = result.get(goal.operation, {}).get(STEP_RATIOS[goal.figure])
        if ratio and shape == first:
            yield ratio
        return
    if goal.figure == "memory":
        yield from (row["bytes"] for row in result["memory"] if tuple(row["shape"]) == shape)
        return
    if goal.operation in (ADAMW_ADAPTER, ADAMW_TENSOR):
        found = [row for row in result.get("optimizer", ()) if row["name"] == goal.operation and shape == first]
        yield from (value for row in found if (value := _value(goal, row)) is not None)
        return
    for row in result["rows"]:
        plain = row["via"] == "function" and not row["dropout"] and not row["threads"] and tuple(row["shape"]) == shape
        plain = plain and row.get("format", "nf4") == "nf4"
        same = all(row[field] == getattr(goal, field) for field in ("operation", "dtype", "rank", "memory"))
        if plain and same and row["M"] in goal.Ms:
            value = _value(goal, row)
            if value is not None:
                yield value


def _value(goal: Goal, row: dict) -> float | None:
    times = {name: found["us"] for name, found in row["times"].items()}
    if goal.figure == "limit":
        return row["limit_us"] / times[OURS]
    if goal.figure == "lora":
        return times[OURS] / times["without LoRA"] - 1
    if goal.figure == "published":
        published = PUBLISHED_US.get(tuple(row["shape"]))
        return published / times[OURS] if published else None
    peer = FIGURES[goal.figure]
    return times[peer] / times[OURS] if peer in times else None


def _cell(goal: Goal, values: list[float]) -> str:
    if not values:
        return LEFT_OUT
    less_is_better = goal.figure in ("lora", "memory")
    low, high = min(values), max(values)
    worst = high if less_is_better else low

    def reached(aim: float | None) -> bool:
        return aim is not None and (worst <= aim if less_is_better else worst >= aim)

    must = goal.must
    if goal.figure == "memory":
        return f"up to {_format(goal, high)}"
    mark = (
        "✔"
        if reached(goal.aim) or (goal.aim is None and reached(must))
        else "○"
        if reached(must) or must is None
        else "✘"
    )
    shown = (
        _format(goal, low)
        if _format(goal, low) == _format(goal, high)
        else f"{_format(goal, low)} … {_format(goal, high)}"
    )
    return f"{shown} {mark}" if (must, goal.aim) != (None, None) else shown


def _format(goal: Goal, value: float) -> str:
    if goal.figure == "limit":
        return f"{100 * value:.0f} %"
    if goal.figure == "lora":
        return f"{100 * value:+.1f} %"
    if goal.figure == "memory":
        return f"{value / 2**20:.1f} MB"
    return f"{value:.2f} ×" if value < 10 else f"{value:.0f} ×"
