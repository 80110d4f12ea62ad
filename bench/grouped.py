"""What rows in groups cost: the experts of a mixture, and many adapters over one weight.

    python bench/grouped.py [--output]

Experts: 16 of [1024, 2048] with 512 tokens, of which each goes to two, drawn by Zipf's law; 64 with 1 to 4 tokens each;
both products, against a loop over experts of torch's dense product, and of bitsandbytes' `matmul_4bit`. Adapters: 32 of
rank 16 in one batch, against one.

Contestants alternate in one process (timing.py), with cold weights; medians. Results are compared with the dense
loop's before they are timed. --output writes bench/results/<machine>/grouped.md.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import qlora_native as qn
import torch
from qlora_native._core.weight import op_arguments
from qlora_native.functional import linear_grouped
from torch import Tensor

import checks
import report
import timing
from cases import OURS
from tables import table

BUDGET_S = 6.0  # of one row's contestants together
DENSE, BITSANDBYTES, ONE_ADAPTER = "dense, a loop", "bitsandbytes, a loop", "one adapter"
RANK = 16
DTYPE = torch.bfloat16
_ops = torch.ops.qlora_native


def zipf(tokens: int, experts: int, top: int) -> Tensor:
    """How many tokens each expert gets, where each token goes to `top` that are drawn by Zipf's law."""
    torch.manual_seed(0)
    likely = 1 / torch.arange(1, experts + 1, dtype=torch.float64)
    return torch.multinomial(likely.expand(tokens, experts), top).flatten().bincount(minlength=experts)


def offsets_of(lengths: Tensor) -> Tensor:
    """Where the rows of each group begin, and the last ends."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])


def by_expert(offsets: Tensor, product: Callable[[int, slice], Tensor], shape: tuple[int, int]) -> Tensor:
    """The product of each expert that has rows, put together."""
    y = torch.empty(shape, dtype=DTYPE)
    for e, (begin, end) in enumerate(pairwise(offsets.tolist())):
        if end > begin:
            y[begin:end] = product(e, slice(begin, end))
    return y


def bitsandbytes_loop(weight: Tensor, offsets: Tensor, x: Tensor) -> Callable[[int], Tensor] | None:
    """bitsandbytes' product, expert by expert; None where it is missing."""
    try:
        import bitsandbytes as bnb
    except ImportError:
        return None
    held = [bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True) for w in weight]
    return lambda _: by_expert(
        offsets, lambda e, rows: bnb.matmul_4bit(x[rows], held[e][0].t(), held[e][1]), (len(x), weight.shape[1])
    )


def experts(name: str, shape: tuple[int, int, int], lengths: Tensor, clock: timing.Cpu, probe: Callable) -> list[dict]:
    """Y without and with adapters, and dX."""
    E, N, K = shape
    offsets, T = offsets_of(lengths), int(lengths.sum())
    weight = (torch.randn(shape) / K**0.5).to(DTYPE)
    q = qn.quantize(weight)
    decoded = q.dequantize()
    x, dy = torch.randn(T, K).to(DTYPE), torch.randn(T, N).to(DTYPE)
    a, b = torch.randn(E, RANK, K) / K**0.5, torch.randn(E, N, RANK) / RANK**0.5
    no_lora = (None, None, 1.0, 0.0, None)
    forward = {
        OURS: lambda _: linear_grouped(x, q, offsets),
        DENSE: lambda _: by_expert(offsets, lambda e, rows: x[rows] @ decoded[e].T, (T, N)),
        "with LoRA": lambda _: linear_grouped(x, q, offsets, None, a, b),
    }
    if (loop := bitsandbytes_loop(weight, offsets, x)) is not None:
        forward[BITSANDBYTES] = loop
    backward = {
        OURS: lambda _: _ops.linear_backward_input(dy, *op_arguments(q), *no_lora, True, offsets, E)[0],
        DENSE: lambda _: by_expert(offsets, lambda e, rows: dy[rows] @ decoded[e], (T, K)),
    }
    rows = []
    for product, contestants in (("Y", forward), ("dX", backward)):
        checks.close(name, contestants[OURS](0), contestants[DENSE](0))
        for call in contestants.values():
            call(0)
        found, _ = clock.alternate(contestants, probe, BUDGET_S, copies=False)
        rows.append({"name": f"{product}, {name}", "rows": T, "seconds": {k: t.median for k, t in found.items()}})
    return rows


def adapters(count: int, M: int, N: int, K: int, clock: timing.Cpu, probe: Callable) -> list[dict]:
    """Y and dX of a batch of `count` adapters and of one, over one weight."""
    q = qn.quantize(torch.randn(N, K) / K**0.5)
    x, dy = torch.randn(M, K).to(DTYPE), torch.randn(M, N).to(DTYPE)
    offsets = torch.arange(count + 1) * M // count
    rest = (1.0, 0.0, None, True)
    rows = []
    for dtype in (DTYPE, torch.float32):  # of the adapters: as they are served, and as they are trained
        a, b = torch.randn(count, RANK, K).to(dtype), torch.randn(count, N, RANK).to(dtype)
        forward = {
            OURS: lambda _, a=a, b=b: linear_grouped(x, q, offsets, None, a, b),
            ONE_ADAPTER: lambda _, a=a[0], b=b[0]: qn.linear(x, q, None, a, b),
        }
        backward = {
            OURS: lambda _, a=a, b=b: _ops.linear_backward_input(dy, *op_arguments(q), a, b, *rest, offsets, 1),
            ONE_ADAPTER: lambda _, a=a[0], b=b[0]: _ops.linear_backward_input(dy, *op_arguments(q), a, b, *rest),
        }
        for product, contestants in (("Y", forward), ("dX", backward)):
            found, _ = clock.alternate(contestants, probe, BUDGET_S, copies=False)
            name = f"{product} of [{N}, {K}], {count} adapters in {str(dtype)[6:]}"
            rows.append({"name": name, "rows": M, "seconds": {k: t.median for k, t in found.items()}})
    return rows


@torch.no_grad()
def measure(clock: timing.Cpu, probe: Callable) -> list[dict]:
    """The rows of the report."""
    few = torch.randint(1, 5, (64,))
    return [
        *experts("16 experts of [1024, 2048], top 2 of 512 tokens", (16, 1024, 2048), zipf(512, 16, 2), clock, probe),
        *experts("16 experts of [2048, 1024], top 2 of 512 tokens", (16, 2048, 1024), zipf(512, 16, 2), clock, probe),
        *experts("64 experts of [1024, 2048], 1 to 4 tokens each", (64, 1024, 2048), few, clock, probe),
        *adapters(32, 256, 2048, 2048, clock, probe),
    ]


def lines(found: dict) -> str:
    """The report in Markdown."""
    rows = [
        (row["name"], row["rows"], f"{1e3 * row['seconds'][OURS]:.3g}", name, f"{1e3 * seconds:.3g}",
         f"{seconds / row['seconds'][OURS]:.2f} × as fast")
        for row in found["measured"]
        for name, seconds in row["seconds"].items()
        if name != OURS
    ]  # fmt: skip
    return (
        f"# Rows in groups\n\n{report.head(found['machine'])}; NF4 with double quantization, bfloat16, LoRA of rank "
        f"{RANK}; medians.\n\n" + table(("", "rows", "ours, ms", "against", "ms", "ours is"), rows)
    )


if __name__ == "__main__":
    report.command_line("grouped", __doc__, measure, lines)
