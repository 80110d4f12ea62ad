"""Draw the plots of a report of run.py: speed against M, roofline, cost of LoRA, growth of cost (report.PLOTS)."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cases import GROWTH_M, GROWTH_PRODUCTS, OURS, RANKS, SQUARE, Row, matrix_rate

WITHOUT = "without LoRA"
COLOURS = {
    OURS: "tab:blue",
    "torch dense": "black",
    "bitsandbytes": "tab:orange",
    "bitsandbytes packed": "tab:red",
    "torchao": "tab:green",
    "PEFT unfused": "tab:purple",
}
DTYPE = "bfloat16"


def draw(result: dict, folder: Path) -> None:
    """Write the plots that the rows suffice for, as PNG into `folder`. Without matplotlib there are none."""
    if find_spec("matplotlib") is None:
        return print("no plots: matplotlib is not installed")
    for name, panels, function in (("speed", 2, _speed), ("roofline", 1, _roofline), ("lora", 2, _lora),
                                   ("growth", 3, _growth)):  # fmt: skip
        figure, axes = subplots(1, panels, figsize=(4.6 * panels + 0.8, 4.2))
        if function(result, list(axes[0])):
            for axis in axes[0]:
                axis.grid(alpha=0.3)
                if axis.get_legend_handles_labels()[0]:
                    axis.legend(fontsize=8)
            save(figure, folder / f"{name}.png")


def subplots(rows: int, columns: int, figsize: tuple[float, float]) -> tuple[Any, Any]:
    """A figure of matplotlib, and its axes [rows, columns]."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=figsize, squeeze=False, layout="constrained")


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG of 64 colours, which takes a third of the bytes."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    Image.open(buffer).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


def _rows(result: dict, operation: str, **wanted: Any) -> list[Row]:
    """The rows with these fields; all other fields must be as in the plain case."""
    plain = {"via": "function", "memory": "default", "dropout": 0.0, "rank": 0, "threads": 0, "dtype": DTYPE,
             "format": "nf4"}  # fmt: skip
    wanted = plain | {"operation": operation} | wanted
    return [row for row in result["rows"] if all(getattr(row, name) == value for name, value in wanted.items())]


def _line(axis: Any, rows: Iterable[Row], x: Callable[[Row], float], y: Callable[[Row], float], **style: Any) -> bool:
    """Draw a line, and return whether it has several points."""
    points = sorted((x(row), y(row)) for row in rows)
    if points:
        axis.plot(*zip(*points, strict=True), **{"marker": "o", "markersize": 4} | style)
    return len(points) > 1


def _speed(result: dict, axes: list[Any]) -> bool:
    enough = False
    for axis, operation, title in zip(axes, ("forward", "dx"), ("Y = X·Wᵀ", "dX = dY·W"), strict=True):
        rows = _rows(result, operation, shape=SQUARE)
        for name, colour in COLOURS.items():
            having = [row for row in rows if name in row.us]
            _line(axis, having, lambda r: r.M, lambda r, n=name: r.flops / r.us[n] / 1e3, color=colour, label=name)
        enough |= _line(axis, rows, lambda r: r.M, lambda r: r.flops / r.limit_us(result["limits"]) / 1e3, color="grey",
                        linestyle=":", marker="", label="limit")  # fmt: skip
        axis.set(yscale="log", xlabel="rows of activations, M", ylabel="GFLOP/s", title=title)
        axis.set_xscale("log", base=2)
    return enough


def _roofline(result: dict, axes: list[Any]) -> bool:
    axis, limits = axes[0], result["limits"]
    rows = _rows(result, "forward") + _rows(result, "dx")
    if DTYPE not in limits or not rows:
        return False

    def intensity(row: Row, name: str) -> float:
        return row.flops / (2 * row.shape[0] * row.shape[1] if name == "torch dense" else row.bytes)

    for name in ("bitsandbytes", "torch dense", OURS):
        points = [(intensity(row, name), row.flops / row.us[name] / 1e3) for row in rows if name in row.us]
        if points:
            axis.scatter(*zip(*points, strict=True), s=18, color=COLOURS[name], label=name, alpha=0.8)
    bandwidth = limits["copy" if "gpu" in result["machine"] else "read"] / 1e9
    peak = matrix_rate(limits, DTYPE) / 1e9
    ends = [1.0, peak / bandwidth, 2 * max(intensity(row, OURS) for row in rows)]
    axis.plot(ends, [bandwidth, peak, peak], color="grey", label=f"{bandwidth:.0f} GB/s, {peak:.0f} GFLOP/s")
    axis.set(xscale="log", yscale="log", xlabel="operations / byte of weight", ylabel="GFLOP/s", title="Roofline")
    return True


def _lora(result: dict, axes: list[Any]) -> bool:
    enough = False
    for axis, operation, via in zip(axes, ("forward", "dx"), ("function", "autograd"), strict=True):
        for name in (OURS, "PEFT unfused"):
            wanted = {"via": via, "M": GROWTH_M, "shape": SQUARE}
            rows = [row for rank in RANKS for row in _rows(result, operation, rank=rank, **wanted) if name in row.us]
            enough |= _line(axis, rows, lambda r: r.rank, lambda r, n=name: 100 * (r.us[n] / r.us[WITHOUT] - 1),
                            color=COLOURS[name], label=name)  # fmt: skip
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set(xlabel="rank", ylabel="added time, %", title="forward" if operation == "forward" else "backward, dX")
    return enough


def _growth(result: dict, axes: list[Any]) -> bool:
    if "gpu" in result["machine"]:
        return False  # no rows for two of the three
    width, tokens, threads = axes
    all_threads, enough = result["machine"]["threads"], False
    counts = sorted({row.threads for row in result["rows"] if row.threads} | {all_threads})

    def ms(row: Row) -> float:
        return row.us[OURS] / 1e3

    def limit_ms(row: Row) -> float:
        return row.limit_us(result["limits"]) / 1e3

    for (operation, M), colour in zip(GROWTH_PRODUCTS, ("tab:green", "tab:blue", "tab:orange"), strict=True):
        style = {"color": colour, "label": f"{operation}, M={M}"}
        rows = [row for row in _rows(result, operation, M=M) if row.shape[0] == row.shape[1]]
        enough |= _line(width, rows, lambda r: r.shape[0], ms, **style)
        _line(width, rows, lambda r: r.shape[0], limit_ms, color=colour, linestyle=":", marker="")
        rows = [row for n in (0, *counts) for row in _rows(result, operation, M=M, threads=n, shape=SQUARE)]
        _line(threads, rows, lambda r: r.threads or all_threads, ms, **style)
    for operation, colour in (("forward", "tab:blue"), ("dx", "tab:orange")):
        rows = _rows(result, operation, shape=SQUARE)
        _line(tokens, rows, lambda r: r.M, ms, color=colour, label=operation)
        _line(tokens, rows, lambda r: r.M, limit_ms, color=colour, linestyle=":", marker="",
              label=f"{operation}, the limit")  # fmt: skip
    for axis, label, title in (
        (width, "width", "square weights (dotted: the limit)"),
        (tokens, "rows of activations, M", f"{SQUARE[0]}×{SQUARE[1]}"),
        (threads, "threads", f"{SQUARE[0]}×{SQUARE[1]}"),
    ):
        axis.set_xscale("log", base=2)
        axis.set(xlabel=label, ylabel="ms", title=title, yscale="log")
    threads.set_xticks(counts, [str(count) for count in counts])
    return enough
