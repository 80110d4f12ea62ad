"""What a conversion of files tells: how much it did, and what rounding cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

ROWS = 64  # of a weight, whose norm is taken: at most a few MB of memory


@dataclass
class Report:
    """What was done, and what rounding cost.

    Attributes:
        merged, quantized: how many layers.
        bytes: of all tensors written.
        errors: {layer: |Q(W) - W| / |W|} of each quantized layer, Frobenius norms, W being what was to be rounded.
        notes: sentences about what a reader of the files should know.
    """

    merged: int = 0
    quantized: int = 0
    bytes: int = 0
    errors: dict[str, float] = field(default_factory=dict)
    squares: dict[str, float] = field(default_factory=lambda: {"error": 0.0, "weight": 0.0, "delta": 0.0})
    notes: list[str] = field(default_factory=list)

    def add_rounding(self, layer: str, rounded: Tensor, weight: Tensor) -> None:
        """Count a layer whose `weight` [N, K] has become `rounded` [N, K]."""
        error, norm = square(rounded, weight), square(weight)
        self.quantized += 1
        self.errors[layer] = math.sqrt(error / max(norm, 1e-300))
        self.squares["error"] += error
        self.squares["weight"] += norm

    @property
    def error(self) -> float:
        """|Q(W) - W| / |W| over all quantized layers together."""
        return math.sqrt(self.squares["error"] / max(self.squares["weight"], 1e-300))

    @property
    def error_of_delta(self) -> float | None:
        """|Q(W) - W| over the norm of what the adapter added, all layers together; None where it added nothing."""
        delta = self.squares["delta"]
        return math.sqrt(self.squares["error"] / delta) if delta else None

    def __str__(self) -> str:
        """A few lines for a terminal."""
        done = [f"{verb} {n} layers" for verb, n in (("merged", self.merged), ("quantized", self.quantized)) if n]
        text = ", ".join([*(done or ["changed no layer"]), f"wrote {self.bytes:,} bytes"])
        if self.errors:
            worst = max(self.errors, key=self.errors.__getitem__)
            text += f"\nerror of rounding, relative to the weights: {self.error:.4f} in all, "
            text += f"{self.errors[worst]:.4f} in {worst}"
        if self.error_of_delta is not None:
            text += f"\nthe same, relative to what the adapter added: {self.error_of_delta:.3f}"
        return "\n".join([text, *self.notes])


def square(tensor: Tensor, other: Tensor | None = None) -> float:
    """The sum of squares, of `tensor` or of its difference from `other`: float64 from row to row, ROWS at a time."""
    total = 0.0
    for start in range(0, len(tensor), ROWS):
        rows = tensor[start : start + ROWS].float()
        if other is not None:
            rows = rows - other[start : start + ROWS].float()
        total += rows.square().sum(dim=-1).double().sum().item()
    return total
