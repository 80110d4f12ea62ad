"""`size_report`: which bytes of a model are quantized, and why the others are not."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from .base import QuantizedLayer
from .eligible import unquantized_parameters

_BITS = {torch.uint8: "8 bits", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_SHOWN = 3  # names that a row of the table lists


@dataclass
class Row:
    """A row of the table: the tensors that share a format or a reason.

    Attributes:
        quantized: whether they are quantized weights.
        what: their format, or why they are not quantized.
        names: the names of the tensors or of the quantized weights.
        bytes: the size of all of them.
    """

    quantized: bool
    what: str
    names: list[str] = field(default_factory=list)
    bytes: int = 0


@dataclass
class SizeReport:
    """The bytes of a model, by format or by the reason why they are not quantized. `print` shows a table.

    Attributes:
        rows: quantized weights are listed first, and each part from the largest row to the smallest.
    """

    rows: list[Row]

    @property
    def quantized(self) -> int:
        """The bytes of all quantized weights, with scales and tables."""
        return sum(row.bytes for row in self.rows if row.quantized)

    @property
    def left_alone(self) -> int:
        """The bytes of everything else."""
        return sum(row.bytes for row in self.rows if not row.quantized)

    def __str__(self) -> str:
        """The table."""
        total = max(self.quantized + self.left_alone, 1)
        lines = [f"{'bytes':>16}  {'share':>7}  {'tensors':>7}"]
        for row in self.rows:
            kind = "quantized" if row.quantized else "left alone"
            names = ", ".join(row.names[:_SHOWN]) + (
                f", and {len(row.names) - _SHOWN} more" * (len(row.names) > _SHOWN)
            )
            share = f"{row.bytes / total:.1%}"
            lines.append(f"{row.bytes:>16,}  {share:>7}  {len(row.names):>7}  {kind}, {row.what}: {names}")
        return "\n".join(lines)


def size_report(model: nn.Module) -> SizeReport:
    """List the parameters and buffers of a model by format or reason, each counted once.

    Args:
        model: any module.

    Returns:
        The report, which prints as a table.
    """
    rows: dict[tuple[bool, str], Row] = {}

    def add(quantized: bool, what: str, name: str, size: int) -> None:
        row = rows.setdefault((quantized, what), Row(quantized, what))
        row.names.append(name)
        row.bytes += size

    seen: set[int] = set()
    for path, layer in model.named_modules():
        if isinstance(layer, QuantizedLayer):
            tensors = [tensor for tensor in layer.weight_tensors().values() if id(tensor) not in seen]
            seen.update(map(id, tensors))
            if tensors:
                scales = _BITS[layer.quantized_weight.absmax.dtype]
                what = f"{layer.format} in blocks of {layer.blocksize}, scales in {scales}"
                add(True, what, path, sum(tensor.nbytes for tensor in tensors))
    for each in unquantized_parameters(model, seen):
        add(False, each.reason, each.name, each.tensor.nbytes)
    for name, buffer in model.named_buffers():
        if id(buffer) not in seen:
            add(False, "a buffer", name, buffer.nbytes)
    return SizeReport(sorted(rows.values(), key=lambda row: (not row.quantized, -row.bytes)))


def why_nothing(model: nn.Module) -> str:
    """A clause for the warning that nothing of `model` is quantized: which weights it has, and why each was left."""
    beside = ("a vector", "a buffer")
    left = [
        f"{', '.join(row.names[:_SHOWN])}{', ...' * (len(row.names) > _SHOWN)} ({row.what})"
        for row in size_report(model).rows
        if row.what not in beside
    ]
    return f"left as they are: {'; '.join(left) or 'nothing, as it has no weights'}"
