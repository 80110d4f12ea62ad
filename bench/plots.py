"""Draw the plots of a report of run.py: speed against M, roofline, cost of LoRA, growth of cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cases import GROWTH_M, OURS, SQUARE

WITHOUT = "without LoRA"
COLOURS = {
    OURS: "tab:blue",
    "torch dense": "black",
    "bitsandbytes": "tab:orange",
    "bitsandbytes packed": "tab:red",
    "torchao": "tab:green",
    "PEFT unfused": "tab:purple",
    "ggml IQ4_NL": "tab:brown",
}
DTYPE = "bfloat16"


def draw(result: dict, folder: Path) -> list[tuple[str, str]]:
    """Write the plots that the rows suffice for, as PNG into `folder`. Returns (file name, caption) of each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = []
    for name, panels, caption, function in (
        ("speed", 2, SPEED, _speed),
        ("roofline", 1, ROOFLINE, _roofline),
        ("lora", 2, LORA, _lora),
        ("growth", 3, GROWTH, _growth),
    ):
        figure, axes = plt.subplots(1, panels, figsize=(4.6 * panels + 0.8, 4.2), squeeze=False, layout="constrained")
        if function(result, list(axes[0])):
            for axis in axes[0]:
                if axis.get_legend_handles_labels()[0]:
                    axis.legend(fontsize=8)
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(folder / f"{name}.png", dpi=110)
            drawn.append((f"{name}.png", caption))
        plt.close(figure)
    return drawn


SPEED = (
    f"Rate of the product with a {SQUARE[0]}×{SQUARE[1]} weight against the rows of activations, bf16, cold weights; "
    "the dotted line is the machine's limit for 4-bit weights. Higher is better."
)
ROOFLINE = (
    "Every product without an adapter at its arithmetic intensity (operations over the bytes of the weight in the form "
    "that the contestant keeps) under the machine's memory bandwidth and bf16 matrix rate, both measured in this run."
)
LORA = (
    f"Time that a LoRA adapter adds to the product, against its rank: M={GROWTH_M}, {SQUARE[0]}×{SQUARE[1]}, bf16. "
    "Backward is that of autograd with respect to x. Lower is better."
)
GROWTH = "Time of a product against the width of a square weight, the rows of activations, and threads."


def _rows(result: dict, **wanted: Any) -> list[dict]:
    """The rows with these fields; all other fields must be as in the plain case."""
    plain = {"via": "function", "memory": "default", "dropout": 0.0, "rank": 0, "threads": 0, "dtype": DTYPE,
             "format": "nf4"}  # fmt: skip
    wanted = plain | wanted
    return [row for row in result["rows"] if all(row.get(k, plain.get(k)) == v for k, v in wanted.items())]


def _line(axis: Any, rows: Iterable[dict], x: Callable[[dict], float], y: Callable[[dict], float], **style: Any) -> int:
    points = sorted((x(row), y(row)) for row in rows)
    if points:
        axis.plot(*zip(*points, strict=True), **{"marker": "o", "markersize": 4} | style)
    return len(points)


def _speed(result: dict, axes: list[Any]) -> bool:
    enough = False
    for axis, operation, title in zip(axes, ("forward", "dx"), ("Y = X·Wᵀ", "dX = dY·W"), strict=True):
        rows = [row for row in _rows(result, operation=operation) if tuple(row["shape"]) == SQUARE]
        for name, colour in COLOURS.items():
            having = [row for row in rows if name in row["times"]]
            _line(axis, having, lambda r: r["M"], lambda r, n=name: r["flops"] / r["times"][n]["us"] / 1e3,
                  color=colour, label=name)  # fmt: skip
        _line(axis, rows, lambda r: r["M"], lambda r: r["flops"] / r["limit_us"] / 1e3, color="grey", linestyle=":",
              marker="", label="limit")  # fmt: skip
        axis.set(yscale="log", xlabel="rows of activations, M", ylabel="GFLOP/s", title=title)
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
        enough |= len(rows) > 1
    return enough


def _roofline(result: dict, axes: list[Any]) -> bool:
    axis, limits = axes[0], result["limits"]
    rows = _rows(result, operation="forward") + _rows(result, operation="dx")
    if DTYPE not in limits or not rows:
        return False

    def intensity(row: dict, name: str) -> float:
        N, K = row["shape"]
        return row["flops"] / (2 * N * K if name == "torch dense" else row["bytes"])

    for name in ("bitsandbytes", "torch dense", OURS):
        points = [(intensity(row, name), row["flops"] / row["times"][name]["us"] / 1e3) for row in rows
                  if name in row["times"]]  # fmt: skip
        if points:
            axis.scatter(*zip(*points, strict=True), s=18, color=COLOURS[name], label=name, alpha=0.8)
    bandwidth, peak = limits["copy" if "gpu" in result["machine"] else "read"] / 1e9, limits[DTYPE] / 1e9
    ends = [1.0, peak / bandwidth, 2 * max(intensity(row, OURS) for row in rows)]
    axis.plot(ends, [bandwidth, peak, peak], color="grey", label=f"{bandwidth:.0f} GB/s, {peak:.0f} GFLOP/s")
    axis.set(xscale="log", yscale="log", xlabel="operations / byte of weight", ylabel="GFLOP/s", title="Roofline")
    axis.grid(alpha=0.3)
    return True


def _lora(result: dict, axes: list[Any]) -> bool:
    enough = False
    for axis, operation, via in zip(axes, ("forward", "dx"), ("function", "autograd"), strict=True):
        rows = [row for row in result["rows"] if row["rank"] and row["operation"] == operation and row["via"] == via
                and row["M"] == GROWTH_M and row["dtype"] == DTYPE and tuple(row["shape"]) == SQUARE
                and not row["dropout"]]  # fmt: skip
        for name in (OURS, "PEFT unfused"):
            having = [row for row in rows if name in row["times"]]
            _line(axis, having, lambda r: r["rank"],
                  lambda r, n=name: 100 * (r["times"][n]["us"] / r["times"][WITHOUT]["us"] - 1),
                  color=COLOURS[name], label=name)  # fmt: skip
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set(xlabel="rank", ylabel="added time, %", title="forward" if operation == "forward" else "backward, dX")
        axis.grid(alpha=0.3)
        enough |= len(rows) > 1
    return enough


def _growth(result: dict, axes: list[Any]) -> bool:
    if "gpu" in result["machine"]:
        return False  # no rows for two of the three
    width, tokens, threads = axes
    ms = 1e-3
    counts = sorted({row["threads"] for row in result["rows"] if row.get("threads")} | {result["machine"]["threads"]})
    enough = False
    for (operation, M), colour in zip((("forward", 1), ("forward", GROWTH_M), ("dx", GROWTH_M)),
                                      ("tab:green", "tab:blue", "tab:orange"), strict=True):  # fmt: skip
        style = {"color": colour, "label": f"{operation}, M={M}"}
        rows = [row for row in _rows(result, operation=operation, M=M) if row["shape"][0] == row["shape"][1]]
        enough |= _line(width, rows, lambda r: r["shape"][0], lambda r: ms * r["times"][OURS]["us"], **style) > 1
        _line(
            width, rows, lambda r: r["shape"][0], lambda r: ms * r["limit_us"], color=colour, linestyle=":", marker=""
        )
        points = []
        for count in counts:
            all_of_them = 0 if count == result["machine"]["threads"] else count
            for row in _rows(result, operation=operation, M=M, threads=all_of_them):
                if tuple(row["shape"]) == SQUARE:
                    points.append((count, ms * row["times"][OURS]["us"]))
        if points:
            threads.plot(*zip(*points, strict=True), marker="o", markersize=4, **style)
    for operation, colour in (("forward", "tab:blue"), ("dx", "tab:orange")):
        rows = [row for row in _rows(result, operation=operation) if tuple(row["shape"]) == SQUARE]
        _line(tokens, rows, lambda r: r["M"], lambda r: ms * r["times"][OURS]["us"], color=colour, label=operation)
        _line(tokens, rows, lambda r: r["M"], lambda r: ms * r["limit_us"], color=colour, linestyle=":", marker="",
              label=f"{operation}, the limit")  # fmt: skip
    square = f"{SQUARE[0]}×{SQUARE[1]}"
    for axis, label, title in (
        (width, "width", "square weights (dotted: the limit)"),
        (tokens, "rows of activations, M", square),
        (threads, "threads", square),
    ):
        axis.set_yscale("log")
        axis.set_xscale("log", base=2)
        axis.set(xlabel=label, ylabel="ms", title=title)
        axis.grid(alpha=0.3)
    threads.set_xticks(counts, [str(count) for count in counts])
    return enough
